"""What FSDP1 has joined and cut: how large a parameter was before, which decides on the form of its state."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor

_ATTRIBUTE = "_bnb_original_numel"


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 manages this parameter, which it marks so."""
    return getattr(p, "_fsdp_flattened", False)


def original_numel(p: Any) -> int:
    """Elements of the parameter before FSDP1 joined it with others and cut it, of any other parameter all of them.

    Of one that stands for several (``use_orig_params=False``) the largest counts: its state has one form.
    """
    if not is_flattened(p):
        return p.numel()
    if not hasattr(p, _ATTRIBUTE):
        _mark_all()
    return getattr(p, _ATTRIBUTE, p.numel())


def _mark_all() -> None:
    """Note at each parameter that FSDP1 manages how large it was.

    A parameter does not know the flat one that it is a part of, but that one knows its parameters.
    """
    for flat in gc.get_objects():
        if issubclass(type(flat), Tensor) and getattr(flat, "_is_flat_param", False):
            setattr(flat, _ATTRIBUTE, max(flat._numels))
            for p, numel in zip(flat._params or [], flat._numels, strict=False):
                setattr(p, _ATTRIBUTE, numel)

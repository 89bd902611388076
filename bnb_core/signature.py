"""What the checks of a call look at, as a key: a call like an earlier one need not be checked again."""

from __future__ import annotations

from collections.abc import Hashable
from importlib import import_module
from typing import Any

from torch import Size, Tensor


def signature_in_python(arguments: tuple[Any, ...]) -> Hashable | None:
    """Dtype, device, shape and readability of every tensor, type and value of everything else, in sequences too.

    A record counts by its type as well: no other tuple stands for one.

    None where that cannot be told, as the arguments have to be checked each time then.
    """
    try:
        key = _described(arguments)
        hash(key)
    except (TypeError, RuntimeError):
        return None
    return key


def is_readable(tensor: Tensor) -> bool:
    """Whether the memory holds the values in order: contiguous, and not with the other sign (``is_neg``)."""
    return tensor.is_contiguous() and not tensor.is_neg()


_PLAIN_SEQUENCES = (tuple, list, Size)


def _described(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.device, argument.shape, is_readable(argument)
    if isinstance(argument, tuple | list):
        kind = None if type(argument) in _PLAIN_SEQUENCES else type(argument)
        return kind, *[_described(item) for item in argument]
    return type(argument), argument


def _compiled() -> tuple[Any, str]:
    try:
        return import_module("bnb_core._signature").signature, "compiled"
    except ImportError as error:
        return None, f"in Python, some 2 us a call slower ({error})"


compiled_signature, implementation = _compiled()
"""The same, compiled; None where it is not built (with `pip install .` it is), or where torch, before 2.10, does not
let C++ look at a tensor. And which one serves, in words."""

signature = compiled_signature or signature_in_python

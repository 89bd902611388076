"""What several of the functions check of their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bnb_core.checks import check_float, renamed
from bnb_core.primitive import Primitive


def dtype_of(name: str, tensor: Tensor | None, default: Any) -> Any:
    """The dtype of an optional argument, or the default where it is not given."""
    if tensor is None:
        return default
    check_float(name, tensor)
    return tensor.dtype


def filled(primitive: Primitive, arguments: tuple[Any, ...], **outputs: Tensor | None) -> Any:
    """The primitive's results in those tensors that are given, which errors call by their names here."""
    try:
        return primitive(*arguments, out=tuple(outputs.values()))
    except (TypeError, ValueError) as error:
        raise renamed(error, {f"out[{index}]": name for index, name in enumerate(outputs)}) from error

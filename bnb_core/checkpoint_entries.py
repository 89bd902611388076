"""What a checkpoint says a tensor is, checked before anything is copied or allocated: a file may say anything."""

from __future__ import annotations

from collections.abc import Sequence
from reprlib import repr as shown

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MOST_EXPANSION = 16
"""How many times its stored bytes a tensor may take: strides of 0, which files keep, make any number of elements."""
MOST_ELEMENTS = 2**63


def checked_entry(
    key: str, value: object, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], on_meta: bool = False
) -> Tensor:
    """A tensor of a state dict, detached.

    Args:
        key: what errors call it.
        on_meta: take one without data, too.

    Raises:
        ValueError: it is no dense tensor with memory of its own, or has another dtype or shape.
    """
    tensor = dense_entry(key, value, on_meta)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{key}: expected {names} of shape {shape}, got {described(tensor)}")
    return tensor


def dense_entry(key: str, value: object, on_meta: bool = False) -> Tensor:
    """As :func:`checked_entry`, of any dtype and shape."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout is not torch.strided:
        raise ValueError(f"{key}: expected a dense tensor, got {'a nested one' if value.is_nested else value.layout}")
    if value.is_meta:
        if not on_meta:
            raise ValueError(f"{key}: expected a tensor with data, got one on the meta device")
    elif not is_traceable_wrapper_subclass(value):
        stored = value.untyped_storage().nbytes()
        if value.numel() * value.itemsize > MOST_EXPANSION * stored:
            raise ValueError(
                f"{key}: {described(value)} is stored in {stored} bytes, no whole tensor"
                "; expected one that is stored whole"
            )
    return value.detach()


def described(tensor: Tensor) -> str:
    """Dtype and shape, in a few words, never the contents."""
    return f"{tensor.dtype} of shape {shown(tuple(tensor.shape))}"


def element_count(key: str, shape: object) -> int:
    """How many elements a tensor of this shape has, which a checkpoint holds as a list.

    Raises:
        ValueError: it is no list of sizes, or they multiply to more than a tensor can have.
    """
    if not isinstance(shape, (list, tuple)):
        raise ValueError(f"{key}: expected a list of sizes, got {shown(shape)}")
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < MOST_ELEMENTS:
            raise ValueError(f"{key}: expected sizes from 0 to 2**63 - 1, got {shown(size)}")
        count *= max(size, 1)  # a size of 0 hides none of the others
        if count >= MOST_ELEMENTS:
            raise ValueError(f"{key}: expected sizes that multiply to less than 2**63, got {shown(shape)}")
    return 0 if 0 in shape else count

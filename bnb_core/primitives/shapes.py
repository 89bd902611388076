"""What shapes come to, and the checks of them that primitives share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def block_count(n: int, blocksize: int) -> int:
    """How many blocks of ``blocksize`` hold ``n`` elements, the last one perhaps short."""
    return (n + blocksize - 1) // blocksize


def packed_numel(n: int, storage: torch.dtype) -> int:
    """How many elements of ``storage`` hold ``n`` codes of 4 bits, the last one perhaps filled up with zero bytes."""
    return (n + 2 * storage.itemsize - 1) // (2 * storage.itemsize)


def numel_of(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n = n * size
    return n


def check_columns(name: str, A: Tensor, columns: int, shape: Sequence[int]) -> None:
    if A.dim() == 0 or A.shape[-1] != columns:
        raise ValueError(
            f"{name}: expected a last dimension of {columns} for a weight of shape {tuple(shape)}, got {tuple(A.shape)}"
        )


def check_rows(name: str, A: Tensor) -> tuple[int, int]:
    """(rows, columns) of a tensor of at least one dimension, read as a stack of rows."""
    if A.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    return numel_of(A.shape[:-1]), A.shape[-1]

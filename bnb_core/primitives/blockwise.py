"""Quantization in blocks, to 8 and to 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.checks import (
    QUANT_STORAGES,
    QUANT_TYPES,
    check_blocksize,
    check_choice,
    check_code,
    check_dtype,
    check_dtype_argument,
    check_float,
    check_numel,
    check_sizes,
)
from bnb_core.primitive import Out, primitive
from bnb_core.primitives.shapes import block_count, numel_of, packed_numel
from bnb_core.records import Weight4bit


@primitive("(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Out, Out]:
    """Quantize to 8 bits per element in blocks (8-bit Optimizers, section 2.1).

    Args:
        A: any shape, f32, f16 or bf16.
        code: f32[256], ascending.
        blocksize: elements per block of the flat tensor.

    Returns:
        codes u8 in A's shape, absmax f32[ceil(n / blocksize)].
    """
    check_float("A", A)
    check_code("code", code)
    check_blocksize(blocksize)
    return Out(A.shape, torch.uint8), Out((block_count(A.numel(), blocksize),), torch.float32)


@primitive("(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor")
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Out:
    """Undo :data:`quantize_blockwise`: ``code[A_i] * absmax_b`` in f32, rounded once to ``dtype``.

    Args:
        A: codes, u8, any shape.
        absmax: f32, one value per block.
        code: f32[256].
        dtype: of the result: f32, f16 or bf16.
    """
    check_dtype("A", A, (torch.uint8,))
    check_dtype("absmax", absmax, (torch.float32,))
    check_code("code", code)
    check_blocksize(blocksize)
    check_numel("absmax", absmax, block_count(A.numel(), blocksize))
    check_dtype_argument("dtype", dtype)
    return Out(A.shape, dtype)


@primitive("(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Out, Out]:
    """Quantize to 4 bits per element in blocks (QLoRA, section 3).

    Args:
        A: any shape, f32, f16 or bf16.
        blocksize: elements per block of the flat tensor.
        quant_type: ``nf4`` or ``fp4``.
        quant_storage: the dtype that the packed bytes are viewed as: u8, f16, bf16 or f32.

    Returns:
        packed ``quant_storage[ceil(bytes / itemsize), 1]`` (element 2k in the high nibble of byte k, zero bytes after
        the last), absmax f32[ceil(n / blocksize)].
    """
    check_float("A", A)
    check_blocksize(blocksize)
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_dtype_argument("quant_storage", quant_storage, QUANT_STORAGES)
    n, storage_numel = A.numel(), packed_numel(A.numel(), quant_storage)
    padded = storage_numel * quant_storage.itemsize > packed_numel(n, torch.uint8)
    packed = Out((storage_numel, 1), quant_storage, zeroed=padded)
    return packed, Out((block_count(n, blocksize),), torch.float32)


def check_weight(name: str, weight: Weight4bit) -> None:
    """The codes of a weight, which errors call ``name``, and its scales."""
    check_sizes("shape", weight.shape)
    packed, n = weight.packed, numel_of(weight.shape)
    check_dtype(name, packed, QUANT_STORAGES)
    check_blocksize(weight.blocksize)
    check_choice("quant_type", weight.quant_type, QUANT_TYPES)
    if packed.numel() != packed_numel(n, packed.dtype):
        expected, given = (count * packed.dtype.itemsize for count in (packed_numel(n, packed.dtype), packed.numel()))
        raise ValueError(f"{name}: expected {expected} bytes for {n} elements of 4 bits, got {given}")
    _check_block_scales(weight, block_count(n, weight.blocksize))


def _check_block_scales(weight: Weight4bit, blocks: int) -> None:
    nested = weight.nested_absmax is not None
    check_dtype("absmax", weight.absmax, (torch.uint8,) if nested else (torch.float32,))
    check_numel("absmax", weight.absmax, blocks)
    check_blocksize(weight.nested_blocksize, "nested_blocksize")
    if not nested:
        for name in ("nested_code", "offset"):
            tensor = getattr(weight, name)
            if tensor is not None:
                raise TypeError(f"{name}: expected None, as nested_absmax is None, got {type(tensor).__name__}")
    else:
        check_dtype("nested_absmax", weight.nested_absmax, (torch.float32,))  # type: ignore[arg-type]
        check_numel("nested_absmax", weight.nested_absmax, block_count(blocks, weight.nested_blocksize))  # type: ignore[arg-type]
        check_code("nested_code", weight.nested_code)  # type: ignore[arg-type]
        check_dtype("offset", weight.offset, (torch.float32,))  # type: ignore[arg-type]
        check_numel("offset", weight.offset, 1)  # type: ignore[arg-type]


@primitive("(Weight4bit A, ScalarType dtype) -> Tensor")
def dequantize_4bit(A: Weight4bit, dtype: torch.dtype) -> Out:
    """Undo :data:`quantize_4bit`: ``code[nibble_i] * absmax_b`` in f32, rounded once to ``dtype``.

    Args:
        A: packed, of any shape, which the result has.
        dtype: of the result: f32, f16 or bf16.
    """
    check_weight("A", A)
    check_dtype_argument("dtype", dtype)
    return Out(tuple(A.shape), dtype)

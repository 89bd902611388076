"""Tensors quantized in blocks, to 4 and to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnb_core import block_sizes, primitives
from bnb_core.checks import (
    BLOCKSIZES,
    QUANT_TYPES,
    check_code,
    check_dense,
    check_dtype,
    check_flag,
    check_float,
    check_numel,
    check_shape,
    check_tensor,
)
from bnb_core.codebooks import create_dynamic_map, get_4bit_type
from bnb_core.functional.arguments import dtype_of, filled
from bnb_core.quant_state import QuantState, check_quant_state, weight_4bit
from bnb_core.records import NESTED_BLOCKSIZE, Weight4bit

DEFAULT_BLOCKSIZE_4BIT = 64


def _code_on(device: torch.device, code: Tensor | None) -> Tensor:
    """The codebook, by default the signed dynamic map, on that device."""
    if code is None:
        return _codebook("dynamic", device)
    check_code("code", code)
    return code.to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantization (QLoRA, section 3): the scales f32 less their mean, in 8 bits.

    Returns:
        Their codes u8, the mean f32, and what decodes the codes.

    Raises:
        TypeError: the scales are no dense tensor of f32.
    """
    check_dense("absmax", absmax)
    check_dtype("absmax", absmax, (torch.float32,))
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    codes, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, offset, state2


def dequantize_absmax(quant_state: QuantState) -> Tensor:
    """The f32 scale of each block, double-quantized or not."""
    check_quant_state("quant_state", quant_state)
    if not quant_state.nested:
        return quant_state.absmax
    offset: Any = quant_state.offset
    check_dtype("quant_state.offset", offset, (torch.float32,))
    check_numel("quant_state.offset", offset, 1)
    return dequantize_blockwise(quant_state.absmax, quant_state.state2) + offset


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize to 4 bits per element in blocks (QLoRA, section 3).

    Args:
        A: any shape, f32, f16 or bf16.
        absmax: receives the scales, f32[ceil(n / blocksize)].
        out: receives the packed codes, ``quant_storage[ceil(bytes / itemsize), 1]``.
        blocksize: 32 to 4096, a power of two; None for 64.
        compress_statistics: quantize the scales to 8 bits as well.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as: u8, f16, bf16 or f32.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("compress_statistics", compress_statistics)
    blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    if out is None and absmax is None:
        packed, scales = primitives.quantize_4bit(A, blocksize, quant_type, quant_storage)
    else:
        arguments = (A, blocksize, quant_type, quant_storage)
        packed, scales = filled(primitives.quantize_4bit, arguments, out=out, absmax=absmax)
    offset, state2 = None, None
    if compress_statistics:
        scales, offset, state2 = quantize_absmax(scales)
    code = _codebook(quant_type, A.device)
    return packed, QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to ``nf4``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to ``fp4``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def _is_transposed(packed: Tensor) -> bool:
    """A packed weight is a column; callers hand it over as a row (``weight.t()``) to say "transposed"."""
    return packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] != 1


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Undo :func:`quantize_4bit`.

    Args:
        A: the packed codes; as a row (``packed.t()``) they give the transposed result.
        quant_state: what :func:`quantize_4bit` returned; or instead of it
        absmax, out, blocksize, quant_type: the f32 scales, and a tensor of the result's shape and dtype.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    dtype: Any
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("quant_state: expected a QuantState, or absmax and out in its place, got None")
        check_float("out", out)
        blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        weight, dtype = Weight4bit(A, out.shape, absmax, blocksize, quant_type), out.dtype
    else:
        weight = weight_4bit(A, quant_state)
        dtype = dtype_of("out", out, quant_state.dtype)
    result = primitives.dequantize_4bit(weight, dtype, out=out)
    return result.t() if _is_transposed(A) and result.dim() == 2 else result


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` from ``nf4``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` from ``fp4``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8 bits per element in blocks (8-bit Optimizers, section 2.1).

    Args:
        A: any shape, f32, f16 or bf16.
        code: f32[256], ascending; None for the signed dynamic map.
        absmax, out: receive the scales, f32[ceil(n / blocksize)], and the codes, u8 in A's shape.
        blocksize: any; what is no power of two from 32 to 4096 costs a copy.
        nested: quantize the scales to 8 bits as well.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("nested", nested)
    code = _code_on(A.device, code)
    if not _is_power_of_two(blocksize):
        codes, scales = block_sizes.quantize_blockwise(A, code, blocksize)
        codes, scales = _copied_into("out", codes, out), _copied_into("absmax", scales, absmax)
    elif out is None and absmax is None:
        codes, scales = primitives.quantize_blockwise(A, code, blocksize)
    else:
        codes, scales = filled(primitives.quantize_blockwise, (A, code, blocksize), out=out, absmax=absmax)
    offset, state2 = None, None
    if nested:
        scales, offset, state2 = quantize_absmax(scales)
    return codes, QuantState(scales, A.shape, code, blocksize, dtype=A.dtype, offset=offset, state2=state2)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Undo :func:`quantize_blockwise`.

    Args:
        A: codes, u8, any shape.
        quant_state: what :func:`quantize_blockwise` returned; or instead of it
        absmax, code, blocksize: the f32 scales, the codebook (None for the signed dynamic map), the block size.
        out: receives the result and gives its dtype; without it, the quant state's dtype or f32.
        nested: read from the quant state.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("nested", nested)
    dtype = torch.float32
    if quant_state is not None:
        absmax, code, blocksize = dequantize_absmax(quant_state), quant_state.code, quant_state.blocksize  # type: ignore[assignment]
        dtype = quant_state.dtype or dtype
    elif absmax is None:
        raise ValueError("quant_state: expected a QuantState, or absmax in its place, got None")
    code = _code_on(A.device, code)
    dtype = dtype_of("out", out, dtype)
    if _is_power_of_two(blocksize):
        return primitives.dequantize_blockwise(A, absmax, code, blocksize, dtype, out=out)
    return _copied_into("out", block_sizes.dequantize_blockwise(A, absmax, code, blocksize, dtype), out)


def _is_power_of_two(blocksize: object) -> bool:
    """Whether the primitives take blocks of this size."""
    return isinstance(blocksize, int) and blocksize in BLOCKSIZES


def _copied_into(name: str, result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in the caller's tensor where there is one."""
    if out is None:
        return result
    check_dtype(name, out, (result.dtype,))
    check_shape(name, out, result.shape)
    return out.copy_(result)


_CODEBOOKS = {"dynamic": create_dynamic_map(), **{name: get_4bit_type(name) for name in QUANT_TYPES}}
_codebooks_on_devices: dict[tuple[str, torch.device], Tensor] = {}


def _codebook(name: str, device: torch.device) -> Tensor:
    """A copy of a codebook for the caller to keep."""
    if torch.compiler.is_compiling():
        return _CODEBOOKS[name].to(device, copy=True)
    key = (name, device)
    code = _codebooks_on_devices.get(key)
    if code is None:
        code = _codebooks_on_devices[key] = _CODEBOOKS[name].to(device)
    return code.clone()

"""Blockwise quantization (docs/SPEC.md section 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnb_core.codebooks import get_4bit_type

SMALLEST_NORMAL = 2.0**-126
NF4_ZERO = 7
FP4_SIGN = 8


def _blocks(flat: Tensor, blocksize: int) -> Tensor:
    """[n] to [blocks, blocksize]; zeros, which change no absmax, fill the last block."""
    return pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def _scaled(A: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each element over its block's absmax, f32[n]; the absmax to store; and which elements' blocks have a usable one.

    A zero or subnormal block stores 0, one with a NaN stores NaN, else one with an infinity stores infinity.
    """
    blocks = _blocks(A.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1)
    absmax = torch.where(absmax < SMALLEST_NORMAL, 0.0, absmax)
    usable = (absmax > 0) & absmax.isfinite()
    scaled = blocks * (1.0 / torch.where(usable, absmax, 1.0))[:, None]
    n = A.numel()
    return scaled.view(-1)[:n], absmax, usable[:, None].expand_as(blocks).reshape(-1)[:n]


def _nearest(values: Tensor, code: Tensor) -> Tensor:
    """The index of the nearest entry of an ascending codebook, a tie going to the lower one."""
    midpoints = (code[:-1] + code[1:]) * 0.5
    return torch.bucketize(values.contiguous(), midpoints.contiguous(), right=False)


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if A.numel() == 0:
        return torch.empty_like(A, dtype=torch.uint8), A.new_empty(0, dtype=torch.float32)
    scaled, absmax, usable = _scaled(A, blocksize)
    zero = code.abs().argmin()
    return torch.where(usable, _nearest(scaled, code), zero).to(torch.uint8).view(A.shape), absmax


def _scales_per_element(absmax: Tensor, blocksize: int, n: int) -> Tensor:
    return absmax.view(-1).repeat_interleave(blocksize)[:n]


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    values = code[A.reshape(-1).long()] * _scales_per_element(absmax, blocksize, A.numel())
    return values.to(dtype).view(A.shape)


def _fp4_codes(scaled: Tensor) -> Tensor:
    """Sign in bit 3, nearest magnitude below: its codebook is not ascending, so look up a sorted one."""
    magnitudes, index = get_4bit_type("fp4", scaled.device)[:FP4_SIGN].sort()
    return index[_nearest(scaled.abs(), magnitudes)] + FP4_SIGN * (scaled < 0)


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    if A.numel() == 0:
        return A.new_empty((0, 1), dtype=quant_storage), A.new_empty(0, dtype=torch.float32)
    scaled, absmax, usable = _scaled(A, blocksize)
    if quant_type == "nf4":
        codes, zero = _nearest(scaled, get_4bit_type("nf4", A.device)), NF4_ZERO
    else:
        codes, zero = _fp4_codes(scaled), 0
    codes = torch.where(usable, codes, zero).to(torch.uint8)
    high, low = pad(codes, (0, codes.numel() % 2), value=zero).view(-1, 2).unbind(1)
    packed = high << 4 | low
    return pad(packed, (0, -packed.numel() % quant_storage.itemsize)).view(quant_storage).unsqueeze(1), absmax


def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> Tensor:
    if nested_absmax is not None and nested_code is not None and offset is not None:
        absmax = dequantize_blockwise(absmax, nested_absmax, nested_code, nested_blocksize, torch.float32) + offset
    n = math.prod(shape)
    packed = A.contiguous().view(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    values = get_4bit_type(quant_type, A.device)[codes.long()] * _scales_per_element(absmax, blocksize, n)
    return values.to(dtype).view(tuple(shape))

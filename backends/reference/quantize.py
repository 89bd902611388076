"""Blockwise quantization (docs/SPEC.md section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnb_core.formats import FORMATS, Encoder, Format4bit
from bnb_core.records import Weight4bit

SMALLEST_NORMAL = 2.0**-126
SIGN = 8
"""The bit of a code that is its sign, in a format that has one."""


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


def _codebook(format: Format4bit, device: torch.device) -> Tensor:
    return torch.tensor(format.codebook, dtype=torch.float32, device=device)


def _nearest_4bit(scaled: Tensor, format: Format4bit) -> Tensor:
    """The code of the nearest value, a tie going to the lower one or, with a sign, to the smaller magnitude."""
    code = _codebook(format, scaled.device)
    if format.encoder is Encoder.NEAREST:
        return _nearest(scaled, code)
    magnitudes, codes = code[:SIGN].sort()
    return codes[_nearest(scaled.abs(), magnitudes)] + SIGN * (scaled < 0)


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    if A.numel() == 0:
        return A.new_empty((0, 1), dtype=quant_storage), A.new_empty(0, dtype=torch.float32)
    format = FORMATS[quant_type]
    scaled, absmax, usable = _scaled(A, blocksize)
    codes = torch.where(usable, _nearest_4bit(scaled, format), format.zero).to(torch.uint8)
    high, low = pad(codes, (0, codes.numel() % 2), value=format.zero).view(-1, 2).unbind(1)
    packed = high << 4 | low
    return pad(packed, (0, -packed.numel() % quant_storage.itemsize)).view(quant_storage).unsqueeze(1), absmax


def block_scales(weight: Weight4bit) -> Tensor:
    """f32, whether they were quantized or not."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.offset is None:
        return weight.absmax
    nested = (weight.nested_absmax, weight.nested_code, weight.nested_blocksize)
    return dequantize_blockwise(weight.absmax, *nested, torch.float32) + weight.offset


def dequantize_4bit(A: Weight4bit, dtype: torch.dtype) -> Tensor:
    n = math.prod(A.shape)
    packed = A.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    values = _codebook(FORMATS[A.quant_type], packed.device)[codes.long()]
    scales = _scales_per_element(block_scales(A), A.blocksize, n)
    return (values * scales).to(dtype).view(tuple(A.shape))

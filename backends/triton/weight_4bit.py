"""A 4-bit weight as kernels take it, and the scales of its blocks, double-quantized or not (docs/SPEC.md section 2)."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core.records import Weight4bit


@triton.jit
def block_scales(block, inside, absmax, nested_absmax, nested_code, offset, NESTED_BLOCKSIZE: tl.constexpr):
    """The f32 scales of blocks of weights; 0 or the offset for those that are not inside."""
    if nested_absmax is None:
        return tl.load(absmax + block, mask=inside, other=0.0)
    else:
        codes = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scales = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        return tl.load(nested_code + codes) * scales + tl.load(offset)


def tensors_of(weight: Weight4bit) -> tuple[Tensor | None, ...]:
    """The packed bytes, absmax, nested_absmax, nested_code and offset."""
    _, *scales = weight.tensors()
    return weight.packed.view(-1).view(torch.uint8), *scales


def constants_of(weight: Weight4bit) -> dict[str, Any]:
    return {
        "QUANT_TYPE": weight.quant_type,
        "BLOCKSIZE": weight.blocksize,
        "NESTED_BLOCKSIZE": weight.nested_blocksize,
    }

"""The scales of the blocks of a 4-bit tensor, double-quantized or not (docs/SPEC.md section 2)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_scales(block, inside, absmax, nested_absmax, nested_code, offset, NESTED_BLOCKSIZE: tl.constexpr):
    """The f32 scales of blocks of weights; 0 or the offset for those that are not inside."""
    if nested_absmax is None:
        return tl.load(absmax + block, mask=inside, other=0.0)
    else:
        codes = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scales = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=inside, other=0.0)
        return tl.load(nested_code + codes) * scales + tl.load(offset)

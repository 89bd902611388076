"""8-bit quantization in blocks of any size, by the primitives, which take powers of two from 32 to 4096.

Checkpoints and optimizers of others hold such blocks. The results are those of docs/SPEC.md section 2, to the bit; the
inputs are copied into the primitives' blocks first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnb_core import primitives
from bnb_core.checks import BLOCKSIZES, check_any_blocksize, check_code, check_dtype, check_float, check_numel
from bnb_core.primitives import block_count


def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """:data:`bnb_core.primitives.quantize_blockwise` for a block size that it does not take.

    Each block is cut into rows, and each row begins with the block's largest magnitude: so all have its scale.
    """
    check_float("A", A)
    check_code("code", code)
    check_any_blocksize(blocksize)
    n, blocks = A.numel(), block_count(A.numel(), blocksize)
    if n == 0:
        return primitives.quantize_blockwise(A, code, BLOCKSIZES[0])
    blocksize = min(blocksize, n)
    row = _least_that_holds(blocksize + 1)
    rows = block_count(blocksize, row - 1)
    values = pad(A.reshape(-1), (0, blocks * blocksize - n)).view(blocks, blocksize)
    largest = values.abs().amax(dim=1, keepdim=True)
    values = pad(values, (0, rows * (row - 1) - blocksize)).view(blocks, rows, row - 1)
    values = torch.cat([largest[:, None].expand(-1, rows, -1), values], dim=2)
    codes, absmax = primitives.quantize_blockwise(values, code, row)
    codes = codes[:, :, 1:].reshape(blocks, -1)[:, :blocksize].reshape(-1)[:n]
    return codes.reshape(A.shape), absmax.view(blocks, rows)[:, 0].contiguous()


def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """:data:`bnb_core.primitives.dequantize_blockwise` for a block size that it does not take."""
    check_dtype("A", A, (torch.uint8,))
    check_dtype("absmax", absmax, (torch.float32,))
    check_any_blocksize(blocksize)
    n, blocks = A.numel(), block_count(A.numel(), blocksize)
    check_numel("absmax", absmax, blocks)
    blocksize = min(blocksize, max(n, 1))
    row = _least_that_holds(blocksize)
    rows = block_count(blocksize, row)
    codes = pad(A.reshape(-1), (0, blocks * blocksize - n)).view(blocks, blocksize)
    codes = pad(codes, (0, rows * row - blocksize))
    values = primitives.dequantize_blockwise(codes, absmax.view(-1).repeat_interleave(rows), code, row, dtype)
    return values[:, :blocksize].reshape(-1)[:n].reshape(A.shape)


def _least_that_holds(count: int) -> int:
    """The least block size of the primitives for so many elements, or the largest there is."""
    return next((size for size in BLOCKSIZES if size >= count), BLOCKSIZES[-1])

"""A format of your own: 256 values that fit your data, found by k-means, in blocks with a scale each.

Run it with `python examples/own_codebook.py`; it takes some seconds. Values that are never negative, such as some
activations, waste half of the codes of a signed codebook. One that is made for them does not. A new 4-bit format with
kernels of its own is a row of a table: CONTRIBUTING.md says which.
"""

from __future__ import annotations

import torch

import bnb_core as bnb

BLOCKSIZE = 256


def scaled(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each value over the largest magnitude of its block, and by how much its squared error counts."""
    blocks = values.view(-1, BLOCKSIZE)
    scales = blocks.abs().amax(1, keepdim=True)
    return (blocks / scales).flatten(), scales.square().expand_as(blocks).flatten()


def fitted_codebook(values: torch.Tensor, weights: torch.Tensor, rounds: int = 20) -> torch.Tensor:
    """256 ascending values, each the mean of what is nearest to it (Lloyd's algorithm), with 0 among them."""
    code = torch.linspace(float(values.min()), float(values.max()), 256)
    for _ in range(rounds):
        nearest = torch.bucketize(values, (code[1:] + code[:-1]) / 2)
        sums = torch.zeros(256, dtype=torch.float64).index_add_(0, nearest, (weights * values).double())
        totals = torch.zeros(256, dtype=torch.float64).index_add_(0, nearest, weights.double())
        code = torch.where(totals > 0, sums / totals, code).float()
    code[code.abs().argmin()] = 0.0
    return code.sort().values


def sqnr(values: torch.Tensor, code: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    codes, state = bnb.functional.quantize_blockwise(values, code=code, blocksize=BLOCKSIZE)
    error = bnb.functional.dequantize_blockwise(codes, state) - values
    return 10 * torch.log10(values.square().sum() / error.square().sum()).item()


def main() -> None:
    torch.manual_seed(0)
    values = torch.distributions.Exponential(1.0).sample((BLOCKSIZE * 4096,))
    codebooks = {
        "dynamic": bnb.functional.create_dynamic_map(),
        "linear": bnb.functional.create_linear_map(),
        "fitted": fitted_codebook(*scaled(values)),
    }
    for name, code in codebooks.items():
        print(f"{name}: {sqnr(values, code):.1f} dB")


if __name__ == "__main__":
    main()

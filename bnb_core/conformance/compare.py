"""The rules by which a result is right: the same bits, or within a bound that docs/SPEC.md states."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnb_core.conformance.case import Failure
from bnb_core.conformance.oracle import F64

MATMUL_U = {torch.float32: 0.0, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}
"""u of section 3."""

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The largest relative error of one rounding to the dtype, for results that are normal in it."""

SUBNORMAL_ROUNDOFF = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""The largest error of one rounding to the dtype, for results that are not."""


def _bits(tensor: Tensor) -> Tensor:
    """An integer view in which every NaN looks alike: their payloads are nobody's promise."""
    if not tensor.is_floating_point():
        return tensor
    canonical = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor).contiguous()
    return canonical.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def same_bits(what: str, got: Tensor, expected: Tensor | NDArray) -> None:
    """Raise Failure where the two differ in dtype, shape or any bit."""
    expected = torch.as_tensor(expected)
    if got.dtype != expected.dtype or got.shape != expected.shape:
        raise Failure(f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {got.dtype} {tuple(got.shape)}")
    differing = (_bits(got) != _bits(expected)).flatten().nonzero().flatten()
    if len(differing):
        first = int(differing[0])
        raise Failure(
            f"{what}: {len(differing)} of {got.numel()} elements differ, first at {first}: "
            f"expected {expected.flatten()[first].item()!r}, got {got.flatten()[first].item()!r}"
        )


def within(what: str, got: NDArray, expected: F64, bound: F64) -> None:
    """Raise Failure where |got - expected| exceeds the bound, or one is not finite and the other not the same."""
    got = np.asarray(got, dtype=np.float64)
    if got.shape != expected.shape:
        raise Failure(f"{what}: expected shape {expected.shape}, got {got.shape}")
    finite = np.isfinite(expected)
    with np.errstate(invalid="ignore"):
        wrong = np.where(
            finite,
            ~(np.abs(got - expected) <= bound),
            ~((got == expected) | (np.isnan(got) & np.isnan(expected))),
        )
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        allowed = np.broadcast_to(bound, expected.shape)[first]
        raise Failure(
            f"{what}: {int(wrong.sum())} of {wrong.size} outside the bound, first at {first}: "
            f"expected {expected[first]:.9g} within {allowed:.3g}, got {got[first]:.9g}"
        )


def matmul_bound(dtype: torch.dtype, K: int, magnitude: F64, result: F64, inputs: F64 | float = 0.0) -> F64:
    """Section 3.

    Args:
        magnitude: the sum of |a_k w_k| of each result, with |bias| as one of the terms.
        inputs: the sum of |a_k|; it counts where weights are so small that the dtype has fewer digits for them.
    """
    u = MATMUL_U[dtype]
    subnormal = SUBNORMAL_ROUNDOFF[dtype] * (1.0 + inputs)
    return (u + 2.0**-22 * np.sqrt(K)) * magnitude + u * np.abs(result) + subnormal


def near_product(got: Tensor, A: Tensor, W: F64, bias: Tensor | None = None) -> None:
    """Raise Failure where ``A @ W + bias`` is further off than section 3 allows a result in A's dtype.

    Where the product is not finite, the result must not be either.
    """
    a, result = A.double().numpy(), got.double().numpy()
    with np.errstate(all="ignore"):
        expected, magnitude = a @ W, np.abs(a) @ np.abs(W)
        if bias is not None:
            expected, magnitude = expected + bias.double().numpy(), magnitude + np.abs(bias.double().numpy())
        inputs = np.abs(a).sum(axis=-1, keepdims=a.ndim > 1)
        bound = matmul_bound(A.dtype, a.shape[-1], magnitude, expected, inputs)
    finite = np.isfinite(expected)
    if not np.array_equal(np.isfinite(result), finite):
        raise Failure("a value that is not finite did not stay in its row, or got lost")
    within("result", np.where(finite, result, expected), expected, bound)

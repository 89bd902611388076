"""Products with a 4-bit weight, not differentiable."""

from __future__ import annotations

from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import check_dense, check_flag
from bnb_core.quant_state import QuantState, weight_4bit


def gemm_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``A @ dequantized(B)^T + bias``, not differentiable: A [..., K], B packed, bias [N] or None. Result [..., N]."""
    return primitives.gemm_4bit(A, weight_4bit(B, quant_state), bias, out=out)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """``A @ dequantized(B)^T`` for one row: A [..., K] of K elements, B packed [N, K]. Result [..., N] in A's dtype.

    Raises:
        TypeError, ValueError: no state, more than one row, or a transposition asked for.
    """
    if transposed_A is not False or transposed_B is not False:
        _check_not_transposed("transposed_A", transposed_A)
        _check_not_transposed("transposed_B", transposed_B)
    try:
        shape = A.shape
        one_row = len(shape) > 0 and A.numel() == shape[-1]
    except (AttributeError, RuntimeError, TypeError):
        check_dense("A", A)
        raise
    if not one_row:
        raise ValueError(f"A: expected one row, got shape {tuple(A.shape)}; matmul_4bit takes more")
    return primitives.gemm_4bit(A, weight_4bit(B, state, "state"), None, out=out)  # type: ignore[arg-type]


def _check_not_transposed(name: str, transposed: bool) -> None:
    check_flag(name, transposed)
    if transposed:
        raise ValueError(f"{name}: expected False, got True; B is always taken as [N, K]")

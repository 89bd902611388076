"""Products with 4-bit weights, one or a stack of them, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bnb_core.checks import check_dimensions, check_dtype, check_float, check_shape, check_sizes
from bnb_core.primitive import Out, primitive
from bnb_core.primitives.blockwise import check_weight
from bnb_core.primitives.shapes import check_columns
from bnb_core.records import Weight4bit


@primitive("(Tensor A, Weight4bit B, Tensor? bias) -> Tensor", differentiable=True)
def gemm_4bit(A: Tensor, B: Weight4bit, bias: Tensor | None) -> Out:
    """``A @ dequantized(B)^T + bias`` in A's dtype, accumulated in f32 or wider; one row of A is the gemv.

    Args:
        A: [..., K], f32, f16 or bf16.
        B: the weight [N, K].
        bias: [N] in A's dtype, or None.
    """
    check_float("A", A)
    N, K = _check_matrix("B", B)
    check_columns("A", A, K, B.shape)
    if bias is not None:
        check_dtype("bias", bias, (A.dtype,))
        check_shape("bias", bias, (N,))
    return Out((*A.shape[:-1], N), A.dtype)


def _check_matrix(name: str, weight: Weight4bit) -> tuple[int, int]:
    """(N, K) of a packed weight."""
    check_sizes("shape", weight.shape)
    if len(weight.shape) != 2:
        raise ValueError(f"shape: expected (N, K), got {tuple(weight.shape)}")
    check_weight(name, weight)
    N, K = weight.shape
    return N, K


@primitive("(Tensor dY, Weight4bit B) -> Tensor", differentiable=True)
def gemm_4bit_backward(dY: Tensor, B: Weight4bit) -> Out:
    """The gradient of :data:`gemm_4bit`'s A: ``dY @ dequantized(B)`` in dY's dtype, accumulated in f32 or wider.

    Args:
        dY: [..., N], f32, f16 or bf16.
        B: the weight [N, K].
    """
    check_float("dY", dY)
    N, K = _check_matrix("B", B)
    check_columns("dY", dY, N, B.shape)
    return Out((*dY.shape[:-1], K), dY.dtype)


def _check_stack(weight: Weight4bit, offsets: Tensor) -> tuple[int, int, int]:
    """(E, N, K) of a stack of packed weights, none of whose blocks reaches into the next."""
    check_sizes("shape", weight.shape)
    if len(weight.shape) != 3 or weight.shape[0] == 0:
        raise ValueError(f"shape: expected (E, N, K) with E of 1 or more, got {tuple(weight.shape)}")
    check_weight("B", weight)
    E, N, K = weight.shape
    if N * K % weight.blocksize != 0:
        raise ValueError(
            f"blocksize: expected one that divides the {N * K} elements of a weight of shape {(N, K)}, "
            f"got {weight.blocksize}"
        )
    check_dtype("offsets", offsets, (torch.int32,))
    check_shape("offsets", offsets, (E + 1,))
    return E, N, K


@primitive("(Tensor A, Weight4bit B, Tensor offsets, Tensor? bias) -> Tensor", differentiable=True)
def grouped_gemm_4bit(A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None) -> Out:
    """:data:`gemm_4bit` with a weight for each of several groups of rows, as the experts of a mixture have them.

    Args:
        A: [T, K], f32, f16 or bf16: the rows of group 0, then those of group 1, and so on.
        B: the weights, stacked: [E, N, K]. The block size divides N * K, so that no block reaches into two weights.
        offsets: i32[E + 1], ascending from 0 to T: group e has rows offsets[e] to offsets[e + 1]. The host reads them
            only where they are in its memory; elsewhere rows that no group has are left unwritten.
        bias: [E, N] in A's dtype, or None.

    Returns:
        [T, N] in A's dtype.
    """
    check_float("A", A)
    E, N, K = _check_stack(B, offsets)
    check_dimensions("A", A, 2)
    check_columns("A", A, K, B.shape)
    if bias is not None:
        check_dtype("bias", bias, (A.dtype,))
        check_shape("bias", bias, (E, N))
    return Out((A.shape[0], N), A.dtype)


@primitive("(Tensor dY, Weight4bit B, Tensor offsets) -> Tensor", differentiable=True)
def grouped_gemm_4bit_backward(dY: Tensor, B: Weight4bit, offsets: Tensor) -> Out:
    """The gradient of :data:`grouped_gemm_4bit`'s A: ``dY[m] @ dequantized(B[e])`` for each row m of a group e.

    Args:
        dY: [T, N], f32, f16 or bf16.
        B, offsets: as there.
    """
    check_float("dY", dY)
    _, N, K = _check_stack(B, offsets)
    check_dimensions("dY", dY, 2)
    check_columns("dY", dY, N, B.shape)
    return Out((dY.shape[0], K), dY.dtype)

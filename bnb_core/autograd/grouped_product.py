"""Products with a 4-bit weight for each group of rows, as the experts of a mixture have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bnb_core import primitives
from bnb_core.autograd.product_4bit import keep_weight, kept_weight
from bnb_core.autograd.rules import by_the_choice_of_the_forward, eager, needs_gradient, tangent, transforms
from bnb_core.primitive import NAMESPACE, goes_to_dispatcher, plain
from bnb_core.quant_state import QuantState, weight_4bit
from bnb_core.records import Weight4bit


def group_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """Which group each row belongs to, i64[rows], found without the host."""
    return torch.searchsorted(offsets[1:], torch.arange(rows, dtype=offsets.dtype, device=offsets.device), right=True)


def product(A: Tensor, weights: Weight4bit, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """``A[m] @ W[e]^T + bias[e]`` for the rows m of each group e; differentiable in A and bias."""
    if transforms():
        return _TransformedProduct.apply(A, *map(plain, weights), offsets, bias)
    if not needs_gradient(A, bias) or goes_to_dispatcher(A):
        return primitives.grouped_gemm_4bit(A, weights, offsets, bias)
    return _eager_product(A, bias, offsets, weights)


def untransposed_product(A: Tensor, weights: Weight4bit, offsets: Tensor) -> Tensor:
    """``A[m] @ W[e]``."""
    if transforms():
        return _TransformedUntransposedProduct.apply(A, *map(plain, weights), offsets)
    if not needs_gradient(A) or goes_to_dispatcher(A):
        return primitives.grouped_gemm_4bit_backward(A, weights, offsets)
    return _eager_untransposed_product(A, offsets, weights)


def _keep(ctx: Any, weights: Weight4bit, offsets: Tensor, bias: Tensor | None = None) -> None:
    keep_weight(ctx, weights, offsets)
    ctx.bias_shape = None if bias is None else bias.shape


@by_the_choice_of_the_forward
def _gradient_of_product(ctx: Any, dY: Tensor) -> Tensor:
    weights, offsets = kept_weight(ctx)
    return untransposed_product(dY, weights, offsets)


@by_the_choice_of_the_forward
def _gradient_of_untransposed(ctx: Any, gradient: Tensor) -> Tensor:
    weights, offsets = kept_weight(ctx)
    return product(gradient, weights, offsets, None)


def _gradient_of_bias(ctx: Any, dY: Tensor) -> Tensor:
    """The sum of each group's rows, in f32."""
    _, offsets = kept_weight(ctx)
    sums = torch.zeros(ctx.bias_shape, dtype=torch.float32, device=dY.device)
    return sums.index_add(0, group_of_rows(offsets, dY.shape[0]), dY.float()).to(dY.dtype)


class _Product(torch.autograd.Function):
    """For eager calls, which do without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, offsets: Tensor, weights: Weight4bit) -> Tensor:
        _keep(ctx, weights, offsets, bias)
        return primitives.grouped_gemm_4bit.run((A, weights, offsets, bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dY, needed = gradients[0], ctx.needs_input_grad
        dA = _gradient_of_product(ctx, dY) if needed[0] else None
        return dA, _gradient_of_bias(ctx, dY) if needed[1] else None, None, None


class _UntransposedProduct(torch.autograd.Function):
    """The same for ``A @ W``."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, offsets: Tensor, weights: Weight4bit) -> Tensor:
        _keep(ctx, weights, offsets)
        return primitives.grouped_gemm_4bit_backward.run((A, weights, offsets))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_of_untransposed(ctx, gradients[0]), None, None


_eager_product, _eager_untransposed_product = eager(_Product), eager(_UntransposedProduct)
_FIELDS = len(Weight4bit._fields)


def _each(
    function: Callable[..., Tensor], in_dims: Sequence[Any], A: Tensor, others: Sequence[Any], bias: Tensor | None
) -> tuple[Tensor, int]:
    """vmap's rule: one product after the other, as a batch of rows would have to be sorted by group anew."""
    of_A, *of_others, of_bias = in_dims
    if any(dim is not None for dim in tree_leaves(of_others)):
        raise NotImplementedError("torch.vmap over quantized weights or offsets is not possible, only over A and bias")
    batches = [None if dim is None or t is None else t.unbind(dim) for t, dim in ((A, of_A), (bias, of_bias))]
    count = len(next(batch for batch in batches if batch is not None))
    of_each = zip(*(batch or [tensor] * count for batch, tensor in zip(batches, (A, bias), strict=True)), strict=True)
    return torch.stack([function(a, *others, b) for a, b in of_each]), 0


class _TransformedProduct(torch.autograd.Function):
    """For torch.func and forward mode: of A, the weights' fields, the offsets and the bias."""

    @staticmethod
    def forward(A: Tensor, *others: Any) -> Tensor:
        *fields, offsets, bias = others
        return primitives.grouped_gemm_4bit(A, Weight4bit(*fields), offsets, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, *fields, offsets, bias = inputs
        _keep(ctx, Weight4bit(*fields), offsets, bias)
        ctx.rows = A.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dY, needed = gradients[0], ctx.needs_input_grad
        dA = _gradient_of_product(ctx, dY) if needed[0] else None
        return dA, *[None] * (_FIELDS + 1), _gradient_of_bias(ctx, dY) if needed[-1] else None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *others: Tensor | None) -> Tensor:
        weights, offsets = kept_weight(ctx)
        dbias = None if others[-1] is None else others[-1][group_of_rows(offsets, ctx.rows)]
        return tangent(dA, dbias, lambda dA: product(dA, weights, offsets, None))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor, *others: Any) -> tuple[Tensor, int]:
        return _each(_TransformedProduct.apply, in_dims, A, others[:-1], others[-1])


class _TransformedUntransposedProduct(torch.autograd.Function):
    """The same for ``A @ W``."""

    @staticmethod
    def forward(A: Tensor, *others: Any) -> Tensor:
        *fields, offsets = others
        return primitives.grouped_gemm_4bit_backward(A, Weight4bit(*fields), offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *fields, offsets = inputs
        _keep(ctx, Weight4bit(*fields), offsets)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_of_untransposed(ctx, gradients[0]), *[None] * (_FIELDS + 1)

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *others: None) -> Tensor:
        return untransposed_product(dA, *kept_weight(ctx))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor, *others: Any) -> tuple[Tensor, int]:
        def product_of(a: Tensor, *others: Any) -> Tensor:
            return _TransformedUntransposedProduct.apply(a, *others[:-1])

        return _each(product_of, (*in_dims, None), A, others, None)


# The same gradients for calls by way of torch's dispatcher, whose operators have the fields as arguments.
for _name, _function in (
    ("grouped_gemm_4bit", _TransformedProduct),
    ("grouped_gemm_4bit_backward", _TransformedUntransposedProduct),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _function.backward, setup_context=_function.setup_context)


def grouped_linear_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, offsets: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """A linear layer for each group of rows: ``A[m] @ W[e]^T + bias[e]``; differentiable in A and bias.

    Args:
        A: [T, K], f32, f16 or bf16: the rows of group 0, then those of group 1, and so on.
        B: the packed weights.
        quant_state: of B; its ``shape`` is (E, N, K), and its block size divides N * K.
        offsets: i32[E + 1] on A's device, ascending from 0 to T: group e has rows offsets[e] to offsets[e + 1].
        bias: [E, N] in A's dtype, or None.
        transposed: the weights are [E, K, N] instead: ``A[m] @ W[e] + bias[e]``.

    Returns:
        [T, N] in A's dtype.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    weights = weight_4bit(B, quant_state)
    if not transposed:
        return product(A, weights, offsets, bias)
    result = untransposed_product(A, weights, offsets)
    return result if bias is None else result + bias[group_of_rows(offsets, A.shape[0])]

"""``A @ W^T + bias`` and ``A @ W`` of a 4-bit weight: each is the other's gradient."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from bnb_core import primitives, registry
from bnb_core.autograd.rules import (
    asks_for_gradient,
    by_the_choice_of_the_forward,
    eager,
    living,
    of_batch,
    remember_choice,
    sum_to_bias,
    tangent,
    transforms,
    write_out,
)
from bnb_core.checks import check_dense, check_dtype, check_float, check_same_device, check_shape
from bnb_core.primitive import NAMESPACE, goes_to_dispatcher, plain, plain_codes
from bnb_core.quant_state import QuantState, check_quant_state, weight_4bit
from bnb_core.records import Weight4bit

_TENSORS = 5
"""Of a Weight4bit, absent ones among them."""


def product(A: Tensor, weight: Weight4bit, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``A @ W^T + bias``; ``out`` receives it, only where no gradient is wanted."""
    if transforms():
        result = _TransformedProduct.apply(A, *map(plain, weight), bias)
    elif not asks_for_gradient(A, bias):
        return primitives.gemm_4bit(A, weight, bias, out=out)
    elif goes_to_dispatcher(A):
        result = primitives.gemm_4bit(A, weight, bias)
    else:
        result = _eager_product(A, bias, weight)
    return write_out(result, out, A, bias)


def untransposed_product(A: Tensor, weight: Weight4bit) -> Tensor:
    """``A @ W``."""
    if transforms():
        return _TransformedUntransposedProduct.apply(A, *map(plain, weight))
    if not asks_for_gradient(A) or goes_to_dispatcher(A):
        return primitives.gemm_4bit_backward(A, weight)
    return _eager_untransposed_product(A, weight)


def keep_weight(ctx: Any, weight: Weight4bit, *others: Tensor) -> None:
    """Have ctx keep what the gradient needs: a weight, and further tensors."""
    remember_choice(ctx)
    ctx.weight = weight
    ctx.is_transformed = transforms()  # a gradient may be taken when they are over, and wrappers dead
    packed, *scales = weight.tensors()
    # A parameter would be kept as itself, and its data may be swapped while autograd waits.
    tensors = (plain(packed), *scales, *others)
    ctx.save_for_backward(*tensors)
    if ctx.is_transformed:
        ctx.save_for_forward(*tensors)


def kept_weight(ctx: Any) -> tuple[Any, ...]:
    """What :func:`keep_weight` has kept."""
    saved = living(ctx.saved_tensors) if ctx.is_transformed else ctx.saved_tensors
    return ctx.weight.with_tensors(saved[:_TENSORS]), *saved[_TENSORS:]


def _kept_weight(ctx: Any) -> Weight4bit:
    return kept_weight(ctx)[0]


@by_the_choice_of_the_forward
def gradient_of_product(ctx: Any, dY: Tensor) -> Tensor:
    """A's, of ``A @ W^T``."""
    return untransposed_product(dY, _kept_weight(ctx))


@by_the_choice_of_the_forward
def _gradient_of_untransposed(ctx: Any, dY: Tensor) -> Tensor:
    return product(dY, _kept_weight(ctx), None)


def _kept_for_later(ctx: Any, weight: Weight4bit) -> Weight4bit:
    """:func:`keep_weight` of an eager call; the same weight without a class of ours, which takes longer to look at."""
    ctx.backend_choice, ctx.weight, ctx.is_transformed = registry.chosen(), weight, False
    weight = weight.with_packed(plain_codes(weight.packed))
    ctx.save_for_backward(*weight.tensors())
    return weight


class _Product(torch.autograd.Function):
    """For eager calls, which do without torch's dispatcher.

    What torch does for each argument, at each call, it does not do for the weight in its tuple; nor does it bind them
    by their names, as where there is a ``setup_context``.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, weight: Weight4bit) -> Tensor:
        return primitives.gemm_4bit.run((A, _kept_for_later(ctx, weight), bias))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dY, needed = gradients[0], ctx.needs_input_grad
        dA = gradient_of_product(ctx, dY) if needed[0] else None
        return dA, sum_to_bias(dY) if needed[1] else None, None


class _UntransposedProduct(torch.autograd.Function):
    """The same for ``A @ W``."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, weight: Weight4bit) -> Tensor:
        return primitives.gemm_4bit_backward.run((A, _kept_for_later(ctx, weight)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_of_untransposed(ctx, gradients[0]), None


_eager_product, _eager_untransposed_product = eager(_Product), eager(_UntransposedProduct)
_FIELDS = len(Weight4bit._fields)


class _TransformedProduct(torch.autograd.Function):
    """For torch.func and forward mode: of A, the weight's fields, and the bias."""

    @staticmethod
    def forward(A: Tensor, *others: Any) -> Tensor:
        *weight, bias = others
        return primitives.gemm_4bit(A, Weight4bit(*weight), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep_weight(ctx, Weight4bit(*inputs[1:-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dY, needed = gradients[0], ctx.needs_input_grad
        dA = gradient_of_product(ctx, dY) if needed[0] else None
        return dA, *[None] * _FIELDS, sum_to_bias(dY) if needed[-1] else None

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *others: Tensor | None) -> Tensor:
        return tangent(dA, others[-1], lambda dA: product(dA, _kept_weight(ctx), None))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor, *others: Any) -> tuple[Tensor, int]:
        *weight, bias = others
        return of_batch(lambda A, bias: product(A, Weight4bit(*weight), bias), A, bias, in_dims, 1 + _FIELDS)


class _TransformedUntransposedProduct(torch.autograd.Function):
    """The same for ``A @ W``."""

    @staticmethod
    def forward(A: Tensor, *weight: Any) -> Tensor:
        return primitives.gemm_4bit_backward(A, Weight4bit(*weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep_weight(ctx, Weight4bit(*inputs[1:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_of_untransposed(ctx, gradients[0]), *[None] * _FIELDS

    @staticmethod
    def jvp(ctx: Any, dA: Tensor, *others: None) -> Tensor:
        return untransposed_product(dA, _kept_weight(ctx))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], A: Tensor, *weight: Any) -> tuple[Tensor, int]:
        return of_batch(lambda A, _: untransposed_product(A, Weight4bit(*weight)), A, None, in_dims, None)


# The same gradients for calls by way of torch's dispatcher, whose operators have the fields as arguments.
torch.library.register_autograd(
    f"{NAMESPACE}::gemm_4bit", _TransformedProduct.backward, setup_context=_TransformedProduct.setup_context
)
torch.library.register_autograd(
    f"{NAMESPACE}::gemm_4bit_backward",
    _TransformedUntransposedProduct.backward,
    setup_context=_TransformedUntransposedProduct.setup_context,
)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``A @ W^T + bias`` for a 4-bit weight W [N, K]; differentiable in A and bias.

    Args:
        A: [..., K], f32, f16 or bf16. Where N and K differ, [..., N] gives ``A @ W + bias`` and a DeprecationWarning:
            it stands for a linear layer whose weight was quantized as its transpose.
        B: the packed weight, whatever its shape or orientation.
        quant_state: of B; its ``shape`` is (N, K).
        out: receives the result; only where no gradient is wanted.
        bias: in A's dtype, or None.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    N, K = _weight_shape(quant_state)
    try:
        is_transposed = A.dim() > 0 and A.shape[-1] == N != K
    except (AttributeError, RuntimeError, TypeError):
        check_dense("A", A)
        raise
    if not is_transposed:
        return linear_4bit(A, B, quant_state, bias, out)
    check_float("A", A)
    check_dense("B", B)
    check_same_device([("A", A), ("B", B)])
    warnings.warn(_TRANSPOSED_WEIGHT.format(N=N, K=K), DeprecationWarning, stacklevel=2)
    if bias is not None:
        check_dtype("bias", bias, (A.dtype,))
        check_shape("bias", bias, (K,))
    result = untransposed_product(A, weight_4bit(B, quant_state))
    return write_out(result if bias is None else result + bias, out, A, bias)


def linear_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:func:`matmul_4bit` for A [..., K] alone: what a layer computes, whose input is never taken for another."""
    return product(A, weight_4bit(B, quant_state), bias, out)


_TRANSPOSED_WEIGHT = (
    "A has {N} columns, as many as the 4-bit weight [{N}, {K}] has rows: the result is A @ W. This use is deprecated. "
    "Re-quantize from the weight [out_features, in_features] of the linear layer, for A @ W^T"
)


def _weight_shape(quant_state: Any) -> tuple[int, int]:
    if not isinstance(quant_state, QuantState):
        check_quant_state("quant_state", quant_state)
    shape = quant_state.shape
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"quant_state: expected one of a 2-D weight, got shape {shape}")
    return shape[0], shape[1]

"""Differentiable matmuls with quantized weights. The weights are frozen; inputs and biases get their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from bnb_core import functional, primitives, registry
from bnb_core.checks import (
    check_dense,
    check_dtype,
    check_float,
    check_number,
    check_same_device,
    check_shape,
    check_tensor,
    renamed,
)
from bnb_core.primitive import NAMESPACE, aligned, goes_to_dispatcher
from bnb_core.quant_state import QuantState


def _sum_to_bias(dY: Tensor) -> Tensor:
    return dY.sum_to_size(dY.shape[-1])


def _aligned(dY: Tensor) -> Tensor:
    """Tensors of traced calls and of torch.func have no address."""
    return dY if goes_to_dispatcher(dY) else aligned(dY)


def _gemm_4bit_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (_, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, _, nested_absmax, nested_code, offset, nested) = inputs
    ctx.nested_blocksize = nested
    ctx.backend_choice = registry.choice()
    ctx.save_for_backward(B, absmax, nested_absmax, nested_code, offset)
    if _transforms():
        ctx.save_for_forward(B, absmax, nested_absmax, nested_code, offset)


def _gemm_4bit_backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """``dA = dY @ W`` and ``dbias = sum of dY``; the other nine arguments of gemm_4bit have no gradient."""
    needed = ctx.needs_input_grad
    dA = _gradient_of_input(ctx, dY) if needed[0] else None
    dbias = _sum_to_bias(dY) if needed[6] else None
    return dA, None, None, None, None, None, dbias, None, None, None, None


def _by_the_choice_of_the_forward(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Served by what ``use_backend`` named then, if it did: autograd runs in threads of its own."""

    @wraps(gradient)
    def call(ctx: Any, *arguments: Any) -> Tensor:
        if ctx.backend_choice is None:
            return gradient(ctx, *arguments)
        with registry.carry(ctx.backend_choice):
            return gradient(ctx, *arguments)

    return call


@_by_the_choice_of_the_forward
def _gradient_of_input(ctx: Any, dY: Tensor) -> Tensor:
    """``dY @ W``, by torch where that is to be differentiated in turn."""
    if torch.is_grad_enabled() or _transforms():
        return _aligned(dY) @ _dense_weight(ctx, dY.dtype)
    B, absmax, *nested = ctx.saved_tensors
    return primitives.gemm_4bit_backward(
        dY, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, *nested, ctx.nested_blocksize
    )


def _dense_weight(ctx: Any, dtype: torch.dtype) -> Tensor:
    B, absmax, *nested = _living(ctx.saved_tensors)
    return primitives.dequantize_4bit(
        B, absmax, ctx.blocksize, ctx.quant_type, ctx.shape, dtype, *nested, ctx.nested_blocksize
    )


torch.library.register_autograd(f"{NAMESPACE}::gemm_4bit", _gemm_4bit_backward, setup_context=_gemm_4bit_context)


class _Gemm4Bit(torch.autograd.Function):
    """The same gradient for eager calls, which do without torch's dispatcher.

    What torch does for each argument, at each call, it does not do for the weight in its tuple; nor does it bind them
    by their names, as where there is a ``setup_context``.
    """

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, arguments: tuple[Any, ...]) -> Tensor:
        """``arguments``: all of gemm_4bit's, these two included."""
        result = primitives.gemm_4bit(*arguments)
        _gemm_4bit_context(ctx, arguments, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dY, needed = gradients[0], ctx.needs_input_grad
        dA = _gradient_of_input(ctx, dY) if needed[0] else None
        return dA, _sum_to_bias(dY) if needed[1] else None, None


class _TransformedGemm4Bit(torch.autograd.Function):
    """The same for torch.func and forward mode."""

    forward = staticmethod(primitives.gemm_4bit)
    setup_context = staticmethod(_gemm_4bit_context)
    backward = staticmethod(_gemm_4bit_backward)

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *others: Tensor | None) -> Tensor:
        return _tangent(dA, others[5], lambda dtype: _dense_weight(ctx, dtype))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        A, *weight = arguments

        def product(A: Tensor, bias: Tensor | None) -> Tensor:
            return _TransformedGemm4Bit.apply(A, *weight[:5], bias, *weight[6:])

        return _of_batch(product, A, weight[5], in_dims, 6)


class _UntransposedGemm4Bit(torch.autograd.Function):
    """``A @ W``: the two products are each other's gradient."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, *weight: Any) -> Tensor:
        B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, nested_absmax, nested_code, offset, ctx.nested = weight
        ctx.backend_choice = registry.choice()
        ctx.save_for_backward(B, absmax, nested_absmax, nested_code, offset)
        return primitives.gemm_4bit_backward(A, *weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = gradients
        return _product_of_untransposed(ctx, dY), *[None] * 9


@_by_the_choice_of_the_forward
def _product_of_untransposed(ctx: Any, dY: Tensor) -> Tensor:
    B, absmax, *nested = ctx.saved_tensors
    arguments = (dY, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, None, *nested, ctx.nested)
    return _Gemm4Bit.apply(dY, None, arguments) if torch.is_grad_enabled() else primitives.gemm_4bit(*arguments)


def _transforms() -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def _living(saved: Sequence[Any]) -> list[Any]:
    """Saved tensors without the wrappers that torch.func has left around them."""
    return [None if tensor is None else unwrap_if_dead(tensor) for tensor in saved]


def _tangent(dA: Tensor | None, dbias: Tensor | None, dense_weight: Callable[[torch.dtype], Tensor]) -> Tensor:
    """Of ``A @ W^T + bias``, where at least one of the two has one."""
    if dA is None:
        return dbias  # type: ignore[return-value]
    product = dA @ dense_weight(dA.dtype).t()
    return product if dbias is None else product + dbias


def _of_batch(
    product: Callable[[Tensor, Tensor | None], Tensor],
    A: Tensor,
    bias: Tensor | None,
    in_dims: tuple[Any, ...],
    bias_place: int,
) -> tuple[Tensor, int]:
    """A linear layer's rule for vmap: a batch of A, of biases, or of both; weights have none.

    Args:
        product: of A and a bias.
        in_dims: where each argument of the function has its batch, A's first; None where it has none.
    """
    of_A, of_bias = in_dims[0], in_dims[bias_place]
    batches = [dim for dim in tree_leaves(in_dims) if dim is not None]
    if len(batches) > (of_A is not None) + (of_bias is not None):
        raise NotImplementedError("torch.vmap over quantized weights is not possible: they are one tensor of codes")
    if of_A is not None:
        A = A.movedim(of_A, 0)
    if bias is None or of_bias is None:
        return product(A, bias), 0
    bias = bias.movedim(of_bias, 0)
    y = product(A, None)
    rows = y.dim() - (1 if of_A is None else 2)
    return y + bias.view(len(bias), *[1] * rows, -1), 0


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Also for torch.func and forward-mode differentiation, whose rules the autograd functions have."""
    if _transforms():
        return True
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def _write_out(result: Tensor, out: Tensor | None, *inputs: Tensor | None) -> Tensor:
    if out is None:
        return result
    if _needs_gradient(*inputs):
        raise ValueError("out: cannot be given where a gradient is wanted; use torch.no_grad()")
    check_dtype("out", out, (result.dtype,))
    check_shape("out", out, result.shape)
    check_same_device([("the result", result), ("out", out)])
    return out.copy_(result)


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
    shape, *scales, _, nested_absmax, nested_code, offset, nested = functional.gemm_4bit_weight_arguments(
        quant_state, None
    )
    weight = (B, shape, *scales, nested_absmax, nested_code, offset, nested)
    product = _UntransposedGemm4Bit.apply if _needs_gradient(A, bias) else primitives.gemm_4bit_backward
    result = product(A, *weight)
    return _write_out(result if bias is None else result + bias, out, A, bias)


def linear_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:func:`matmul_4bit` for A [..., K] alone: what a layer computes, whose input is never taken for another."""
    arguments = (A, B, *functional.gemm_4bit_weight_arguments(quant_state, bias))
    if not _needs_gradient(A, bias):
        return primitives.gemm_4bit(*arguments, out=out)
    if _transforms():
        return _write_out(_TransformedGemm4Bit.apply(*arguments), out, A, bias)
    if goes_to_dispatcher(A):
        return _write_out(primitives.gemm_4bit(*arguments), out, A, bias)
    return _write_out(_Gemm4Bit.apply(A, bias, arguments), out, A, bias)


_TRANSPOSED_WEIGHT = (
    "A has {N} columns, as many as the 4-bit weight [{N}, {K}] has rows: the result is A @ W. This use is deprecated. "
    "Re-quantize from the weight [out_features, in_features] of the linear layer, for A @ W^T"
)


def _weight_shape(quant_state: Any) -> tuple[int, int]:
    if not isinstance(quant_state, QuantState):
        functional.check_quant_state("quant_state", quant_state)
    shape = quant_state.shape
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise ValueError(f"quant_state: expected one of a 2-D weight, got shape {shape}")
    return shape[0], shape[1]


@dataclass
class MatmulLtState:
    """The int8 weight of a layer and how it is used; modules and adapters read and set its attributes.

    Attributes of older releases (:attr:`_deprecated_fields`) read as None. All but CxB warn.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None

    # These are no arguments.
    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    use_pool = False
    # CB in a GPU's own layout, which no kernel here needs. vLLM reads it after each product.
    CxB = None
    _deprecated_fields = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})

    def __getattr__(self, name: str) -> None:
        if name not in self._deprecated_fields:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"MatmulLtState.{name} is deprecated and always None", FutureWarning, stacklevel=2)

    def reset_grads(self) -> None:
        """Forget the quantized weight: it is taken anew from the layer at the next forward."""
        self.CB = self.SCB = self.SB = self.CBt = self.SBt = None


class _Int8Linear(torch.autograd.Function):
    """A linear layer with an int8 weight [N, K]. ``weight`` is the weight it was quantized from, if it trains."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, weight: Tensor | None, threshold: float
    ) -> Tensor:
        ctx.backend_choice = registry.choice()
        ctx.save_for_backward(CB, SCB, A if weight is not None and weight.requires_grad else None)
        return _int8_product(A, CB, SCB, bias, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _int8_gradients(ctx, *gradients, *ctx.saved_tensors)


def _int8_gradients(ctx: Any, dY: Tensor, CB: Tensor, SCB: Tensor, A: Tensor | None) -> tuple[Tensor | None, ...]:
    """``dY @ W`` for A, the sum of dY for the bias and ``dY^T @ A`` for the weight; the others have none."""
    dA = dbias = dweight = None
    if ctx.needs_input_grad[0]:
        dA = _aligned(dY) @ _dense_int8_weight(ctx, CB, SCB).to(dY.dtype)
    if ctx.needs_input_grad[3]:
        dbias = _sum_to_bias(dY)
    if ctx.needs_input_grad[4]:
        rows = tuple(range(dY.dim() - 1))
        dweight = torch.tensordot(dY, A, (rows, rows))
    return dA, None, None, dbias, dweight, None


@_by_the_choice_of_the_forward
def _dense_int8_weight(ctx: Any, CB: Tensor, SCB: Tensor) -> Tensor:
    return primitives.int8_vectorwise_dequant(CB, SCB)


class _TransformedInt8Linear(torch.autograd.Function):
    """The same for torch.func and forward mode; it takes longer to call."""

    @staticmethod
    def forward(
        A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, weight: Tensor | None, threshold: float
    ) -> Tensor:
        return _int8_product(A, CB, SCB, bias, threshold)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, CB, SCB, _, weight, _ = inputs
        ctx.backend_choice = registry.choice()
        saved = (CB, SCB, A if weight is not None else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        return _int8_gradients(ctx, dY, *_living(ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *others: Tensor | None) -> Tensor:
        dbias, dweight = others[2:4]
        CB, SCB, A = ctx.saved_tensors
        tangent = None if dweight is None else A @ dweight.t()
        if dA is None and dbias is None and tangent is not None:
            return tangent
        of_others = _tangent(dA, dbias, lambda dtype: primitives.int8_vectorwise_dequant(CB, SCB).to(dtype))
        return of_others if tangent is None else of_others + tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        A, CB, SCB, bias, weight, threshold = arguments

        def product(A: Tensor, bias: Tensor | None) -> Tensor:
            if threshold == 0 or in_dims[0] is None:
                return _TransformedInt8Linear.apply(A, CB, SCB, bias, weight, threshold)
            # Each has outlier columns of its own.
            return torch.stack([_TransformedInt8Linear.apply(a, CB, SCB, bias, weight, threshold) for a in A])

        return _of_batch(product, A, bias, in_dims, 3)


def int8_linear(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float, weight: Tensor | None = None
) -> Tensor:
    """A linear layer with an int8 weight (LLM.int8(), section 3); differentiable in A, bias and ``weight``.

    Args:
        A: [..., K], f32, f16 or bf16, quantized row by row. CB: i8[N, K] with SCB f32[N]. bias: [N] in A's dtype.
        threshold: columns of A with an entry of at least this magnitude are multiplied in A's dtype; 0 for none.
        weight: what CB was quantized from, if it trains; None if it is frozen.
    """
    if weight is not None:
        check_tensor("weight", weight)
    if _needs_gradient(A, bias, weight):
        function = _TransformedInt8Linear if _transforms() else _Int8Linear
        return function.apply(A, CB, SCB, bias, weight, threshold)
    return _int8_product(A, CB, SCB, bias, threshold)


def _int8_product(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    try:
        return _int8_product_of(A, CB, SCB, bias, threshold)
    except (TypeError, ValueError) as error:
        raise renamed(error, {"B": "CB", "col_stats": "SCB"}) from error


def _int8_product_of(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    CA, row_stats, outlier_mask = primitives.int8_vectorwise_quant(A, threshold)
    if A.shape[-1] > primitives.MAX_INT8_INNER_SIZE:
        return _long_int8_product(A, CA, CB, row_stats, SCB, outlier_mask, bias)
    if threshold > 0:
        return primitives.int8_mixed_scaled_mm(A, CA, CB, row_stats, SCB, outlier_mask, bias)
    return primitives.int8_scaled_mm(CA, CB, row_stats, SCB, bias, A.dtype)


def _long_int8_product(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    row_stats: Tensor,
    SCB: Tensor,
    outlier_mask: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product in as many parts as i32 needs to hold their sums, added up in f32 and rounded once."""
    total: Any = 0.0 if bias is None else bias.float()
    for first in range(0, A.shape[-1], primitives.MAX_INT8_INNER_SIZE):
        columns = slice(first, first + primitives.MAX_INT8_INNER_SIZE)
        operands = CA[..., columns], CB[:, columns], row_stats, SCB
        if outlier_mask.numel() == 0:
            total = total + primitives.int8_scaled_mm(*operands, None, torch.float32)
        else:
            part = A[..., columns].float()
            total = total + primitives.int8_mixed_scaled_mm(part, *operands, outlier_mask[columns], None)
    return total.to(A.dtype)


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """``A @ B^T + bias`` by LLM.int8(); differentiable in A, bias and, where it trains, B.

    Args:
        A: [..., K], f32, f16 or bf16.
        B: the weight [N, K]: floating-point, then it is quantized at each call, or int8 with its scales in
            ``state.SCB``. With ``state.has_fp16_weights`` False, ``state.CB`` stands for it once it is set.
        out: receives the result; only where no gradient is wanted.
        threshold: of the outliers, if positive; else ``state.threshold`` holds.
        bias: [N] in A's dtype, or None.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_tensor("B", B)
    if state is None:
        state = MatmulLtState()
    elif not isinstance(state, MatmulLtState):
        raise TypeError(f"state: expected a MatmulLtState, got {type(state).__name__}")
    if type(threshold) is not float:
        check_number("threshold", threshold)
    if threshold > 0.0:
        state.threshold = threshold
    if state.has_fp16_weights:
        (CB, SCB), weight, names = _int8_rows(B), B, {"CB": "B"}
    else:
        (CB, SCB), weight, names = _int8_weight(B, state), None, {"CB": "state.CB", "SCB": "state.SCB"}
    try:
        result = int8_linear(A, CB, SCB, bias, state.threshold, weight)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from error
    return _write_out(result, out, A, bias, weight)


def _int8_rows(B: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's codes and the scales of its rows."""
    try:
        CB, SCB, _ = primitives.int8_vectorwise_quant(B, 0.0)
    except (TypeError, ValueError) as error:
        raise renamed(error, {"A": "B"}) from error
    return CB, SCB


def _int8_weight(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """The quantized weight of a layer that does not train it, made at its first use and kept in ``state``."""
    if state.CB is None and B.dtype == torch.int8:
        state.CB = B.detach()
    if state.CB is None:
        state.CB, state.SCB = _int8_rows(B.detach())
    if state.SCB is None:
        raise ValueError("state.SCB: the int8 weight has no scales; expected float32, one per row, got None")
    return state.CB, state.SCB

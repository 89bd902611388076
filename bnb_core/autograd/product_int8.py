"""LLM.int8() matmuls (arXiv 2208.07339), differentiable in the input, the bias and a weight that trains."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.autograd.rules import (
    asks_for_gradient,
    by_the_choice_of_the_forward,
    eager,
    living,
    needs_gradient,
    of_batch,
    remember_choice,
    sum_to_bias,
    tangent,
    transforms,
    write_out,
)
from bnb_core.checks import check_number, check_tensor, renamed
from bnb_core.primitive import NAMESPACE, aligned, goes_to_dispatcher
from bnb_core.records import Int8Rows, Int8Weight


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
        remember_choice(ctx)
        ctx.save_for_backward(CB, SCB, A if weight is not None and weight.requires_grad else None)
        return _int8_product(A, CB, SCB, bias, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _int8_gradients(ctx, *gradients, *ctx.saved_tensors)


_eager_int8_linear = eager(_Int8Linear)


def _int8_gradients(ctx: Any, dY: Tensor, CB: Tensor, SCB: Tensor, A: Tensor | None) -> tuple[Tensor | None, ...]:
    """``dY @ W`` for A, the sum of dY for the bias and ``dY^T @ A`` for the weight; the others have none."""
    dA = dbias = dweight = None
    if ctx.needs_input_grad[0]:
        dA = _gradient_of_input(ctx, dY, CB, SCB)
    if ctx.needs_input_grad[3]:
        dbias = sum_to_bias(dY)
    if ctx.needs_input_grad[4]:
        rows = tuple(range(dY.dim() - 1))
        dweight = torch.tensordot(dY, A, (rows, rows))
    return dA, None, None, dbias, dweight, None


@by_the_choice_of_the_forward
def _gradient_of_input(ctx: Any, dY: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    return _untransposed_product(dY, CB, SCB)


def _untransposed_product(dY: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``dY @ W``."""
    if not needs_gradient(dY) or (goes_to_dispatcher(dY) and not transforms()):
        return primitives.int8_linear_backward(dY, Int8Weight(CB, SCB))
    return _UntransposedInt8Product.apply(dY, CB, SCB)


def _dense_product(A: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
    """``A @ W^T`` of an A that is not quantized: the gradient of the gradient, and the tangent."""
    weight = primitives.int8_vectorwise_dequant(CB, SCB).to(A.dtype)
    # Tensors of traced calls and of torch.func have no address.
    return (A if goes_to_dispatcher(A) else aligned(A)) @ weight.t()


class _UntransposedInt8Product(torch.autograd.Function):
    """``dY @ W``, to be differentiated in turn."""

    @staticmethod
    def forward(dY: Tensor, CB: Tensor, SCB: Tensor) -> Tensor:
        return primitives.int8_linear_backward(dY, Int8Weight(CB, SCB))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, CB, SCB = inputs
        remember_choice(ctx)
        ctx.save_for_backward(CB, SCB)
        if transforms():
            ctx.save_for_forward(CB, SCB)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient_of_gradient(ctx, gradients[0]), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: None) -> Tensor:
        return _untransposed_product(tangent, *living(ctx.saved_tensors))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], dY: Tensor, CB: Tensor, SCB: Tensor) -> tuple[Tensor, int]:
        return of_batch(lambda dY, _: _untransposed_product(dY, CB, SCB), dY, None, in_dims, None)


@by_the_choice_of_the_forward
def _gradient_of_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    return _dense_product(gradient, *living(ctx.saved_tensors))


torch.library.register_autograd(
    f"{NAMESPACE}::int8_linear_backward",
    _UntransposedInt8Product.backward,
    setup_context=_UntransposedInt8Product.setup_context,
)


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
        remember_choice(ctx)
        saved = (CB, SCB, A if weight is not None else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        return _int8_gradients(ctx, dY, *living(ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, dA: Tensor | None, *others: Tensor | None) -> Tensor:
        dbias, dweight = others[2:4]
        CB, SCB, A = ctx.saved_tensors
        of_weight = None if dweight is None else A @ dweight.t()
        if dA is None and dbias is None and of_weight is not None:
            return of_weight
        of_others = tangent(dA, dbias, lambda dA: _dense_product(dA, CB, SCB))
        return of_others if of_weight is None else of_others + of_weight

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        A, CB, SCB, bias, weight, threshold = arguments

        def product(A: Tensor, bias: Tensor | None) -> Tensor:
            if threshold == 0 or in_dims[0] is None:
                return _TransformedInt8Linear.apply(A, CB, SCB, bias, weight, threshold)
            # Each has outlier columns of its own.
            return torch.stack([_TransformedInt8Linear.apply(a, CB, SCB, bias, weight, threshold) for a in A])

        return of_batch(product, A, bias, in_dims, 3)


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
    if transforms():
        return _TransformedInt8Linear.apply(A, CB, SCB, bias, weight, threshold)
    if not asks_for_gradient(A, bias, weight):
        return _int8_product(A, CB, SCB, bias, threshold)
    apply = _Int8Linear.apply if goes_to_dispatcher(A) else _eager_int8_linear
    return apply(A, CB, SCB, bias, weight, threshold)


def _int8_product(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    try:
        return _int8_product_of(A, CB, SCB, bias, threshold)
    except (TypeError, ValueError) as error:
        raise renamed(error, {"B": "CB", "col_stats": "SCB"}) from error


def _int8_product_of(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    CA, row_stats, outlier_mask = primitives.int8_vectorwise_quant(A, threshold)
    quantized, weight = Int8Rows(CA, row_stats), Int8Weight(CB, SCB)
    if A.shape[-1] > primitives.MAX_INT8_INNER_SIZE:
        return _long_int8_product(A, quantized, weight, outlier_mask, bias)
    if threshold > 0:
        return primitives.int8_mixed_scaled_mm(A, quantized, weight, outlier_mask, bias)
    return primitives.int8_scaled_mm(quantized, weight, bias, A.dtype)


def _long_int8_product(A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None) -> Tensor:
    """The product in as many parts as i32 needs to hold their sums, added up in f32 and rounded once."""
    total: Any = 0.0 if bias is None else bias.float()
    for first in range(0, A.shape[-1], primitives.MAX_INT8_INNER_SIZE):
        columns = slice(first, first + primitives.MAX_INT8_INNER_SIZE)
        operands = Int8Rows(CA.codes[..., columns], CA.row_stats), Int8Weight(CB.codes[:, columns], CB.col_stats)
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
        (CB, SCB), weight, names = int8_weight(B, state), None, {"CB": "state.CB", "SCB": "state.SCB"}
    try:
        result = int8_linear(A, CB, SCB, bias, state.threshold, weight)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from error
    return write_out(result, out, A, bias, weight)


def _int8_rows(B: Tensor) -> tuple[Tensor, Tensor]:
    """A weight's codes and the scales of its rows."""
    try:
        CB, SCB, _ = primitives.int8_vectorwise_quant(B, 0.0)
    except (TypeError, ValueError) as error:
        raise renamed(error, {"A": "B"}) from error
    return CB, SCB


def int8_weight(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """The quantized weight of a layer that does not train it, made at its first use and kept in ``state``."""
    if state.CB is None and B.dtype == torch.int8:
        state.CB = B.detach()
    if state.CB is None:
        state.CB, state.SCB = _int8_rows(B.detach())
    if state.SCB is None:
        raise ValueError("state.SCB: the int8 weight has no scales; expected float32, one per row, got None")
    return state.CB, state.SCB

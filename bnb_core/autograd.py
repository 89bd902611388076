"""Differentiable matmuls with quantized weights. The weights are frozen; inputs and biases get their gradients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bnb_core import functional, primitives, registry
from bnb_core.checks import check_dtype, check_float, check_same_device, check_shape, check_tensor
from bnb_core.primitive import NAMESPACE, aligned, goes_to_dispatcher
from bnb_core.quant_state import QuantState


def _sum_to_bias(dY: Tensor) -> Tensor:
    return dY.sum_to_size(dY.shape[-1])


def _aligned(dY: Tensor) -> Tensor:
    """While a call is traced there is no address."""
    return dY if goes_to_dispatcher(dY) else aligned(dY)


def _gemm_4bit_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (_, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, _, nested_absmax, nested_code, offset, nested) = inputs
    ctx.nested_blocksize = nested
    ctx.backend_choice = registry.choice()
    ctx.save_for_backward(B, absmax, nested_absmax, nested_code, offset)


def _gemm_4bit_backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """``dA = dY @ W`` and ``dbias = sum of dY``; the other nine arguments of gemm_4bit have no gradient."""
    dA = dbias = None
    if ctx.needs_input_grad[0]:
        with registry.carry(ctx.backend_choice):
            dA = _gradient_of_input(ctx, dY)
    if ctx.needs_input_grad[6]:
        dbias = _sum_to_bias(dY)
    return dA, None, None, None, None, None, dbias, None, None, None, None


def _gradient_of_input(ctx: Any, dY: Tensor) -> Tensor:
    """``dY @ W``, by torch where that is to be differentiated in turn."""
    B, absmax, nested_absmax, nested_code, offset = ctx.saved_tensors
    scales = (nested_absmax, nested_code, offset, ctx.nested_blocksize)
    if not torch.is_grad_enabled():
        return primitives.gemm_4bit_backward(dY, B, ctx.shape, absmax, ctx.blocksize, ctx.quant_type, *scales)
    return _aligned(dY) @ primitives.dequantize_4bit(
        B, absmax, ctx.blocksize, ctx.quant_type, ctx.shape, dY.dtype, *scales
    )


torch.library.register_autograd(f"{NAMESPACE}::gemm_4bit", _gemm_4bit_backward, setup_context=_gemm_4bit_context)


class _Gemm4Bit(torch.autograd.Function):
    """The same gradient for eager calls, which do without torch's dispatcher."""

    forward = staticmethod(primitives.gemm_4bit)
    setup_context = staticmethod(_gemm_4bit_context)
    backward = staticmethod(_gemm_4bit_backward)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    """Forward-mode differentiation counts: the autograd functions, which do not have it, then say so."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    check_tensor("A", A)
    check_tensor("B", B)
    N, K = _weight_shape(quant_state)
    check_float("A", A)
    if A.dim() == 0 or not A.shape[-1] == N != K:
        return linear_4bit(A, B, quant_state, bias, out)
    warnings.warn(_TRANSPOSED_WEIGHT.format(N=N, K=K), DeprecationWarning, stacklevel=2)
    if bias is not None:
        check_dtype("bias", bias, (A.dtype,))
        check_shape("bias", bias, (K,))
    result = A @ functional.dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
    return _write_out(result if bias is None else result + bias, out, A, bias)


def linear_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:func:`matmul_4bit` for A [..., K] alone: what a layer computes, whose input is never taken for another."""
    arguments = (A, B, *functional.gemm_4bit_weight_arguments(quant_state, bias))
    if not _needs_gradient(A, bias):
        return primitives.gemm_4bit(*arguments, out=out)
    if goes_to_dispatcher(A):
        return _write_out(primitives.gemm_4bit(*arguments), out, A, bias)
    return _write_out(_Gemm4Bit.apply(*arguments), out, A, bias)


_TRANSPOSED_WEIGHT = (
    "A has {N} columns, as many as the 4-bit weight [{N}, {K}] has rows: the result is A @ W. This use is deprecated. "
    "Re-quantize from the weight [out_features, in_features] of the linear layer, for A @ W^T"
)


def _weight_shape(quant_state: Any) -> tuple[int, int]:
    if quant_state is None:
        raise ValueError("quant_state: expected the QuantState of B, got None")
    if not isinstance(quant_state, QuantState):
        raise TypeError(f"quant_state: expected a QuantState, got {type(quant_state).__name__}")
    shape = quant_state.shape
    if shape is None or len(shape) != 2:
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
        (dY,) = gradients
        CB, SCB, A = ctx.saved_tensors
        dA = dbias = dweight = None
        if ctx.needs_input_grad[0]:
            with registry.carry(ctx.backend_choice):
                dA = _aligned(dY) @ primitives.int8_vectorwise_dequant(CB, SCB).to(dY.dtype)
        if ctx.needs_input_grad[3]:
            dbias = _sum_to_bias(dY)
        if ctx.needs_input_grad[4]:
            rows = tuple(range(dY.dim() - 1))
            dweight = torch.tensordot(dY, A, (rows, rows))
        return dA, None, None, dbias, dweight, None


def int8_linear(
    A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float, weight: Tensor | None = None
) -> Tensor:
    """A linear layer with an int8 weight (LLM.int8(), section 3); differentiable in A, bias and ``weight``.

    Args:
        A: [..., K], f32, f16 or bf16, quantized row by row. CB: i8[N, K] with SCB f32[N]. bias: [N] in A's dtype.
        threshold: columns of A with an entry of at least this magnitude are multiplied in A's dtype; 0 for none.
        weight: what CB was quantized from, if it trains; None if it is frozen.
    """
    if _needs_gradient(A, bias, weight):
        return _Int8Linear.apply(A, CB, SCB, bias, weight, threshold)
    return _int8_product(A, CB, SCB, bias, threshold)


def _int8_product(A: Tensor, CB: Tensor, SCB: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
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
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    weight = None
    if state.has_fp16_weights:
        weight = B
        CB, SCB, _ = primitives.int8_vectorwise_quant(B, 0.0)
    else:
        CB, SCB = _int8_weight(B, state)
    return _write_out(int8_linear(A, CB, SCB, bias, state.threshold, weight), out, A, bias, weight)


def _int8_weight(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """The quantized weight of a layer that does not train it, made at its first use and kept in ``state``."""
    if state.CB is None and B.dtype == torch.int8:
        state.CB = B.detach()
    if state.CB is None:
        state.CB, state.SCB, _ = primitives.int8_vectorwise_quant(B.detach(), 0.0)
    if state.SCB is None:
        raise ValueError("state.SCB: the int8 weight has no scales; expected float32, one per row, got None")
    return state.CB, state.SCB

"""``bitsandbytes._ops``: the operators ``torch.ops.bitsandbytes``, over the primitives.

Importing this module defines them, which one library in a process can do: so it is imported where bnb_core takes the
name bitsandbytes, and not before. Each is there for every device (CompositeExplicitAutograd), so that a kernel that
somebody registers for a device's own key goes before it. Wrong arguments are a RuntimeError that names the argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.library import register_fake, register_kernel

from bnb_core import functional, primitives
from bnb_core.autograd import product_4bit
from bnb_core.autograd.rules import sum_to_bias
from bnb_core.checks import QUANT_TYPES, check_dtype, check_dtype_argument, check_float, renamed
from bnb_core.codebooks import get_4bit_type
from bnb_core.compat.names import NAME
from bnb_core.quant_state import QuantState
from bnb_core.records import Int8Rows, Int8Weight, OptimizerState32bit, OptimizerStep, Weight4bit

__all__ = ["register_fake", "register_kernel"]

SMALLEST_BOUND = torch.finfo(torch.float32).tiny

_library = torch.library.Library(NAME, "DEF")


def operator(schema: str, out: bool = False, differentiable: bool = False) -> Callable[[Any], Any]:
    """Define the operator that a function computes, of tensors with values or without.

    Args:
        schema: in torch's schema language, without the name.
        out: it has an overload ``out`` as well, into a tensor that the function takes as ``out``.
        differentiable: a gradient is registered below; otherwise torch sees results that need none.
    """

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        _define(name, schema, _errors()(function), differentiable)
        if out:
            arguments = schema.partition(")")[0]
            _define(f"{name}.out", f"{arguments}, Tensor! out) -> ()", _errors()(_filling(function)), differentiable)
        return function

    return define


def _define(name: str, schema: str, function: Callable[..., Any], differentiable: bool) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    register_fake(f"{NAME}::{name}", function, lib=_library)
    if not differentiable:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _filling(function: Callable[..., Any]) -> Callable[..., None]:
    """The function with its ``out`` as the last argument, and no result."""

    def fill(*arguments: Any) -> None:
        function(*arguments[:-1], out=arguments[-1])

    return fill


@contextmanager
def _errors(**names: str) -> Iterator[None]:
    """Errors about arguments become RuntimeErrors; ``names`` are the operator's for those of a primitive."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RuntimeError(str(renamed(error, names))) from error


def _has_values(tensor: Tensor) -> bool:
    return not (tensor.is_meta or is_fake(tensor))


@operator("(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Codes u8 in A's shape, absmax f32[blocks]."""
    codes, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


@operator("(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor", out=True)
def dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """``dtype`` in A's shape."""
    if out is not None:
        check_dtype("out", out, (dtype,))
    state = QuantState(absmax, A.shape, code, blocksize, dtype=dtype)
    return functional.dequantize_blockwise(A, state, out=out)


@operator("(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Packed codes, absmax f32[blocks]."""
    return primitives.quantize_4bit(A, blocksize, quant_type, quant_storage)


@operator("(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor", out=True)
def dequantize_4bit(
    A: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``dtype`` in ``shape``; the scales are f32."""
    return primitives.dequantize_4bit(Weight4bit(A, shape, absmax, blocksize, quant_type), dtype, out=out)


@operator(
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    differentiable=True,
)
def gemm_4bit(*arguments: Any) -> Tensor:
    """``A @ dequantized(B)^T + bias`` in A's dtype.

    With double quantization ``absmax_8bit`` holds the codes of the scales, ``absmax`` the scales of these codes in
    blocks of 256, ``absmax_code`` their codebook and ``absmax_offset``, of any float dtype, their mean.
    """
    with _errors(shape="shapeB", nested_absmax="absmax", nested_code="absmax_code", offset="absmax_offset"):
        A, weight, bias = _arguments_of_gemm_4bit(*arguments)
        return primitives.gemm_4bit(A, weight, bias)


def _arguments_of_gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> tuple[Tensor, Weight4bit, Tensor | None]:
    """The primitive's arguments."""
    if absmax_8bit is None:
        return A, Weight4bit(B, shapeB, absmax, blocksize, quant_type, None, absmax_code, absmax_offset), bias
    check_dtype("absmax_8bit", absmax_8bit, (torch.uint8,))
    offset = absmax_offset if absmax_offset is None else absmax_offset.float()
    return A, Weight4bit(B, shapeB, absmax_8bit, blocksize, quant_type, absmax, absmax_code, offset), bias


def _gemm_4bit_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _ = _arguments_of_gemm_4bit(*inputs)
    product_4bit.keep_weight(ctx, weight)


def _gemm_4bit_backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    dA = product_4bit.gradient_of_product(ctx, dY) if ctx.needs_input_grad[0] else None
    dbias = sum_to_bias(dY) if ctx.needs_input_grad[6] else None
    return dA, *[None] * 5, dbias, None, None, None


torch.library.register_autograd(
    f"{NAME}::gemm_4bit", _gemm_4bit_backward, setup_context=_gemm_4bit_context, lib=_library
)


@operator("(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor", out=True)
def gemv_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    out: Tensor | None = None,
) -> Tensor:
    """``A @ dequantized(B)^T`` in A's dtype, for the 4-bit type whose codebook ``code`` is."""
    with _errors(shape="shapeB"):
        weight = Weight4bit(B, shapeB, absmax, blocksize, _quant_type_of(code))
        return primitives.gemm_4bit(A, weight, None, out=out)


def _quant_type_of(code: Tensor) -> str:
    """The 4-bit type of a codebook, any where its values are not known. It waits for the device."""
    if not _has_values(code):
        return QUANT_TYPES[0]
    values = code.float().cpu()
    for quant_type in QUANT_TYPES:
        if torch.equal(values, get_4bit_type(quant_type)):
            return quant_type
    raise ValueError(f"code: expected the codebook of {' or '.join(QUANT_TYPES)}, got {values.tolist()}")


@operator("(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)")
def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes i8 in A's shape, row_stats f32[rows], outlier columns i64, None when threshold is 0."""
    return functional.int8_vectorwise_quant(A, threshold)


@operator("(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)")
def int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Codes by row and by column, row_stats, col_stats, outlier columns i64, None when threshold is 0."""
    return functional.int8_double_quant(A, threshold=threshold)


@operator("(Tensor A, Tensor stats) -> Tensor")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """f32 in A's shape."""
    return primitives.int8_vectorwise_dequant(A, stats)


@operator("(Tensor A, Tensor B) -> Tensor", out=True)
def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """``A @ B^T`` in i32."""
    return primitives.int8_linear_matmul(A, B, out=out)


def _scaled(primitive: Callable[..., Tensor], *operands: Any, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """A primitive that ends in a bias and a dtype: f16 where none is given. A bias of another dtype is added in f32."""
    dtype = torch.float16 if dtype is None else dtype
    if bias is None or bias.dtype == dtype:
        return primitive(*operands, bias, dtype)
    check_dtype_argument("dtype", dtype)
    check_float("bias", bias)
    return primitive(*operands, bias.float(), torch.float32).to(dtype)


@operator("(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor")
def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A * row_stats * col_stats / 127^2 + bias``, rounded once to ``dtype``, which is f16 where it is None."""
    return _scaled(primitives.int8_mm_dequant, A, row_stats, col_stats, bias=bias, dtype=dtype)


@operator(
    "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor"
)
def int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`int8_linear_matmul`, then :func:`int8_mm_dequant`."""
    return _scaled(primitives.int8_scaled_mm, Int8Rows(A, row_stats), Int8Weight(B, col_stats), bias=bias, dtype=dtype)


@operator(
    "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) "
    "-> (Tensor, Tensor?)"
)
def int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The product in A's dtype, and A's outlier columns [rows, columns]; None where ``outlier_cols`` is."""
    if bias is not None:
        check_float("bias", bias)
        bias = bias.to(A.dtype)
    mask = A.new_zeros(A.shape[-1:], dtype=torch.bool)
    if outlier_cols is not None:
        check_dtype("outlier_cols", outlier_cols, (torch.int64,))
        _mark(mask, outlier_cols)
    with _errors(row_stats="SCA", col_stats="SCB", outlier_mask="A"):
        result = primitives.int8_mixed_scaled_mm(A, Int8Rows(CA, SCA), Int8Weight(CB, SCB), mask, bias)
    return result, None if outlier_cols is None else A.reshape(-1, A.shape[-1])[:, outlier_cols]


def _mark(mask: Tensor, outlier_cols: Tensor) -> None:
    try:
        mask.index_fill_(0, outlier_cols, True)
    except IndexError as error:
        raise ValueError(f"outlier_cols: {error}") from None


@operator(
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()"
)
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    """One step in place. Where ``max_unorm`` > 0, ``param_norm`` is the norm that it is relative to."""
    settings = OptimizerStep(
        optimizer_name, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale,
        _bound(p, max_unorm, param_norm), skip_zeros,
    )  # fmt: skip
    primitives.optimizer_update_32bit(settings, g, p, OptimizerState32bit(state1, state2), unorm_vec)


def _bound(p: Tensor, max_unorm: float, param_norm: float) -> float:
    """``max_unorm`` relative to p's own norm, which the primitive takes. A p of zeros does not move."""
    if not max_unorm > 0 or not _has_values(p):
        return max_unorm
    norm = torch.where(p.isfinite(), p, 0.0).float().norm().item()
    if norm == 0 or math.isclose(param_norm, norm, rel_tol=1e-6):
        return max_unorm
    return max(max_unorm * param_norm / norm, SMALLEST_BOUND)  # 0 would mean unbounded


@operator(
    "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, "
    "float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
    "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()"
)
def optimizer_update_8bit_blockwise(*arguments: Any) -> None:
    """One step in place, with 8-bit state in blocks of 256; the update is not bounded."""
    functional.optimizer_update_8bit_blockwise(*arguments)

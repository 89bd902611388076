"""Every primitive once: schema, checks, result and documentation. docs/SPEC.md says what each computes, to the bit.

All arguments are positional and none has a default, so that a kernel's signature reads like its primitive's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnb_core.checks import (
    F32_MAX,
    FLOAT_DTYPES,
    I64_MAX,
    QUANT_STORAGES,
    QUANT_TYPES,
    check_blocksize,
    check_choice,
    check_code,
    check_dimensions,
    check_dtype,
    check_dtype_argument,
    check_flag,
    check_float,
    check_number,
    check_numel,
    check_shape,
    check_sizes,
    check_whole,
    shown,
)
from bnb_core.primitive import Out, primitive
from bnb_core.records import Int8Rows, Int8Weight, OptimizerState8bit, OptimizerState32bit, OptimizerStep, Weight4bit

OPTIMIZER_BLOCKSIZE = 256
MAX_INT8_INNER_SIZE = 2**16


class OptimizerTraits(NamedTuple):
    """What state an optimizer keeps, and whether its update can be bounded.

    ``states`` tensors; state1 may stack two moments or be a divisor; ``max_unorm`` may not apply.
    """

    states: int
    stacked: bool = False
    divides_by_state1: bool = False
    takes_max_unorm: bool = True


OPTIMIZERS = {
    "adam": OptimizerTraits(2),
    "lamb": OptimizerTraits(2),
    "ademamix": OptimizerTraits(2, stacked=True, takes_max_unorm=False),
    "momentum": OptimizerTraits(1),
    "lars": OptimizerTraits(1),
    "lion": OptimizerTraits(1),
    "rmsprop": OptimizerTraits(1, divides_by_state1=True),
    "adagrad": OptimizerTraits(1, divides_by_state1=True, takes_max_unorm=False),
}


def block_count(n: int, blocksize: int) -> int:
    """How many blocks of ``blocksize`` hold ``n`` elements, the last one perhaps short."""
    return (n + blocksize - 1) // blocksize


def packed_numel(n: int, storage: torch.dtype) -> int:
    """How many elements of ``storage`` hold ``n`` codes of 4 bits, the last one perhaps filled up with zero bytes."""
    return (n + 2 * storage.itemsize - 1) // (2 * storage.itemsize)


def _product(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n = n * size
    return n


@primitive("(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)")
def quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Out, Out]:
    """Quantize to 8 bits per element in blocks (8-bit Optimizers, section 2.1).

    Args:
        A: any shape, f32, f16 or bf16.
        code: f32[256], ascending.
        blocksize: elements per block of the flat tensor.

    Returns:
        codes u8 in A's shape, absmax f32[ceil(n / blocksize)].
    """
    check_float("A", A)
    check_code("code", code)
    check_blocksize(blocksize)
    return Out(A.shape, torch.uint8), Out((block_count(A.numel(), blocksize),), torch.float32)


@primitive("(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor")
def dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Out:
    """Undo :data:`quantize_blockwise`: ``code[A_i] * absmax_b`` in f32, rounded once to ``dtype``.

    Args:
        A: codes, u8, any shape.
        absmax: f32, one value per block.
        code: f32[256].
        dtype: of the result: f32, f16 or bf16.
    """
    check_dtype("A", A, (torch.uint8,))
    check_dtype("absmax", absmax, (torch.float32,))
    check_code("code", code)
    check_blocksize(blocksize)
    check_numel("absmax", absmax, block_count(A.numel(), blocksize))
    check_dtype_argument("dtype", dtype)
    return Out(A.shape, dtype)


@primitive("(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Out, Out]:
    """Quantize to 4 bits per element in blocks (QLoRA, section 3).

    Args:
        A: any shape, f32, f16 or bf16.
        blocksize: elements per block of the flat tensor.
        quant_type: ``nf4`` or ``fp4``.
        quant_storage: the dtype that the packed bytes are viewed as: u8, f16, bf16 or f32.

    Returns:
        packed ``quant_storage[ceil(bytes / itemsize), 1]`` (element 2k in the high nibble of byte k, zero bytes after
        the last), absmax f32[ceil(n / blocksize)].
    """
    check_float("A", A)
    check_blocksize(blocksize)
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_dtype_argument("quant_storage", quant_storage, QUANT_STORAGES)
    n, storage_numel = A.numel(), packed_numel(A.numel(), quant_storage)
    padded = storage_numel * quant_storage.itemsize > packed_numel(n, torch.uint8)
    packed = Out((storage_numel, 1), quant_storage, zeroed=padded)
    return packed, Out((block_count(n, blocksize),), torch.float32)


def _check_weight(name: str, weight: Weight4bit) -> None:
    """The codes of a weight, which errors call ``name``, and its scales."""
    check_sizes("shape", weight.shape)
    packed, n = weight.packed, _product(weight.shape)
    check_dtype(name, packed, QUANT_STORAGES)
    check_blocksize(weight.blocksize)
    check_choice("quant_type", weight.quant_type, QUANT_TYPES)
    if packed.numel() != packed_numel(n, packed.dtype):
        expected, given = (count * packed.dtype.itemsize for count in (packed_numel(n, packed.dtype), packed.numel()))
        raise ValueError(f"{name}: expected {expected} bytes for {n} elements of 4 bits, got {given}")
    _check_block_scales(weight, block_count(n, weight.blocksize))


def _check_block_scales(weight: Weight4bit, blocks: int) -> None:
    nested = weight.nested_absmax is not None
    check_dtype("absmax", weight.absmax, (torch.uint8,) if nested else (torch.float32,))
    check_numel("absmax", weight.absmax, blocks)
    check_blocksize(weight.nested_blocksize, "nested_blocksize")
    if not nested:
        for name in ("nested_code", "offset"):
            tensor = getattr(weight, name)
            if tensor is not None:
                raise TypeError(f"{name}: expected None, as nested_absmax is None, got {type(tensor).__name__}")
    else:
        check_dtype("nested_absmax", weight.nested_absmax, (torch.float32,))  # type: ignore[arg-type]
        check_numel("nested_absmax", weight.nested_absmax, block_count(blocks, weight.nested_blocksize))  # type: ignore[arg-type]
        check_code("nested_code", weight.nested_code)  # type: ignore[arg-type]
        check_dtype("offset", weight.offset, (torch.float32,))  # type: ignore[arg-type]
        check_numel("offset", weight.offset, 1)  # type: ignore[arg-type]


@primitive("(Weight4bit A, ScalarType dtype) -> Tensor")
def dequantize_4bit(A: Weight4bit, dtype: torch.dtype) -> Out:
    """Undo :data:`quantize_4bit`: ``code[nibble_i] * absmax_b`` in f32, rounded once to ``dtype``.

    Args:
        A: packed, of any shape, which the result has.
        dtype: of the result: f32, f16 or bf16.
    """
    _check_weight("A", A)
    check_dtype_argument("dtype", dtype)
    return Out(tuple(A.shape), dtype)


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
    _check_columns("A", A, K, B.shape)
    if bias is not None:
        check_dtype("bias", bias, (A.dtype,))
        check_shape("bias", bias, (N,))
    return Out((*A.shape[:-1], N), A.dtype)


def _check_matrix(name: str, weight: Weight4bit) -> tuple[int, int]:
    """(N, K) of a packed weight."""
    check_sizes("shape", weight.shape)
    if len(weight.shape) != 2:
        raise ValueError(f"shape: expected (N, K), got {tuple(weight.shape)}")
    _check_weight(name, weight)
    N, K = weight.shape
    return N, K


def _check_columns(name: str, A: Tensor, columns: int, shape: Sequence[int]) -> None:
    if A.dim() == 0 or A.shape[-1] != columns:
        raise ValueError(
            f"{name}: expected a last dimension of {columns} for a weight of shape {tuple(shape)}, got {tuple(A.shape)}"
        )


@primitive("(Tensor dY, Weight4bit B) -> Tensor", differentiable=True)
def gemm_4bit_backward(dY: Tensor, B: Weight4bit) -> Out:
    """The gradient of :data:`gemm_4bit`'s A: ``dY @ dequantized(B)`` in dY's dtype, accumulated in f32 or wider.

    Args:
        dY: [..., N], f32, f16 or bf16.
        B: the weight [N, K].
    """
    check_float("dY", dY)
    N, K = _check_matrix("B", B)
    _check_columns("dY", dY, N, B.shape)
    return Out((*dY.shape[:-1], K), dY.dtype)


def _check_stack(weight: Weight4bit, offsets: Tensor) -> tuple[int, int, int]:
    """(E, N, K) of a stack of packed weights, none of whose blocks reaches into the next."""
    check_sizes("shape", weight.shape)
    if len(weight.shape) != 3 or weight.shape[0] == 0:
        raise ValueError(f"shape: expected (E, N, K) with E of 1 or more, got {tuple(weight.shape)}")
    _check_weight("B", weight)
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
    _check_columns("A", A, K, B.shape)
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
    _check_columns("dY", dY, N, B.shape)
    return Out((dY.shape[0], K), dY.dtype)


def _check_rows(name: str, A: Tensor) -> tuple[int, int]:
    """(rows, columns) of a tensor of at least one dimension, read as a stack of rows."""
    if A.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    return _product(A.shape[:-1]), A.shape[-1]


@primitive("(Tensor A, float threshold) -> (Tensor, Tensor, Tensor)")
def int8_vectorwise_quant(A: Tensor, threshold: float) -> tuple[Out, Out, Out]:
    """Quantize each row to int8 by its absmax, setting outlier columns aside (LLM.int8(), section 3).

    Args:
        A: [..., K], f32, f16 or bf16.
        threshold: entries with |a| >= threshold are outliers; 0 for none.

    Returns:
        codes i8 in A's shape, row_stats f32[rows], outlier_mask bool[K] (empty when threshold is 0).
    """
    check_float("A", A)
    check_number("threshold", threshold, minimum=0.0)
    rows, columns = _check_rows("A", A)
    return (
        Out(A.shape, torch.int8),
        Out((rows,), torch.float32),
        Out((columns if threshold > 0 else 0,), torch.bool),
    )


@primitive("(Tensor A, float threshold) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def int8_double_quant(A: Tensor, threshold: float) -> tuple[Out, Out, Out, Out, Out]:
    """Quantize to int8 by rows and by columns at once.

    Args:
        A: [..., K], f32, f16 or bf16, read as [rows, K].
        threshold: as in :data:`int8_vectorwise_quant`; outlier columns are zero in both results.

    Returns:
        codes by row and codes by column, i8 in A's shape; row_stats f32[rows], col_stats f32[K],
        outlier_mask bool[K] (empty when threshold is 0).
    """
    q_row, row_stats, outlier_mask = int8_vectorwise_quant.declaration(A, threshold)  # type: ignore[misc]
    return q_row, q_row, row_stats, Out((A.shape[-1],), torch.float32), outlier_mask  # type: ignore[return-value]


@primitive("(Tensor A, Tensor stats) -> Tensor")
def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Out:
    """``A * stats / 127`` in f32: A i8[..., K], stats f32, one per row."""
    check_dtype("A", A, (torch.int8,))
    rows, _ = _check_rows("A", A)
    check_dtype("stats", stats, (torch.float32,))
    check_numel("stats", stats, rows)
    return Out(A.shape, torch.float32)


def _check_int8_operands(A: Tensor, B: Tensor, names: tuple[str, str] = ("A", "B")) -> tuple[int, int]:
    """(rows of A, rows of B) of i8[..., K] and i8[N, K]."""
    check_dtype(names[0], A, (torch.int8,))
    check_dtype(names[1], B, (torch.int8,))
    rows, K = _check_rows(names[0], A)
    check_dimensions(names[1], B, 2)
    if B.shape[1] != K:
        raise ValueError(f"{names[1]}: expected {K} columns like {names[0]}, got shape {tuple(B.shape)}")
    if K > MAX_INT8_INNER_SIZE:
        limit = f"at most {MAX_INT8_INNER_SIZE} columns, of which i32 holds the sums"
        raise ValueError(f"{names[0]}: expected {limit}, got {K}")
    return rows, B.shape[0]


@primitive("(Tensor A, Tensor B) -> Tensor")
def int8_linear_matmul(A: Tensor, B: Tensor) -> Out:
    """``A @ B^T``, exact: A i8[..., K], B i8[N, K], result i32[..., N]; K up to 2^16."""
    _, N = _check_int8_operands(A, B)
    return Out((*A.shape[:-1], N), torch.int32)


def _check_scales(
    row_stats: Tensor, col_stats: Tensor, rows: int, N: int, bias: Tensor | None, dtype: torch.dtype
) -> None:
    check_dtype_argument("dtype", dtype)
    check_dtype("row_stats", row_stats, (torch.float32,))
    check_numel("row_stats", row_stats, rows)
    check_dtype("col_stats", col_stats, (torch.float32,))
    check_numel("col_stats", col_stats, N)
    if bias is not None:
        check_dtype("bias", bias, (dtype,))
        check_shape("bias", bias, (N,))


@primitive("(Tensor A, Tensor row_stats, Tensor col_stats, Tensor? bias, ScalarType dtype) -> Tensor")
def int8_mm_dequant(A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Out:
    """``A * row_stats * col_stats / 127^2 + bias`` in f32, rounded once to ``dtype``.

    Args:
        A: i32[..., N], the result of :data:`int8_linear_matmul`.
        row_stats: f32, one per row. col_stats: f32[N].
        bias: ``dtype[N]``, or None.
    """
    check_dtype("A", A, (torch.int32,))
    rows, N = _check_rows("A", A)
    _check_scales(row_stats, col_stats, rows, N, bias, dtype)
    return Out(A.shape, dtype)


@primitive("(Int8Rows A, Int8Weight B, Tensor? bias, ScalarType dtype) -> Tensor")
def int8_scaled_mm(A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> Out:
    """:data:`int8_linear_matmul`, then :data:`int8_mm_dequant`, in one: A [..., K], B [N, K] → dtype[..., N]."""
    rows, N = _check_int8_operands(A.codes, B.codes)
    _check_scales(A.row_stats, B.col_stats, rows, N, bias, dtype)
    return Out((*A.codes.shape[:-1], N), dtype)


@primitive("(Tensor A, Int8Rows CA, Int8Weight CB, Tensor outlier_mask, Tensor? bias) -> Tensor")
def int8_mixed_scaled_mm(A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None) -> Out:
    """:data:`int8_scaled_mm` plus ``A[:, outliers] @ dequantized(CB[:, outliers])^T`` (LLM.int8(), section 3.2).

    Args:
        A: [..., K], f32, f16 or bf16; the result has its dtype.
        CA, outlier_mask: of A, from :data:`int8_vectorwise_quant`.
        CB: the weight [N, K].
        bias: [N] in A's dtype, or None.
    """
    check_float("A", A)
    rows, N = _check_int8_operands(CA.codes, CB.codes, ("CA", "CB"))
    check_shape("CA", CA.codes, A.shape)
    check_dtype("outlier_mask", outlier_mask, (torch.bool,))
    check_numel("outlier_mask", outlier_mask, A.shape[-1])
    _check_scales(CA.row_stats, CB.col_stats, rows, N, bias, A.dtype)
    return Out((*A.shape[:-1], N), A.dtype)


@primitive("(Tensor dY, Int8Weight B) -> Tensor", differentiable=True)
def int8_linear_backward(dY: Tensor, B: Int8Weight) -> Out:
    """The gradient of A in a linear layer with an int8 weight: ``dY @ (B * col_stats / 127)`` in dY's dtype.

    Args:
        dY: [..., N], f32, f16 or bf16.
        B: the weight [N, K].
    """
    check_float("dY", dY)
    check_dtype("B", B.codes, (torch.int8,))
    check_dimensions("B", B.codes, 2)
    N, K = B.codes.shape
    check_dtype("col_stats", B.col_stats, (torch.float32,))
    check_numel("col_stats", B.col_stats, N)
    _check_columns("dY", dY, N, B.codes.shape)
    return Out((*dY.shape[:-1], K), dY.dtype)


def _check_optimizer(
    step: OptimizerStep,
    g: Tensor,
    p: Tensor,
    states: tuple[Tensor, Tensor | None],
    state_dtype: torch.dtype,
    unorm_vec: Tensor | None,
) -> None:
    _check_step(step)
    traits = OPTIMIZERS[step.optimizer_name]
    state1, state2 = states
    check_float("p", p)
    check_dtype("g", g, (p.dtype,))
    check_shape("g", g, p.shape)
    check_dtype("state1", state1, (state_dtype,))
    check_shape("state1", state1, (2, *p.shape) if traits.stacked else p.shape)
    if traits.states == 2:
        check_dtype("state2", state2, (state_dtype,))  # type: ignore[arg-type]
        check_shape("state2", state2, p.shape)  # type: ignore[arg-type]
    else:
        _check_absent("state2", state2, step.optimizer_name)
    if step.max_unorm > 0 or unorm_vec is not None:
        check_dtype("unorm_vec", unorm_vec, (torch.float32,))  # type: ignore[arg-type]
        check_shape("unorm_vec", unorm_vec, (1,))  # type: ignore[arg-type]


def _check_step(settings: OptimizerStep) -> None:
    """Each value is looked at quickly first: a step of an optimizer does so for every group of parameters."""
    name, step, lr, *numbers, max_unorm, skip_zeros, t_alpha, t_beta3, step_tensor, lr_tensor = settings
    check_choice("optimizer_name", name, _OPTIMIZER_NAMES)
    if type(step) is not int or not 1 <= step <= I64_MAX:
        check_whole("step", step, minimum=1)
    if type(max_unorm) is not float or not 0.0 <= max_unorm <= F32_MAX:
        check_number("max_unorm", max_unorm, minimum=0.0)
    for number in numbers:
        if type(number) is not float or not -F32_MAX <= number <= F32_MAX:
            _check_numbers(numbers)
    if type(lr) is not float or not -F32_MAX <= lr <= F32_MAX:
        check_number("lr", _one_number("lr", lr))
    if skip_zeros is not True and skip_zeros is not False:
        check_flag("skip_zeros", skip_zeros)
    if type(t_alpha) is not float or t_alpha != 0.0:
        check_number("t_alpha", t_alpha, minimum=0.0)
    if type(t_beta3) is not float or t_beta3 != 0.0:
        check_number("t_beta3", t_beta3, minimum=0.0)
    if step_tensor is not None:
        _check_number_tensor("step_tensor", step_tensor)
    if lr_tensor is not None:
        _check_number_tensor("lr_tensor", lr_tensor)
    if max_unorm > 0 and not OPTIMIZERS[name].takes_max_unorm:
        raise ValueError(f"max_unorm: {name} has no bounded update, expected 0, got {max_unorm}")


_OPTIMIZER_NAMES = tuple(OPTIMIZERS)
_NUMBERS = OptimizerStep._fields[3 : OptimizerStep._fields.index("max_unorm")]


def _check_numbers(numbers: Sequence[float]) -> None:
    for name, number in zip(_NUMBERS, numbers, strict=True):
        check_number(name, number)


def _check_number_tensor(name: str, tensor: Tensor) -> None:
    """Its value is not looked at: that would wait for the device."""
    check_dtype(name, tensor, (torch.float64,))
    check_numel(name, tensor, 1)


def _check_absent(name: str, value: object, optimizer_name: str) -> None:
    if value is not None:
        raise ValueError(f"{name}: {optimizer_name} has one state, expected None, got {shown(value)}")


def _one_number(name: str, value: object) -> object:
    """The number in a tensor of one element, as learning rates may be; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    check_dtype(name, value, (*FLOAT_DTYPES, torch.float64))
    check_numel(name, value, 1)
    if value.is_meta:
        raise ValueError(f"{name}: expected a number, got a tensor on meta, which has none")
    return value.item()


@primitive(
    "(OptimizerStep step, Tensor g, Tensor(a!) p, OptimizerState32bit state, Tensor(f!)? unorm_vec) -> ()",
)
def optimizer_update_32bit(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
) -> None:
    """One optimizer step with f32 state, in place (docs/SPEC.md section 5 has the rule of each optimizer).

    Args:
        g, p: gradient and parameter of one shape and dtype: f32, f16 or bf16. p and the state are updated.
        unorm_vec: f32[1], receives the norm of the update when ``max_unorm`` > 0; otherwise may be None.
    """
    _check_optimizer(step, g, p, (state.state1, state.state2), torch.float32, unorm_vec)


@primitive(
    "(OptimizerStep step, Tensor g, Tensor(a!) p, OptimizerState8bit state, Tensor(f!)? unorm_vec) -> ()",
)
def optimizer_update_8bit_blockwise(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
) -> None:
    """One optimizer step with 8-bit state in blocks of 256, in place (8-bit Optimizers; docs/SPEC.md section 5).

    The arguments are those of :data:`optimizer_update_32bit`.
    """
    _check_optimizer(step, g, p, (state.state1, state.state2), torch.uint8, unorm_vec)
    traits = OPTIMIZERS[step.optimizer_name]
    blocks = block_count(p.numel(), OPTIMIZER_BLOCKSIZE)
    check_code("qmap1", state.qmap1)
    check_dtype("absmax1", state.absmax1, (torch.float32,))
    check_numel("absmax1", state.absmax1, 2 * blocks if traits.stacked else blocks)
    if traits.states == 2:
        check_code("qmap2", state.qmap2)  # type: ignore[arg-type]
        check_dtype("absmax2", state.absmax2, (torch.float32,))  # type: ignore[arg-type]
        check_numel("absmax2", state.absmax2, blocks)  # type: ignore[arg-type]
    else:
        _check_absent("qmap2", state.qmap2, step.optimizer_name)
        _check_absent("absmax2", state.absmax2, step.optimizer_name)

"""The functions of the API. They keep the ecosystem's signatures and call the primitives."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core import block_sizes, primitives
from bnb_core.checks import (
    BLOCKSIZES,
    QUANT_TYPES,
    check_code,
    check_dense,
    check_dimensions,
    check_dtype,
    check_flag,
    check_float,
    check_numel,
    check_shape,
    check_tensor,
    renamed,
    shown,
)
from bnb_core.codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from bnb_core.paged import paged_tensor, prefetch
from bnb_core.primitive import Primitive
from bnb_core.quant_state import QuantState
from bnb_core.records import NESTED_BLOCKSIZE, OptimizerState8bit, OptimizerState32bit, OptimizerStep, Weight4bit
from bnb_core.serialization import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "QuantState",
    "batched_igemm",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

DEFAULT_BLOCKSIZE_4BIT = 64


def _dtype_of(name: str, tensor: Tensor | None, default: Any) -> Any:
    """The dtype of an optional argument, or the default where it is not given."""
    if tensor is None:
        return default
    check_float(name, tensor)
    return tensor.dtype


def check_quant_state(name: str, value: object) -> None:
    if value is None:
        raise ValueError(f"{name}: expected the QuantState of the codes, got None")
    if not isinstance(value, QuantState):
        raise TypeError(f"{name}: expected a QuantState, got {type(value).__name__}")


def _filled(primitive: Primitive, arguments: tuple[Any, ...], **outputs: Tensor | None) -> Any:
    """The primitive's results in those tensors that are given, which errors call by their names here."""
    try:
        return primitive(*arguments, out=tuple(outputs.values()))
    except (TypeError, ValueError) as error:
        raise renamed(error, {f"out[{index}]": name for index, name in enumerate(outputs)}) from error


def _code_on(device: torch.device, code: Tensor | None) -> Tensor:
    """The codebook, by default the signed dynamic map, on that device."""
    if code is None:
        return _codebook("dynamic", device)
    check_code("code", code)
    return code.to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, QuantState]:
    """Double quantization (QLoRA, section 3): the scales f32 less their mean, in 8 bits.

    Returns:
        Their codes u8, the mean f32, and what decodes the codes.

    Raises:
        TypeError: the scales are no dense tensor of f32.
    """
    check_dense("absmax", absmax)
    check_dtype("absmax", absmax, (torch.float32,))
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    codes, state2 = quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, offset, state2


def dequantize_absmax(quant_state: QuantState) -> Tensor:
    """The f32 scale of each block, double-quantized or not."""
    check_quant_state("quant_state", quant_state)
    if not quant_state.nested:
        return quant_state.absmax
    offset: Any = quant_state.offset
    check_dtype("quant_state.offset", offset, (torch.float32,))
    check_numel("quant_state.offset", offset, 1)
    return dequantize_blockwise(quant_state.absmax, quant_state.state2) + offset


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize to 4 bits per element in blocks (QLoRA, section 3).

    Args:
        A: any shape, f32, f16 or bf16.
        absmax: receives the scales, f32[ceil(n / blocksize)].
        out: receives the packed codes, ``quant_storage[ceil(bytes / itemsize), 1]``.
        blocksize: 32 to 4096, a power of two; None for 64.
        compress_statistics: quantize the scales to 8 bits as well.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as: u8, f16, bf16 or f32.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("compress_statistics", compress_statistics)
    blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    if out is None and absmax is None:
        packed, scales = primitives.quantize_4bit(A, blocksize, quant_type, quant_storage)
    else:
        arguments = (A, blocksize, quant_type, quant_storage)
        packed, scales = _filled(primitives.quantize_4bit, arguments, out=out, absmax=absmax)
    offset, state2 = None, None
    if compress_statistics:
        scales, offset, state2 = quantize_absmax(scales)
    code = _codebook(quant_type, A.device)
    return packed, QuantState(scales, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to ``nf4``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """:func:`quantize_4bit` to ``fp4``."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def is_transposed(packed: Tensor) -> bool:
    """A packed weight is a column; callers hand it over as a row (``weight.t()``) to say "transposed"."""
    return packed.dim() == 2 and packed.shape[0] == 1 and packed.shape[1] != 1


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """Undo :func:`quantize_4bit`.

    Args:
        A: the packed codes; as a row (``packed.t()``) they give the transposed result.
        quant_state: what :func:`quantize_4bit` returned; or instead of it
        absmax, out, blocksize, quant_type: the f32 scales, and a tensor of the result's shape and dtype.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    dtype: Any
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("quant_state: expected a QuantState, or absmax and out in its place, got None")
        check_float("out", out)
        blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        weight, dtype = Weight4bit(A, out.shape, absmax, blocksize, quant_type), out.dtype
    else:
        weight = weight_4bit(A, quant_state)
        dtype = _dtype_of("out", out, quant_state.dtype)
    result = primitives.dequantize_4bit(weight, dtype, out=out)
    return result.t() if is_transposed(A) and result.dim() == 2 else result


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` from ``nf4``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """:func:`dequantize_4bit` from ``fp4``."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8 bits per element in blocks (8-bit Optimizers, section 2.1).

    Args:
        A: any shape, f32, f16 or bf16.
        code: f32[256], ascending; None for the signed dynamic map.
        absmax, out: receive the scales, f32[ceil(n / blocksize)], and the codes, u8 in A's shape.
        blocksize: any; what is no power of two from 32 to 4096 costs a copy.
        nested: quantize the scales to 8 bits as well.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("nested", nested)
    code = _code_on(A.device, code)
    if not _is_power_of_two(blocksize):
        codes, scales = block_sizes.quantize_blockwise(A, code, blocksize)
        codes, scales = _copied_into("out", codes, out), _copied_into("absmax", scales, absmax)
    elif out is None and absmax is None:
        codes, scales = primitives.quantize_blockwise(A, code, blocksize)
    else:
        codes, scales = _filled(primitives.quantize_blockwise, (A, code, blocksize), out=out, absmax=absmax)
    offset, state2 = None, None
    if nested:
        scales, offset, state2 = quantize_absmax(scales)
    return codes, QuantState(scales, A.shape, code, blocksize, dtype=A.dtype, offset=offset, state2=state2)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """Undo :func:`quantize_blockwise`.

    Args:
        A: codes, u8, any shape.
        quant_state: what :func:`quantize_blockwise` returned; or instead of it
        absmax, code, blocksize: the f32 scales, the codebook (None for the signed dynamic map), the block size.
        out: receives the result and gives its dtype; without it, the quant state's dtype or f32.
        nested: read from the quant state.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_tensor("A", A)
    check_flag("nested", nested)
    dtype = torch.float32
    if quant_state is not None:
        absmax, code, blocksize = dequantize_absmax(quant_state), quant_state.code, quant_state.blocksize  # type: ignore[assignment]
        dtype = quant_state.dtype or dtype
    elif absmax is None:
        raise ValueError("quant_state: expected a QuantState, or absmax in its place, got None")
    code = _code_on(A.device, code)
    dtype = _dtype_of("out", out, dtype)
    if _is_power_of_two(blocksize):
        return primitives.dequantize_blockwise(A, absmax, code, blocksize, dtype, out=out)
    return _copied_into("out", block_sizes.dequantize_blockwise(A, absmax, code, blocksize, dtype), out)


def _is_power_of_two(blocksize: object) -> bool:
    """Whether the primitives take blocks of this size."""
    return isinstance(blocksize, int) and blocksize in BLOCKSIZES


def _copied_into(name: str, result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in the caller's tensor where there is one."""
    if out is None:
        return result
    check_dtype(name, out, (result.dtype,))
    check_shape(name, out, result.shape)
    return out.copy_(result)


_CODEBOOKS = {"dynamic": create_dynamic_map(), **{name: get_4bit_type(name) for name in QUANT_TYPES}}
_codebooks_on_devices: dict[tuple[str, torch.device], Tensor] = {}


def _codebook(name: str, device: torch.device) -> Tensor:
    """A copy of a codebook for the caller to keep."""
    if torch.compiler.is_compiling():
        return _CODEBOOKS[name].to(device, copy=True)
    key = (name, device)
    code = _codebooks_on_devices.get(key)
    if code is None:
        code = _codebooks_on_devices[key] = _CODEBOOKS[name].to(device)
    return code.clone()


def gemm_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``A @ dequantized(B)^T + bias``, not differentiable: A [..., K], B packed, bias [N] or None. Result [..., N]."""
    return primitives.gemm_4bit(A, weight_4bit(B, quant_state), bias, out=out)


def weight_4bit(packed: Tensor, quant_state: QuantState, name: str = "quant_state") -> Weight4bit:
    """What the primitives take for packed codes and their quant state, which errors call ``name``."""
    try:
        return quant_state.weight_4bit(packed)
    except AttributeError:
        check_quant_state(name, quant_state)
        raise


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


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row of A [..., K] to int8 (LLM.int8(), section 3).

    Returns:
        codes i8 in A's shape; row_stats f32[rows]; the outlier columns, i64 ascending, None when threshold is 0.
    """
    check_tensor("A", A)
    q, row_stats, outlier_mask = primitives.int8_vectorwise_quant(A, threshold)
    return q, row_stats, outlier_mask.nonzero().view(-1) if threshold > 0 else None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """``A * stats / 127`` by rows: A i8[..., K], stats f32. Result f32."""
    return primitives.int8_vectorwise_dequant(A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize A [..., K] to int8 by rows and by columns at once; the optional tensors receive the results.

    Returns:
        codes by row, codes by column, row_stats, col_stats, outlier columns (None when threshold is 0).
    """
    check_tensor("A", A)
    outputs = {"out_row": out_row, "out_col": out_col, "row_stats": row_stats, "col_stats": col_stats}
    if all(output is None for output in outputs.values()):
        *results, outlier_mask = primitives.int8_double_quant(A, threshold)
    else:
        *results, outlier_mask = _filled(primitives.int8_double_quant, (A, threshold), **outputs, outlier_mask=None)
    return (*results, outlier_mask.nonzero().view(-1) if threshold > 0 else None)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """``A @ B^T`` in i32, exact: A i8[..., K], B i8[N, K]."""
    if dtype is not torch.int32:
        raise ValueError(f"dtype: expected torch.int32, got {shown(dtype)}")
    return primitives.int8_linear_matmul(A, B, out=out)


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``A * row_stats * col_stats / 127^2 + bias`` of A i32[..., N], in the dtype of out, else of bias, else f16."""
    dtype = _dtype_of("out", out, _dtype_of("bias", bias, torch.float16))
    return primitives.int8_mm_dequant(A, row_stats, col_stats, bias, dtype, out=out)


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """``A @ B`` of int8 matrices in i32, exact: A [M, K] (transposed_A: [K, M]), B [K, N] (transposed_B: [N, K])."""
    _check_factors(A, B, 2, transposed_A, transposed_B)
    return primitives.int8_linear_matmul(A.t() if transposed_A else A, B if transposed_B else B.t(), out=out)


def _check_factors(A: Tensor, B: Tensor, dimensions: int, transposed_A: bool, transposed_B: bool) -> None:
    for name, tensor in (("A", A), ("B", B)):
        check_dtype(name, tensor, (torch.int8,))
        check_dimensions(name, tensor, dimensions)
    check_flag("transposed_A", transposed_A)
    check_flag("transposed_B", transposed_B)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """:func:`igemm` over the leading dimension of two 3-D tensors."""
    _check_factors(A, B, 3, transposed_A, transposed_B)
    A, B = (A.mT if transposed_A else A), (B if transposed_B else B.mT)
    if A.shape[0] != B.shape[0] or A.shape[2] != B.shape[2]:
        raise ValueError(
            f"B: expected a batch of {A.shape[0]} and an inner size of {A.shape[2]} like A, "
            f"got {B.shape[0]} and {B.shape[2]}"
        )
    shape = (A.shape[0], A.shape[1], B.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=A.device)
    check_dtype("out", out, (torch.int32,))
    check_shape("out", out, shape)
    for a, b, result in zip(A, B, out, strict=True):
        primitives.int8_linear_matmul(a, b, out=result)
    return out


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One optimizer step with f32 state, in place; :data:`bnb_core.primitives.optimizer_update_32bit` says more."""
    settings = OptimizerStep(
        optimizer_name, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros
    )
    primitives.optimizer_update_32bit(settings, g, p, OptimizerState32bit(state1, state2), unorm_vec)


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
    *,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """One optimizer step with 8-bit state, in place.

    :data:`bnb_core.primitives.optimizer_update_8bit_blockwise` says more.
    """
    settings = OptimizerStep(
        optimizer_name, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros
    )
    state = OptimizerState8bit(state1, state2, qmap1, qmap2, absmax1, absmax2)
    primitives.optimizer_update_8bit_blockwise(settings, g, p, state, unorm_vec)


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's data begins, for the C symbols of ``lib``; None for None.

    Raises:
        ValueError: the memory holds the values with the other sign (``is_neg``); ``resolve_neg`` copies them.
    """
    if A is None:
        return None
    check_dense("A", A)
    if A.is_neg():
        raise ValueError("A: its memory holds the values with the other sign; A.resolve_neg() copies them")
    return ctypes.c_void_p(A.data_ptr())


further_names: Callable[[], ModuleType] | None = None
"""Gives a module with more names, in its ``__all__``, when they are first asked for: hardly anybody does."""


def __getattr__(name: str) -> Any:
    if further_names is not None and not name.startswith("__"):
        module = further_names()
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """A zeroed tensor whose memory may be paged out, so that it can be larger than the device's own.

    Args:
        device: None for the first GPU that CUDA or HIP knows, or without one the CPU.
    """
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return paged_tensor(shape, dtype, device)


def _is_paged(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and getattr(tensor, "is_paged", False)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Bring a paged tensor near before it is used; in host memory the operating system's read-ahead does so.

    Args:
        to_cpu: to the host instead, to make room on the device.

    Raises:
        ValueError: the tensor is not paged.
    """
    if not _is_paged(A):
        raise ValueError("A: expected a paged tensor, as get_paged makes them")
    check_flag("to_cpu", to_cpu)
    prefetch(A, to_cpu)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True if all tensors are on one GPU; None and paged tensors do not count.

    Raises:
        ValueError: they are not.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"tensors: expected several of them, got {shown(tensors)}")
    devices = set()
    for tensor in tensors:
        if tensor is not None and not _is_paged(tensor):
            check_tensor("tensors", tensor)
            devices.add(str(tensor.device))
    if len(devices) > 1 or "cpu" in devices:
        raise ValueError(f"tensors: expected all on one GPU, found them on {', '.join(sorted(devices))}")
    return True

"""What ``bitsandbytes.functional`` has beside the functions of :mod:`bnb_core.functional`, where they are found too."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from bnb_core import functional
from bnb_core.checks import check_choice, check_dense, check_flag, check_same_device, check_shape, shown
from bnb_core.codebooks import create_dynamic_map
from bnb_core.compat.c_library import lib
from bnb_core.paged import GlobalPageManager
from bnb_core.quant_state import QuantState, check_quant_state

__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "GlobalPageManager",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "_mul",
    "check_matmul",
    "elementwise_func",
    "fill",
    "has_avx512bf16",
    "lib",
    "name2qmap",
]

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)
C = 127.0
"""The largest code of int8."""

name2qmap = {"dynamic": create_dynamic_map()}
"""The codebook that 8-bit blockwise quantization takes where it is given none, to be read."""


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """The shape of ``A @ B`` for matrices, or batches of them, of one dtype.

    Args:
        A: [M, K] or [batch, M, K]; transposed_A: [K, M] or [batch, K, M].
        B: [K, N] or [batch, K, N]; transposed_B: [N, K] or [batch, N, K].
        out: None, or a tensor that is to receive the product.

    Raises:
        TypeError: not tensors of ``expected_type``.
        ValueError: shapes that cannot be multiplied, or that of ``out`` is another than the product's.
    """
    check_flag("transposed_A", transposed_A)
    check_flag("transposed_B", transposed_B)
    if not isinstance(expected_type, torch.dtype):
        raise TypeError(f"expected_type: expected a torch.dtype, got {shown(expected_type)}")
    for name, tensor in (("A", A), ("B", B)):
        check_dense(name, tensor)
        if tensor.dtype != expected_type:
            raise TypeError(f"{name}: expected {expected_type}, got {tensor.dtype}")
        if tensor.dim() not in (2, 3):
            raise ValueError(f"{name}: expected 2 or 3 dimensions, got shape {tuple(tensor.shape)}")
    left, right = (A.mT if transposed_A else A), (B.mT if transposed_B else B)
    batches = {tensor.shape[0] for tensor in (left, right) if tensor.dim() == 3}
    if left.shape[-1] != right.shape[-2] or len(batches) > 1:
        raise ValueError(
            f"B: shape {tuple(right.shape)} cannot be multiplied from the left by {tuple(left.shape)}"
            ", expected as many rows as that has columns"
        )
    shape = (*batches, left.shape[-2], right.shape[-1])
    if out is not None:
        check_dense("out", out)
        check_shape("out", out, shape)
    return shape


def _fill(A: Tensor, B: Tensor | None, value: float) -> None:
    try:
        A.fill_(value)
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"value: expected a number that {A.dtype} holds, got {shown(value)}") from error


def _arange(A: Tensor, B: Tensor | None, value: float) -> None:
    A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape))


def _multiply(A: Tensor, B: Tensor | None, value: float) -> None:
    if B is None:
        raise ValueError("B: expected a tensor to multiply by, got None")
    check_same_device([("A", A), ("B", B)])
    try:
        A.mul_(B)
    except RuntimeError as error:
        raise ValueError(f"B: cannot be multiplied into A: {error}") from error


_IN_PLACE: dict[str, Callable[[Tensor, Tensor | None, float], None]] = {
    "arange": _arange,
    "fill": _fill,
    "_mul": _multiply,
}


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """Change every entry of A in place, which may be in paged memory.

    Args:
        func_name: ``fill`` with ``value``, ``arange`` for 0, 1, 2, ... in row-major order, ``_mul`` by B.
        prefetch: bring paged tensors near first.

    Raises:
        ValueError: an unknown name, or no B to multiply by.
    """
    check_choice("func_name", func_name, tuple(_IN_PLACE))
    check_dense("A", A)
    check_flag("prefetch", prefetch)
    if B is not None:
        check_dense("B", B)
    for tensor in (A, B):
        if prefetch and getattr(tensor, "is_paged", False):
            functional.prefetch_tensor(tensor)  # type: ignore[arg-type]
    _IN_PLACE[func_name](A, B, value)


def fill(A: Tensor, value: float, device: torch.device | str | None = None, prefetch: bool = True) -> None:
    """Set every entry of A, which stays on its device, whatever ``device`` says."""
    elementwise_func("fill", A, None, value, prefetch)


def _mul(A: Tensor, B: Tensor, device: torch.device | str | None = None) -> None:
    """Multiply A by B in place, on A's device, whatever ``device`` says."""
    elementwise_func("_mul", A, B, 0.0)


def has_avx512bf16() -> bool:
    """Whether the CPU has AVX512-BF16, as torch says, or Linux where this torch does not."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if asked is not None:
        return bool(asked())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text().split()


def _convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """A 4-bit weight in the layout that the kernels for CPUs want, which here is the one that it has.

    Args:
        qweight: the packed weight.
        quant_state: its state, which stays as it is.
        block_n: the rows of a tile; it has no meaning.

    Returns:
        The packed weight and a state whose scales are plain f32, as callers hand them on by themselves.
    """
    check_quant_state("quant_state", quant_state)
    plain = copy(quant_state)
    plain.absmax = functional.dequantize_absmax(quant_state)
    plain.nested, plain.offset, plain.state2 = False, None, None
    return qweight, plain


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Undo :func:`_convert_weight_packed_for_cpu`; the scales stay plain."""
    return packed_weight, quant_state

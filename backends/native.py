"""Turns a compiled kernel module into a backend: the one place where tensors become pointers.

The module offers the functions of csrc_shared/kernels.h as csrc_shared/bindings.cpp binds them: tensors, or None, for
pointers, handles as integers (0 for null), sizes in elements, dtypes and names as the codes below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core.primitive import made_readable
from bnb_core.registry import Kernel

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
QUANT_TYPE_CODES = {"fp4": 0, "nf4": 1}
OPTIMIZER_CODES = {
    name: code
    for code, name in enumerate(("adam", "lamb", "ademamix", "momentum", "lars", "lion", "rmsprop", "adagrad"))
}

Outputs = tuple[Tensor, ...]


def block_scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
) -> tuple[Any, ...]:
    """The scales of a 4-bit weight in the order of kernels.h's BlockScales."""
    if nested_absmax is None:
        return absmax, None, None, None, None, nested_blocksize
    return None, absmax, nested_absmax, nested_code, offset, nested_blocksize


class NativeKernels:
    """The primitives over one compiled module: each method has its primitive's arguments, tensors contiguous.

    Args:
        module: bound by csrc_shared/bindings.cpp.
        stream: from a device to the handle of its current stream; 0 where there is none.
    """

    def __init__(self, module: ModuleType, stream: Callable[[torch.device], int]) -> None:
        self.module = module
        self.stream = stream

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, out: Outputs) -> None:
        q, absmax = out
        self.module.quantize_blockwise(
            A, DTYPE_CODES[A.dtype], A.numel(), code, blocksize, q, absmax, self.stream(A.device),
        )  # fmt: skip

    def dequantize_blockwise(
        self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
    ) -> None:
        self.module.dequantize_blockwise(
            A, absmax, code, A.numel(), blocksize, out, DTYPE_CODES[dtype], self.stream(A.device),
        )  # fmt: skip

    def quantize_4bit(
        self, A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, out: Outputs
    ) -> None:
        packed, absmax = out
        self.module.quantize_4bit(
            A, DTYPE_CODES[A.dtype], A.numel(), blocksize, QUANT_TYPE_CODES[quant_type], packed, absmax,
            self.stream(A.device),
        )  # fmt: skip

    def dequantize_4bit(
        self,
        A: Tensor,
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        nested_blocksize: int,
        out: Tensor,
    ) -> None:
        scales = block_scales(absmax, nested_absmax, nested_code, offset, nested_blocksize)
        self.module.dequantize_4bit(
            A, *scales, out.numel(), blocksize, QUANT_TYPE_CODES[quant_type], out, DTYPE_CODES[dtype],
            self.stream(A.device),
        )  # fmt: skip

    def gemm_4bit(
        self,
        A: Tensor,
        B: Tensor,
        shape: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        nested_blocksize: int,
        out: Tensor,
    ) -> None:
        N, K = shape
        scales = block_scales(absmax, nested_absmax, nested_code, offset, nested_blocksize)
        self.module.gemm_4bit(
            A, DTYPE_CODES[A.dtype], out.numel() // N if N else 0, N, K, B, *scales, blocksize,
            QUANT_TYPE_CODES[quant_type], bias, out, self.stream(A.device),
        )  # fmt: skip

    def int8_vectorwise_quant(self, A: Tensor, threshold: float, out: Outputs) -> None:
        q, row_stats, outlier_mask = out
        mask = outlier_mask if threshold > 0 else None
        self.module.int8_vectorwise_quant(
            A, DTYPE_CODES[A.dtype], row_stats.numel(), A.shape[-1], threshold, q, row_stats, mask,
            self.stream(A.device),
        )  # fmt: skip

    def int8_double_quant(self, A: Tensor, threshold: float, out: Outputs) -> None:
        q_row, q_col, row_stats, col_stats, outlier_mask = out
        self.int8_vectorwise_quant(A, threshold, (q_row, row_stats, outlier_mask))
        mask = outlier_mask if threshold > 0 else None
        self.module.int8_columnwise_quant(
            A, DTYPE_CODES[A.dtype], row_stats.numel(), A.shape[-1], threshold, q_col, col_stats, mask,
            self.stream(A.device),
        )  # fmt: skip

    def int8_vectorwise_dequant(self, A: Tensor, stats: Tensor, out: Tensor) -> None:
        self.module.int8_vectorwise_dequant(A, stats, stats.numel(), A.shape[-1], out, self.stream(A.device))

    def int8_linear_matmul(self, A: Tensor, B: Tensor, out: Tensor) -> None:
        self.module.int8_linear_matmul(
            A, B, math.prod(A.shape[:-1]), B.shape[0], B.shape[1], out, self.stream(A.device),
        )  # fmt: skip

    def int8_mm_dequant(
        self,
        A: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None:
        self.module.int8_mm_dequant(
            A, row_stats, col_stats, row_stats.numel(), A.shape[-1], bias, out, DTYPE_CODES[dtype],
            self.stream(A.device),
        )  # fmt: skip

    def int8_scaled_mm(
        self,
        A: Tensor,
        B: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None:
        self.int8_mm(A, B, None, row_stats, col_stats, None, None, bias, dtype, out)

    def int8_mixed_scaled_mm(
        self,
        A: Tensor,
        CA: Tensor,
        CB: Tensor,
        row_stats: Tensor,
        col_stats: Tensor,
        outlier_mask: Tensor,
        bias: Tensor | None,
        out: Tensor,
    ) -> None:
        self.int8_mm(CA, CB, None, row_stats, col_stats, A, outlier_mask, bias, A.dtype, out)

    def int8_mm(
        self,
        A: Tensor,
        B: Tensor,
        products: Tensor | None,
        row_stats: Tensor,
        col_stats: Tensor,
        unquantized: Tensor | None,
        outlier_mask: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        out: Tensor,
    ) -> None:
        """What both of the above are. ``products`` i32[..., N], where they have been taken already, are A @ B^T."""
        self.module.int8_mixed_scaled_mm(
            A, B, math.prod(A.shape[:-1]), B.shape[0], B.shape[1], products, row_stats, col_stats, unquantized,
            outlier_mask, bias, out, DTYPE_CODES[dtype], self.stream(A.device),
        )  # fmt: skip

    def optimizer_update_32bit(
        self,
        optimizer_name: str,
        g: Tensor,
        p: Tensor,
        state1: Tensor,
        state2: Tensor | None,
        unorm_vec: Tensor | None,
        *hyperparameters: Any,
    ) -> None:
        norms = _norms(p, hyperparameters)
        self.module.optimizer_update_32bit(
            *_step_arguments(optimizer_name, *hyperparameters), g, p, DTYPE_CODES[p.dtype], state1, state2, p.numel(),
            norms, self.stream(p.device),
        )  # fmt: skip
        _store_update_norm(norms, unorm_vec)

    def optimizer_update_8bit_blockwise(
        self,
        optimizer_name: str,
        g: Tensor,
        p: Tensor,
        state1: Tensor,
        state2: Tensor | None,
        qmap1: Tensor,
        qmap2: Tensor | None,
        absmax1: Tensor,
        absmax2: Tensor | None,
        unorm_vec: Tensor | None,
        *hyperparameters: Any,
    ) -> None:
        norms = _norms(p, hyperparameters)
        self.module.optimizer_update_8bit_blockwise(
            *_step_arguments(optimizer_name, *hyperparameters), g, p, DTYPE_CODES[p.dtype], state1, state2, qmap1,
            qmap2, absmax1, absmax2, p.numel(), norms, self.stream(p.device),
        )  # fmt: skip
        _store_update_norm(norms, unorm_vec)

    def optimizer_updates_32bit(
        self,
        optimizer_name: str,
        g: list[Tensor],
        p: list[Tensor],
        state1: list[Tensor],
        state2: list[Tensor] | None,
        unorm_vec: None,
        *hyperparameters: Any,
    ) -> None:
        self.module.optimizer_updates_32bit(
            *_step_arguments_of_several(optimizer_name, *hyperparameters), g, p, DTYPE_CODES[p[0].dtype], state1,
            state2 or [], self.stream(p[0].device),
        )  # fmt: skip

    def optimizer_updates_8bit_blockwise(
        self,
        optimizer_name: str,
        g: list[Tensor],
        p: list[Tensor],
        state1: list[Tensor],
        state2: list[Tensor] | None,
        qmap1: Tensor,
        qmap2: Tensor | None,
        absmax1: list[Tensor],
        absmax2: list[Tensor] | None,
        unorm_vec: None,
        *hyperparameters: Any,
    ) -> None:
        self.module.optimizer_updates_8bit_blockwise(
            *_step_arguments_of_several(optimizer_name, *hyperparameters), g, p, DTYPE_CODES[p[0].dtype], state1,
            state2 or [], qmap1, qmap2, absmax1, absmax2 or [], self.stream(p[0].device),
        )  # fmt: skip


def _step_arguments_of_several(optimizer_name: str, *hyperparameters: Any) -> tuple[Any, ...]:
    """The same without max_unorm, for which each parameter needs norms of its own."""
    *before, max_unorm, skip_zeros = _step_arguments(optimizer_name, *hyperparameters)
    if max_unorm > 0:
        raise ValueError(f"max_unorm: expected 0 for several parameters, got {max_unorm}")
    return *before, skip_zeros


def _step_arguments(
    optimizer_name: str,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    weight_decay: float,
    gnorm_scale: float,
    max_unorm: float,
    skip_zeros: bool,
) -> tuple[Any, ...]:
    """The primitive's hyperparameters in the order of kernels.h's OptimizerStep."""
    code = OPTIMIZER_CODES[optimizer_name]
    return code, step, lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale, max_unorm, skip_zeros


def _norms(p: Tensor, hyperparameters: tuple[Any, ...]) -> Tensor | None:
    """Room for |p|^2 and |update|^2, where ``max_unorm`` asks for them."""
    max_unorm = hyperparameters[-2]
    return torch.zeros(2, dtype=torch.float64, device=p.device) if max_unorm > 0 else None


def _store_update_norm(norms: Tensor | None, unorm_vec: Tensor | None) -> None:
    if norms is not None and unorm_vec is not None:
        unorm_vec.copy_(norms[1:].sqrt())


def _updating_in_place(kernel: Callable[..., None]) -> Callable[..., None]:
    """Hand contiguous tensors to a kernel that changes some of them, and carry the changes back."""
    changed = [name in CHANGED_IN_PLACE for name in signature(kernel).parameters]

    @wraps(kernel)
    @torch.no_grad()
    def call(*arguments: Any) -> None:
        readable = made_readable(arguments)
        kernel(*readable)
        for given, used, is_changed in zip(arguments, readable, changed, strict=False):
            if is_changed and given is not used:
                given.copy_(used)

    return call


FILLING = (
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_4bit",
    "dequantize_4bit",
    "gemm_4bit",
    "gemm_4bit_backward",
    "int8_vectorwise_quant",
    "int8_double_quant",
    "int8_vectorwise_dequant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_mixed_scaled_mm",
)
IN_PLACE = {
    "optimizer_update_32bit": "optimizer_updates_32bit",
    "optimizer_update_8bit_blockwise": "optimizer_updates_8bit_blockwise",
}
"""And what steps several parameters at once, where there is such a thing."""
CHANGED_IN_PLACE = {"p", "state1", "state2", "absmax1", "absmax2"}


def module_file(module: ModuleType) -> Path:
    """Where a compiled module lies; it also exports the C symbols of csrc_shared/c_api.cpp."""
    assert module.__file__ is not None
    return Path(module.__file__)


def kernels_of(kernels: Any) -> dict[str, Kernel]:
    """The table for a Backend: a kernel for each primitive, over contiguous tensors as NativeKernels takes them."""
    return {
        **{name: Kernel(getattr(kernels, name)) for name in FILLING},
        **{
            name: Kernel(_updating_in_place(getattr(kernels, name)), several=getattr(kernels, several, None))
            for name, several in IN_PLACE.items()
        },
    }

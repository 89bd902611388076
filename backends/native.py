"""Turns a compiled kernel module into a backend: the one place where tensors become pointers.

The module offers the functions of csrc_shared/kernels.h as csrc_shared/bindings.cpp binds them: it reads tensors and
the records of the primitives itself, a tuple for each of its structs, and a handle as an integer (0 for null).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bnb_core.backend import Kernel
from bnb_core.checks import refuse_offsets
from bnb_core.primitive import made_readable
from bnb_core.records import (
    Int8Rows,
    Int8Weight,
    OptimizerState8bit,
    OptimizerState32bit,
    OptimizerStep,
    Weight4bit,
    is_record,
)
from bnb_core.row_passes import RowsAlike

Outputs = tuple[Tensor, ...]


class NativeKernels:
    """The primitives over one compiled module: each method has its primitive's arguments, tensors contiguous.

    Products return what they leave to torch's dense matmul, as ``dequantized.Dense`` has it.

    Args:
        module: bound by csrc_shared/bindings.cpp.
        stream: from a device to the handle of its current stream; 0 where there is none.
    """

    def __init__(self, module: ModuleType, stream: Callable[[torch.device], int]) -> None:
        self.module = module
        self.stream = stream

    def quantize_blockwise(self, A: Tensor, code: Tensor, blocksize: int, out: Outputs) -> None:
        self.module.quantize_blockwise(A, code, blocksize, *out, self.stream(A.device))

    def dequantize_blockwise(
        self, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
    ) -> None:
        self.module.dequantize_blockwise(A, absmax, code, blocksize, out, self.stream(A.device))

    def quantize_4bit(
        self, A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype, out: Outputs
    ) -> None:
        self.module.quantize_4bit(A, blocksize, quant_type, *out, self.stream(A.device))

    def dequantize_4bit(self, A: Weight4bit, dtype: torch.dtype, out: Tensor) -> None:
        self.module.dequantize_4bit(A, out, self.stream(out.device))

    def gemm_4bit(self, A: Tensor, B: Weight4bit, bias: Tensor | None, out: Tensor) -> int:
        return self.module.gemm_4bit(A, B, bias, out, self.stream(A.device))

    def gemm_4bit_backward(self, dY: Tensor, B: Weight4bit, out: Tensor) -> int:
        return self.module.gemm_4bit_backward(dY, B, out, self.stream(dY.device))

    def grouped_gemm_4bit(self, A: Tensor, B: Weight4bit, offsets: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if not self.module.grouped_gemm_4bit(A, B, offsets, bias, out, self.stream(A.device)):
            refuse_offsets(offsets, A.shape[0])

    def grouped_gemm_4bit_backward(self, dY: Tensor, B: Weight4bit, offsets: Tensor, out: Tensor) -> None:
        if not self.module.grouped_gemm_4bit_backward(dY, B, offsets, out, self.stream(dY.device)):
            refuse_offsets(offsets, dY.shape[0])

    def int8_vectorwise_quant(self, A: Tensor, threshold: float, out: Outputs) -> None:
        self.module.int8_vectorwise_quant(A, threshold, *out, self.stream(A.device))

    def int8_double_quant(self, A: Tensor, threshold: float, out: Outputs) -> None:
        q_row, q_col, row_stats, col_stats, outlier_mask = out
        stream = self.stream(A.device)
        self.module.int8_vectorwise_quant(A, threshold, q_row, row_stats, outlier_mask, stream)
        self.module.int8_columnwise_quant(A, threshold, q_col, col_stats, outlier_mask, stream)

    def int8_vectorwise_dequant(self, A: Tensor, stats: Tensor, out: Tensor) -> None:
        self.module.int8_vectorwise_dequant((A, stats), out, self.stream(A.device))

    def int8_linear_matmul(self, A: Tensor, B: Tensor, out: Tensor) -> None:
        self.module.int8_linear_matmul(A, B, out, self.stream(A.device))

    def int8_mm_dequant(
        self, A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype, out: Tensor
    ) -> None:
        self.module.int8_mm_dequant(A, row_stats, col_stats, bias, out, self.stream(A.device))

    def int8_scaled_mm(self, A: Int8Rows, B: Int8Weight, bias: Tensor | None, dtype: torch.dtype, out: Tensor) -> None:
        self.module.int8_mixed_scaled_mm((A, B, None), (None, None), bias, out, self.stream(out.device))

    def int8_mixed_scaled_mm(
        self, A: Tensor, CA: Int8Rows, CB: Int8Weight, outlier_mask: Tensor, bias: Tensor | None, out: Tensor
    ) -> None:
        self.module.int8_mixed_scaled_mm((CA, CB, None), (A, outlier_mask), bias, out, self.stream(A.device))

    def int8_linear_backward(self, dY: Tensor, B: Int8Weight, out: Tensor) -> int:
        return self.module.int8_linear_backward(dY, B, out, self.stream(dY.device))

    def optimizer_update_32bit(
        self, step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
    ) -> None:
        self._update(self.module.optimizer_update_32bit, step, g, p, state, unorm_vec)

    def optimizer_update_8bit_blockwise(
        self, step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
    ) -> None:
        self._update(self.module.optimizer_update_8bit_blockwise, step, g, p, state, unorm_vec)

    def _update(
        self, update: Any, step: OptimizerStep, g: Tensor, p: Tensor, state: Any, unorm_vec: Tensor | None
    ) -> None:
        bounded = step.max_unorm > 0
        # Room for |p|^2 and |update|^2.
        norms = torch.zeros(2, dtype=torch.float64, device=p.device) if bounded else None
        update(step, g, p, state, norms, self.stream(p.device))
        if norms is not None and unorm_vec is not None:
            unorm_vec.copy_(norms[1:].sqrt())

    def several_32bit(self, step: OptimizerStep, g: Any, p: Any, state: Any, unorm_vec: None) -> None:
        """:meth:`optimizer_update_32bit` of lists of tensors."""
        self._update_several(self.module.optimizer_update_32bit, step, g, p, state)

    def several_8bit(self, step: OptimizerStep, g: Any, p: Any, state: Any, unorm_vec: None) -> None:
        """:meth:`optimizer_update_8bit_blockwise` of lists of tensors."""
        self._update_several(self.module.optimizer_update_8bit_blockwise, step, g, p, state)

    def _update_several(self, update: Any, step: OptimizerStep, g: Any, p: Any, state: Any) -> None:
        if step.max_unorm > 0:  # each parameter needs norms of its own
            raise ValueError(f"max_unorm: expected 0 for several parameters, got {step.max_unorm}")
        update(step, g, p, state, None, self.stream(p[0].device))


def _updating_in_place(kernel: Callable[..., None]) -> Callable[..., None]:
    """Hand contiguous tensors to a kernel that changes some of them, and carry the changes back."""
    names = tuple(signature(kernel).parameters)

    @wraps(kernel)
    @torch.no_grad()
    def call(*arguments: Any) -> None:
        readable = made_readable(arguments)
        kernel(*readable)
        for name, given, used in zip(names, arguments, readable, strict=True):
            if is_record(given):
                _carry_back(given._fields, given, used)
            else:
                _carry_back([name], [given], [used])

    return call


def _carry_back(names: Any, given: Any, used: Any) -> None:
    for name, target, source in zip(names, given, used, strict=True):
        if name in CHANGED_IN_PLACE and target is not source:
            target.copy_(source)


FILLING = (
    "quantize_blockwise",
    "dequantize_blockwise",
    "quantize_4bit",
    "dequantize_4bit",
    "gemm_4bit",
    "gemm_4bit_backward",
    "grouped_gemm_4bit",
    "grouped_gemm_4bit_backward",
    "int8_vectorwise_quant",
    "int8_double_quant",
    "int8_vectorwise_dequant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_mixed_scaled_mm",
    "int8_linear_backward",
)
IN_PLACE = {"optimizer_update_32bit": "several_32bit", "optimizer_update_8bit_blockwise": "several_8bit"}
"""And what steps several parameters at once, where there is such a thing."""
CHANGED_IN_PLACE = {"p", "state1", "state2", "absmax1", "absmax2"}


def module_file(module: ModuleType) -> Path:
    """Where a compiled module lies; it also exports the C symbols of csrc_shared/c_api.cpp."""
    assert module.__file__ is not None
    return Path(module.__file__)


def kernels_of(kernels: Any, rows_alike: Mapping[str, RowsAlike] | None = None) -> dict[str, Kernel]:
    """The table for a Backend: a kernel for each primitive, over contiguous tensors as NativeKernels takes them.

    Args:
        rows_alike: by primitive, where more than one row at a time is.
    """
    rows_alike = rows_alike or {}
    return {
        **{name: Kernel(getattr(kernels, name), rows_alike=rows_alike.get(name)) for name in FILLING},
        **{
            name: Kernel(_updating_in_place(getattr(kernels, name)), several=getattr(kernels, several, None))
            for name, several in IN_PLACE.items()
        },
    }

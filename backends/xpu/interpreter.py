"""Mends Triton's interpreter (3.6 to 3.9) for bfloat16, whose values it holds as raw 16-bit integers.

As it comes, a cast from f32 drops bits instead of rounding, a sum or product is that of the integers, and so is a dot.
Compiled kernels are not concerned: this serves the tests that run kernels with TRITON_INTERPRET=1. Nor do their numpy
operations warn of overflow and NaN any more, which a GPU computes without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

QUIET_NAN = 0x7FC0


def _is_bfloat16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _from_bfloat16(bits: NDArray[Any]) -> NDArray[Any]:
    """f32 values of raw bits u16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: NDArray[Any]) -> NDArray[Any]:
    """Raw bits u16 of f32 values, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), QUIET_NAN, rounded).astype(np.uint16).reshape(values.shape)


def _widened(handle: TensorHandle) -> TensorHandle:
    """The same values in f32, if they are bfloat16."""
    return TensorHandle(_from_bfloat16(handle.data), tl.float32) if _is_bfloat16(handle.dtype) else handle


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A cast that goes through f32 on either side of bfloat16; further arguments are the rounding."""

    def cast(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype, *rounding: Any) -> TensorHandle:
        source_is_bfloat16 = _is_bfloat16(source.dtype)
        if not source_is_bfloat16 and not _is_bfloat16(dtype):
            return original(self, source, dtype, *rounding)
        source = _widened(source)
        if _is_bfloat16(dtype):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return source if dtype.scalar == tl.float32 else original(self, source, dtype, *rounding)

    return cast


def _binary(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation in f32, rounded once; a comparison gives truth values and is not rounded."""

    def binary(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if not _is_bfloat16(left.dtype):
            return original(self, left, right, op)
        result = op(_widened(left).data, _widened(right).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(_to_bfloat16(result), tl.bfloat16)

    return binary


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def dot(self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, *rest: Any) -> TensorHandle:
        return original(self, _widened(left), _widened(right), *rest)

    return dot


def _quietly(original: Callable[..., None]) -> Callable[..., None]:
    def run(self: GridExecutor, *arguments: Any, **keywords: Any) -> None:
        with np.errstate(all="ignore"):
            original(self, *arguments, **keywords)

    return run


def mend() -> None:
    """Replace what is wrong, once in a process."""
    if getattr(interpreter, "_bnb_core_mended", False):
        return
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.binary_op = _binary(InterpreterBuilder.binary_op)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    GridExecutor.__call__ = _quietly(GridExecutor.__call__)
    interpreter._bnb_core_mended = True

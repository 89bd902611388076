"""Mends Triton's interpreter (3.6 to 3.9), which serves the tests that run kernels with TRITON_INTERPRET=1.

It holds bfloat16 as raw 16-bit integers: as it comes, a cast from f32 drops bits instead of rounding, and a dot is that
of the integers. Arithmetic on bfloat16 stays that of the integers: no kernel of ours has any. A dot is numpy's matmul,
in which some CPUs sum a row in an order that goes by its place in the tile, as no GPU does. And at each call of a
function by a kernel all of Triton's language is looked through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

QUIET_NAN = 0x7FC0

_patch_language = interpreter._patch_lang


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
    """A cast that goes through f32 on either side of bfloat16."""

    def cast(self: InterpreterBuilder, source: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        source = _widened(source)
        if _is_bfloat16(dtype):
            return TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
        return original(self, source, dtype)

    return cast


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """One in which a row's bits are the same at every place: einsum goes through the terms row by row, in order."""

    def dot(
        self: InterpreterBuilder, left: TensorHandle, right: TensorHandle, total: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if not left.dtype.is_floating():
            return original(self, left, right, total, *rest)
        x, w = (np.ascontiguousarray(_widened(side).data, total.data.dtype) for side in (left, right))
        return TensorHandle(np.einsum("mk,kn->mn", x, w) + total.data, total.dtype.scalar)

    return dot


def _languages_patched_once() -> Callable[..., Any]:
    """What has Triton's language interpreted in a function: a second time for the same modules changes nothing."""
    scopes: dict[frozenset[Any], Any] = {}

    def patch_language(function: Any) -> Any:
        modules = frozenset(value for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules not in scopes:
            scopes[modules] = _patch_language(function)
        return scopes[modules]

    return patch_language


_REPLACEMENTS: dict[str, Any] = {
    "cast_impl": _cast(InterpreterBuilder.cast_impl),
    "create_dot": _dot(InterpreterBuilder.create_dot),
}
_lock = RLock()


@contextmanager
def mended() -> Iterator[None]:
    """Within it, one thread at a time, the interpreter is right on bfloat16.

    Nor do its numpy operations warn of overflow and NaN, which a GPU computes without a word.
    """
    with (
        _lock,
        patch.multiple(InterpreterBuilder, **_REPLACEMENTS),
        patch.object(interpreter, "_patch_lang", _languages_patched_once()),
        np.errstate(all="ignore"),
    ):
        yield

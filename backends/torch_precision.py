"""torch's dense matmuls as exact as docs/SPEC.md section 3 asks, whatever else the process allows them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch

Restore = Callable[[], None]

_lock = Lock()


class Demand:
    """Settings of the whole process that are exact while some thread needs them, and then what they were.

    What another thread sets meanwhile is lost.

    Args:
        makes: each makes one exact, and returns what undoes that.
    """

    def __init__(self, *makes: Callable[[], Restore]) -> None:
        self._makes = makes
        self._users = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with _lock:
            if self._users == 0:
                self._restores = [make() for make in self._makes]
            self._users += 1
        try:
            yield
        finally:
            with _lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()

    def _restore(self) -> None:
        for restore in reversed(self._restores):
            restore()

    def end(self) -> None:
        """As if nobody needed them any more: in a child process, no other thread does."""
        if self._users > 0:
            self._users = 0
            self._restore()


@contextmanager
def exact_matmuls(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it, no matmul of this dtype multiplies in less than it or adds up in less than f32."""
    demand = DEMANDS.get((device.type, dtype))
    with demand.held() if demand else nullcontext():
        yield


def _disallowed(name: str) -> Callable[[], Restore]:
    """Not what this setting of torch.backends.cuda.matmul allows, where this torch has it."""

    def make() -> Restore:
        settings = torch.backends.cuda.matmul
        if not getattr(settings, name, False):
            return _nothing
        split_k = getattr(settings, f"{name}_split_k", None)
        setattr(settings, name, False)
        return lambda: setattr(settings, name, True if split_k is None else (True, split_k))

    return make


def _no_tf32_on_cuda() -> Restore:
    """TF32 is allowed through older or newer names, and torch raises where they are mixed."""
    settings = torch.backends.cuda.matmul
    try:
        if not settings.allow_tf32:
            return _nothing
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        return _ieee_by_newer_names(settings)
    settings.allow_tf32 = False

    def restore() -> None:
        settings.allow_tf32 = True
        if precision == "medium":
            torch.set_float32_matmul_precision(precision)

    return restore


def _ieee_by_newer_names(settings: Any) -> Restore:
    precision = settings.fp32_precision
    settings.fp32_precision = "ieee"

    def restore() -> None:
        settings.fp32_precision = "none"  # as the wider settings have it
        if settings.fp32_precision != precision:
            settings.fp32_precision = precision

    return restore


def _no_tf32_on_xpu() -> Restore:
    if not torch._C._get_onednn_allow_tf32():
        return _nothing
    torch._C._set_onednn_allow_tf32(False)
    return lambda: torch._C._set_onednn_allow_tf32(True)


def _no_bfloat16_on_cpu() -> Restore:
    """oneDNN multiplies f32 in bf16 where the precision is "medium"."""
    if hasattr(torch.backends.mkldnn, "matmul"):
        settings = torch.backends.mkldnn.matmul
        return _nothing if settings.fp32_precision in ("none", "ieee") else _ieee_by_newer_names(settings)
    precision = torch.get_float32_matmul_precision()
    if precision != "medium":
        return _nothing
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(precision)


def _nothing() -> None:
    pass


# One for all devices: in the older names of torch's settings they are one setting.
_F32 = Demand(_no_tf32_on_cuda, _no_bfloat16_on_cpu, _no_tf32_on_xpu)

DEMANDS = {
    ("cuda", torch.float16): Demand(
        _disallowed("allow_fp16_reduced_precision_reduction"), _disallowed("allow_fp16_accumulation")
    ),
    ("cuda", torch.bfloat16): Demand(_disallowed("allow_bf16_reduced_precision_reduction")),
    **{(device_type, torch.float32): _F32 for device_type in ("cuda", "cpu", "xpu")},
}


def _after_fork_in_child() -> None:
    global _lock
    _lock = Lock()
    for demand in set(DEMANDS.values()):
        demand.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

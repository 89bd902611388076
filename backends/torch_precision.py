"""torch's dense matmuls as exact as docs/SPEC.md section 3 asks, whatever else the process allows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch

Restore = Callable[[], None]

_lock = Lock()


class Demand:
    """A setting of the whole process that is exact while some thread needs it, and then what it was.

    Args:
        make: makes it exact, and returns what undoes that.
    """

    def __init__(self, make: Callable[[], Restore]) -> None:
        self._make = make
        self._users = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        with _lock:
            if self._users == 0:
                self._restore = self._make()
            self._users += 1
        try:
            yield
        finally:
            with _lock:
                self._users -= 1
                if self._users == 0:
                    self._restore()


@contextmanager
def exact_matmuls(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it, no matmul of this dtype multiplies in less than it or adds up in less than f32."""
    with ExitStack() as stack:
        for demand in DEMANDS.get((device.type, dtype), ()):
            stack.enter_context(demand.held())
        yield


def _disallowed(name: str) -> Callable[[], Restore]:
    """Not what this setting of torch.backends.cuda.matmul allows, where this torch has it."""

    def make() -> Restore:
        settings = torch.backends.cuda.matmul
        if not getattr(settings, name, False):
            return _nothing
        setattr(settings, name, False)
        return lambda: setattr(settings, name, True)

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


DEMANDS = {
    ("cuda", torch.float16): (
        Demand(_disallowed("allow_fp16_reduced_precision_reduction")),
        Demand(_disallowed("allow_fp16_accumulation")),
    ),
    ("cuda", torch.bfloat16): (Demand(_disallowed("allow_bf16_reduced_precision_reduction")),),
    ("cuda", torch.float32): (Demand(_no_tf32_on_cuda),),
    ("cpu", torch.float32): (Demand(_no_bfloat16_on_cpu),),
    ("xpu", torch.float32): (Demand(_no_tf32_on_xpu),),
}

"""Run a function in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
M_MMAP_THRESHOLD = -3


def in_fresh_process(function: Callable[..., Any], *arguments: Any, on_step: Callable[[float], None]) -> Any:
    """The result of `function(*arguments, on_step)`; `on_step` is called here with what it reports.

    Raises:
        RuntimeError: the process ended without a result; its traceback is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            is_result, value = receiver.recv()
            if is_result:
                return value
            on_step(value)
    except EOFError:
        raise RuntimeError(f"{function.__name__} failed in its process") from None
    finally:
        process.terminate()
        process.join()


def _serve(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    _return_freed_memory_at_once()
    result = function(*arguments, lambda value: sender.send((False, value)))
    sender.send((True, result))


def _return_freed_memory_at_once() -> None:
    """Have glibc map every large block by itself: the peak is then what was in use, not a broken-up heap."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MIB)


def peak_memory(device: str) -> int | None:
    """The most bytes this process has held: on a CPU its resident memory, else the device's allocator.

    None where the system does not say (no /proc and no allocator statistics).
    """
    kind = torch.device(device).type
    if kind in ("cuda", "xpu"):
        return getattr(torch, kind).max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

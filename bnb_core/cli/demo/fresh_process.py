"""Run a function in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import contextlib
import ctypes
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch

MIB = 2**20
M_MMAP_THRESHOLD = -3

CHILD = f"""
import os, pickle, signal, sys, threading
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # at the parent's death (PR_SET_PDEATHSIG), whatever goes on here
requests, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # what is printed here is none of the results
sys.path[:], call = pickle.load(requests)
# The parent writes nothing more: the pipe ends when it does.
threading.Thread(target=lambda: (requests.read(), os._exit(1)), daemon=True).start()
from {__name__} import serve
serve(results, call)
"""
"""What the process runs. It watches its parent before the imports, which take seconds."""


def in_fresh_process(function: Callable[..., Any], *arguments: Any, on_step: Callable[[float], None]) -> Any:
    """The result of `function(*arguments, on_step)`; `on_step` is called here with what it reports.

    However this process ends, the other one ends with it.

    Raises:
        OSError: the function did.
        ClickException: the process ended without a result; its traceback is on stderr.
    """
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump((sys.path, pickle.dumps((function, arguments))), process.stdin)
        process.stdin.flush()
        while True:
            kind, value = pickle.load(process.stdout)
            if kind == "result":
                return value
            if kind == "error":
                raise value
            on_step(value)
    except (EOFError, BrokenPipeError):
        raise click.ClickException(
            f"{function.__name__} failed in its process, which ended without a result; its error is above"
        ) from None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def serve(results: BinaryIO, call: bytes) -> None:
    """In the process: what `in_fresh_process` asks for, and every message to it, a kind and a value."""

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), results)
        results.flush()

    _return_freed_memory_at_once()
    function, arguments = pickle.loads(call)
    try:
        send("result", function(*arguments, lambda value: send("step", value)))
    except OSError as error:
        send("error", error)


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

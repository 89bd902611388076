"""How much memory quantizing takes beyond its input."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from measure import Verdict

from bnb_core import functional

ALLOWED_BYTES = 64 * 2**20


def _status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)[1])  # type: ignore[index]


def quantizing() -> Verdict | None:
    """Peak of quantize_4bit of 1 GiB of f32 with double quantization, less its output. None where not Linux."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    A = torch.randn(2**14, 2**14)
    functional.quantize_4bit(A[:16].contiguous(), compress_statistics=True)
    try:
        clear.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    packed, state = functional.quantize_4bit(A, compress_statistics=True)
    extra = _status("VmHWM") - before - packed.numel() - state.absmax.numel()
    requirement = f"quantize_4bit of 1 GiB: <= {ALLOWED_BYTES / 2**20:.0f} MiB beyond input and output"
    return Verdict(requirement, extra / 2**20, extra <= ALLOWED_BYTES)

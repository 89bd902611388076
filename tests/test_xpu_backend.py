"""The xpu backend where it cannot run, and its memory for paged state; its kernels are tested with Triton."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from bnb_core.backends.xpu import pinned_memory

WHY = "import bnb_core; print(bnb_core.backends()['xpu'].unavailable)"
WITHOUT_TRITON = f"import sys; sys.modules['triton'] = None; {WHY}"


def why_unavailable(code: str, interpret: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(
    torch.xpu.device_count() > 0 or torch.cuda.device_count() > 0, reason="the backend is available on this machine"
)
def test_without_a_gpu_it_says_how_to_get_one_served_and_how_to_do_without():
    reason = why_unavailable(WHY, interpret="0")
    assert "Intel GPU" in reason and "TRITON_INTERPRET=1" in reason


def test_without_triton_it_says_how_to_get_it():
    reason = why_unavailable(WITHOUT_TRITON, interpret="1")
    assert "Triton cannot be imported" in reason and "pip install bnb_core[triton]" in reason


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install bnb_core[triton]")
def test_the_interpreter_makes_it_serve_the_cpu_by_name_only():
    code = "import bnb_core; b = bnb_core.backends()['xpu']; print(b.unavailable, b.device_types, b.by_name_only)"
    assert why_unavailable(code, interpret="1") == "None ('cpu',) True"


@pytest.fixture
def released(monkeypatch):
    """Stand-ins for what needs a GPU: pinning, and waiting for it. The bytes of each memory that is let go."""
    sizes: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **options: zeros(*size, **options))
    monkeypatch.setattr(pinned_memory, "_release", lambda host, device: sizes.append(host.nbytes))
    return sizes


def test_paged_memory_lives_as_long_as_the_last_tensor_in_it(released):
    tensor = pinned_memory.PinnedMemory().allocate(1000, torch.float32, torch.device("cpu"))
    assert tensor.shape == (1000,) and not tensor.any()
    view = tensor.view(10, 100)[2:]
    del tensor
    gc.collect()
    assert released == [] and view.fill_(3.0).sum() == 2400
    del view
    gc.collect()
    assert released == [4000]

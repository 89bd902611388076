"""The xpu backend where it cannot run, and its memory for paged state; its kernels are tested with Triton."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from bnb_core.backends.xpu import pinned_memory
from bnb_core.backends.xpu.pinned_memory import PinnedMemory

WHY = "import bnb_core; print(bnb_core.backends()['xpu'].unavailable)"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None"
WITHOUT_GPUS = "import torch; torch.xpu.device_count = torch.cuda.device_count = lambda: 0"
WITH_AN_OTHER_GPU = "import torch; torch.xpu.device_count = lambda: 0; torch.cuda.device_count = lambda: 1"
BUILT_FOR_INTEL = "torch.version.xpu = '20250201'"

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install bnb_core[triton]")


def told(*statements: str, interpret: str = "0") -> str:
    """What a process prints that runs these statements."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", "; ".join(statements)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_without_a_gpu_it_says_how_to_get_one_served_and_how_to_do_without():
    reason = told(WITHOUT_GPUS, WHY)
    assert reason.startswith("no Intel GPU can be used: this torch") and "not built for them" in reason
    assert "install Intel's compute runtime and a torch" in reason and "TRITON_INTERPRET=1" in reason


def test_where_torch_is_built_for_intel_it_asks_for_the_driver():
    reason = told(WITHOUT_GPUS, BUILT_FOR_INTEL, WHY)
    assert reason.startswith("torch sees no Intel GPU") and "install its driver" in reason


def test_without_triton_it_says_how_to_get_it():
    reason = told(WITHOUT_TRITON, WHY, interpret="1")
    assert "Triton cannot be imported" in reason and "pip install bnb_core[triton]" in reason


def test_with_an_other_gpu_and_without_triton_the_missing_intel_gpu_comes_first():
    reason = told(WITH_AN_OTHER_GPU, WITHOUT_TRITON, WHY)
    assert reason.startswith("no Intel GPU can be used") and "pip install bnb_core[triton]" in reason


@needs_triton
def test_with_an_other_gpu_triton_is_not_imported_until_it_is_asked_about():
    imported = "print('triton' in sys.modules, b.unavailable, b.by_name_only, b.device_types)"
    code = (WITH_AN_OTHER_GPU, "import sys, bnb_core", "b = bnb_core.backends()['xpu']", imported, "print(b.details())")
    first, details = told(*code).splitlines()
    assert first == "False None True ('cuda',)"
    assert "no Intel GPU can be used" in details and "GPUs of another maker" in details


@needs_triton
def test_the_interpreter_makes_it_serve_the_cpu_by_name_only():
    code = "import bnb_core; b = bnb_core.backends()['xpu']; print(b.unavailable, b.device_types, b.by_name_only)"
    assert told(code, interpret="1") == "None ('cpu',) True"


@needs_triton
@pytest.mark.parametrize(
    ("properties", "exact"),
    [({"has_subgroup_matrix_multiply_accumulate": value}, value) for value in (True, False)] + [({}, False)],
)
def test_intel_gpus_without_matrix_units_multiply_codes_in_f16(monkeypatch, properties, exact):
    from bnb_core.backends.xpu import int8_matmul

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(**properties))
    int8_matmul.has_int8_dot.cache_clear()
    assert int8_matmul.has_int8_dot(torch.device("xpu", 0)) is exact
    int8_matmul.has_int8_dot.cache_clear()


def touched(tensor: torch.Tensor) -> None:
    """A stand-in for a kernel."""


@pytest.fixture
def released(monkeypatch):
    """Stand-ins for what needs a GPU: pinning, and waiting for it. The bytes of each memory that is let go."""
    sizes: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory, **options: zeros(*size, **options))
    monkeypatch.setattr(pinned_memory, "_release", lambda host, device: sizes.append(host.nbytes))
    return sizes


def test_paged_memory_lives_as_long_as_the_last_tensor_in_it(released):
    tensor = PinnedMemory(touched).allocate(1000, torch.float32, torch.device("cpu"))
    assert tensor.shape == (1000,) and not tensor.any()
    view = tensor.view(10, 100)[2:]
    del tensor
    gc.collect()
    assert released == [] and view.fill_(3.0).sum() == 2400
    del view
    gc.collect()
    assert released == [4000]


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_paged_memory_is_on_a_device_with_its_index_and_without(released, device):
    assert PinnedMemory(touched).allocate(10, torch.uint8, torch.device(device)).fill_(3).sum() == 30


def test_paged_memory_says_so_where_kernels_do_not_take_it(released):
    def rejected(tensor: torch.Tensor) -> None:
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    memory = PinnedMemory(rejected)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"paged memory on cpu .*cpu tensor\?.*needs a Triton.*not paged"):
            memory.allocate(10, torch.float32, torch.device("cpu"))
    gc.collect()
    assert released == [40, 40]


def test_paged_memory_is_tried_once(released):
    tried: list[int] = []
    memory = PinnedMemory(lambda tensor: tried.append(tensor.numel()))
    kept = [memory.allocate(numel, torch.float32, torch.device("cpu")) for numel in (5, 6)]
    assert tried == [5] and len(kept) == 2

"""The backends in Triton: where they serve, why they do not, and their memory for paged state.

Their kernels are tested with Triton, by the conformance suite and tests/interpreted.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from bnb_core.backends.triton import pinned_memory
from bnb_core.backends.triton.pinned_memory import PinnedMemory

WHY = "import bnb_core; print(bnb_core.backends()['xpu'].unavailable)"
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None"
WITHOUT_GPUS = "import torch; torch.xpu.device_count = torch.cuda.device_count = lambda: 0"
WITH_AN_OTHER_GPU = "import torch; torch.xpu.device_count = lambda: 0; torch.cuda.device_count = lambda: 1"
BUILT_FOR_INTEL = "torch.version.xpu = '20250201'"
BUILT_FOR_NVIDIA = "torch.version.cuda = '13.0'"
WHY_NOT_OTHERS = WHY.replace("xpu", "triton")

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


def test_with_an_other_gpu_and_without_triton_each_name_has_its_own_reason():
    assert told(WITH_AN_OTHER_GPU, WITHOUT_TRITON, WHY).startswith("no Intel GPU can be used")
    reason = told(WITH_AN_OTHER_GPU, WITHOUT_TRITON, WHY_NOT_OTHERS)
    assert reason.startswith("Triton cannot be imported") and "a torch built for GPUs brings it" in reason


def test_without_a_gpu_of_another_maker_it_says_so():
    reason = told(WITHOUT_GPUS, WHY_NOT_OTHERS)
    assert "sees no GPU of NVIDIA or AMD" in reason and "TRITON_INTERPRET=1" in reason


SERVING = "import bnb_core; from bnb_core import registry; print({*registry.serving('cuda').values()})"
COMPILED = (
    "import bnb_core.backends.cuda as compiled, bnb_core.registry as registry, bnb_core.primitives",
    "from bnb_core.backend import Backend",
    "compiled.backend = Backend('cuda', ('cuda',), 100, dict.fromkeys(registry.primitive_names(), print))",
)


@needs_triton
def test_a_gpu_that_no_kernels_are_compiled_for_is_served_by_triton():
    assert told(WITH_AN_OTHER_GPU, SERVING) == "{'triton'}"


@needs_triton
def test_compiled_kernels_come_first_and_triton_is_not_imported_until_it_is_asked():
    asked = "import sys; print('triton' in sys.modules, bnb_core.backends()['triton'].unavailable)"
    details = "print(bnb_core.backends()['triton'].details())"
    serving, imported, facts = told(WITH_AN_OTHER_GPU, *COMPILED, SERVING, asked, details).splitlines()
    assert serving == "{'cuda'}" and imported == "False None" and "GPUs of NVIDIA and AMD" in facts


NO_COMPILER = "import os; os.environ.pop('CC', None); os.environ['PATH'] = ''"


def installed_triton(version: str) -> str:
    """A statement after which this version is the one that is installed."""
    return (
        "import importlib.metadata as m; v = m.version; "
        f"m.version = lambda name: {version!r} if name == 'triton' else v(name)"
    )


@needs_triton
def test_where_triton_needs_a_compiler_that_is_missing_it_says_so():
    why = told(WITH_AN_OTHER_GPU, BUILT_FOR_NVIDIA, NO_COMPILER, installed_triton("3.7.1"), WHY_NOT_OTHERS)
    assert why.startswith("Triton 3.7.1 builds its launcher with a C compiler") and "apt install gcc" in why
    assert "finds no compiler" in why and "Triton 3.8 and newer" in why


@needs_triton
@pytest.mark.parametrize(
    "statements",
    [(BUILT_FOR_NVIDIA, NO_COMPILER, installed_triton("3.8.0")), (BUILT_FOR_NVIDIA, installed_triton("3.7.1"))],
    ids=["a newer Triton on NVIDIA's GPUs", "a compiler"],
)
def test_otherwise_it_serves(statements):
    assert told(WITH_AN_OTHER_GPU, *statements, WHY_NOT_OTHERS) == "None"


@needs_triton
def test_a_kernel_that_compiles_for_long_says_so_once(monkeypatch, caplog):
    from bnb_core.backends.triton import first_call

    monkeypatch.setattr(first_call, "PATIENCE", 0.0)
    for variant in ("bfloat16", "bfloat16", "float32"):
        with first_call.told_when_long("quantize_kernel", variant):
            time.sleep(0.2)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all("Triton compiles quantize_kernel for this GPU, once" in line for line in lines)


@needs_triton
def test_a_kernel_that_fails_is_told_of_again_and_a_quick_one_never(monkeypatch, caplog):
    from bnb_core.backends.triton import first_call

    with first_call.told_when_long("quick", None):
        pass
    monkeypatch.setattr(first_call, "PATIENCE", 0.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"), first_call.told_when_long("failing", None):
            time.sleep(0.2)
            raise ValueError("no")
    assert len(caplog.records) == 2 and all("failing" in record.getMessage() for record in caplog.records)


@needs_triton
@pytest.mark.parametrize("name", ["xpu", "triton"])
def test_the_interpreter_makes_both_serve_the_cpu_by_name_only(name):
    code = f"import bnb_core; b = bnb_core.backends()[{name!r}]; print(b.unavailable, b.device_types, b.by_name_only)"
    assert told(code, interpret="1") == "None ('cpu',) True"


@needs_triton
@pytest.mark.parametrize(
    ("properties", "exact"),
    [({"has_subgroup_matrix_multiply_accumulate": value}, value) for value in (True, False)] + [({}, False)],
)
def test_intel_gpus_without_matrix_units_multiply_codes_in_f16(monkeypatch, properties, exact):
    from bnb_core.backends.triton import int8_matmul

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
        with pytest.raises(RuntimeError, match=r"paged memory on cpu .*cpu tensor\?.*needs a newer Triton.*not paged"):
            memory.allocate(10, torch.float32, torch.device("cpu"))
    gc.collect()
    assert released == [40, 40]


def test_paged_memory_is_tried_once(released):
    tried: list[int] = []
    memory = PinnedMemory(lambda tensor: tried.append(tensor.numel()))
    kept = [memory.allocate(numel, torch.float32, torch.device("cpu")) for numel in (5, 6)]
    assert tried == [5] and len(kept) == 2

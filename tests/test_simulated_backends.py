"""The GPU backends' code around their kernels, run in the simulator; without it these tests say so and are skipped."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

import bnb_core
from bnb_core import functional, registry
from bnb_core.backend import Kernel
from bnb_core.backends import compiled_gpu, gpu
from bnb_core.records import Weight4bit

SIMULATED = {"cuda-sim": "_cuda_kernels", "hip-sim": "_hip_kernels"}


@pytest.fixture(params=SIMULATED)
def simulated(request):
    backend = registry.backends()[request.param]
    if backend.unavailable:
        pytest.skip(f"{request.param}: {backend.unavailable}")
    with bnb_core.use_backend(request.param):
        yield import_module(f"bnb_core.backends.sim.{SIMULATED[request.param]}")


def test_torch_multiplies_int8_operands_at_aligned_addresses_only():
    A, B = torch.zeros(130 * 96 + 16, dtype=torch.int8), torch.zeros(40 * 96 + 16, dtype=torch.int8)

    def takes(offset_of_A, offset_of_B):
        return gpu._int_mm_takes(A[offset_of_A:][: 130 * 96].view(130, 96), B[offset_of_B:][: 40 * 96].view(40, 96))

    assert takes(0, 0) and takes(16, 16)
    assert not takes(1, 0) and not takes(0, 8)


def test_managed_memory_is_zero_and_limited_to_the_devices(simulated):
    address = simulated.allocate_managed(4096)
    assert ctypes.string_at(address, 4096) == bytes(4096)
    simulated.prefetch_managed(address, 4096, True, 0)
    simulated.prefetch_managed(address, 4096, False, 0)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for asked in (2**60, total - 2**20):  # more than the device has, and more than is free of it
        sentence = (
            rf"cannot allocate {asked} bytes of paged memory: device 0 has \d+ bytes free of {total}, .* 4096 in use"
        )
        with pytest.raises(RuntimeError, match=sentence):
            simulated.allocate_managed(asked)
    simulated.free_managed(address)


def test_a_call_that_failed_leaves_no_error_for_the_next_launch(simulated):
    with pytest.raises(RuntimeError, match="prefetch_managed: invalid argument"):
        simulated.prefetch_managed(0, 16, False, 0)
    functional.quantize_4bit(torch.randn(64))


CAPTURED = """
import sys
from importlib import import_module

import torch

import bnb_core
from bnb_core import functional, optim
from bnb_core.autograd import int8_linear

name, module = sys.argv[1:]
with bnb_core.use_backend(name):
    A = torch.randn(2, 1024, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(torch.randn(64, 1024), quant_type="nf4", compress_statistics=True)
    parameter = torch.nn.Parameter(torch.randn(8192))
    parameter.grad = torch.randn(8192)
    optimizer = optim.LAMB8bit([parameter])
    out, scales = torch.empty(1, 64), torch.rand(1024)
    pointers = [functional.get_ptr(tensor) for tensor in (torch.randn(1, 1024), packed, scales, state.code, out)]
    CB, SCB, _ = functional.int8_vectorwise_quant(torch.randn(64, 1024))
    import_module("bnb_core.backends.sim." + module).set_capturing(True)
    functional.gemm_4bit(A, packed, state)
    functional.dequantize_4bit(packed, state)
    functional.int8_double_quant(A.float())
    int8_linear(A, CB, SCB, None, 1.5)  # which columns have outliers is known to the device alone
    with bnb_core.batch_invariant():
        functional.gemm_4bit(A, packed, state)
        int8_linear(A, CB, SCB, None, 1.5)
    optimizer.step()
    functional.lib.cgemm_4bit_inference_naive_fp32(64, 1, 1024, *pointers, 64, 512, 64, 64, None)
"""


def test_the_first_calls_of_a_process_may_be_captured_in_a_graph(simulated):
    """What a capture refuses is refused: the simulator has a test of that."""
    name = next(name for name, module in SIMULATED.items() if simulated.__name__.endswith(module))
    command = [sys.executable, "-c", CAPTURED, name, SIMULATED[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Those in a record and in a list count, too."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", Device)
    calls = []

    def function(*arguments, **outputs):
        calls.append(arguments)

    kernel = compiled_gpu._on_its_device(Kernel(function, several=function))
    on_meta = torch.empty(4, device="meta")
    weight = Weight4bit(on_meta, (4,), on_meta, 64, "nf4")
    kernel.function(weight, torch.float32, out=on_meta)
    kernel.several("step", [on_meta], [on_meta])
    assert entered == [on_meta.device] * 2
    assert calls == [(weight, torch.float32), ("step", [on_meta], [on_meta])]

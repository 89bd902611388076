"""The GPU backends' code around their kernels, run in the simulator; without it these tests say so and are skipped."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import bnb_core
from bnb_core import functional, registry
from bnb_core.backends import compiled_gpu, dequantized, gpu, sim
from bnb_core.records import Weight4bit

SIMULATED = {"cuda-sim": "_cuda_kernels", "hip-sim": "_hip_kernels"}
FUSED_ROWS = 64
"""kFusedRows of csrc_cuda/gemm_4bit.cu."""


@pytest.fixture(params=SIMULATED)
def simulated(request):
    backend = registry.backends()[request.param]
    if backend.unavailable:
        pytest.skip(f"{request.param}: {backend.unavailable}")
    with bnb_core.use_backend(request.param):
        yield import_module(f"bnb_core.backends.sim.{SIMULATED[request.param]}")


@pytest.fixture
def wgmma_rows(simulated):
    """Sets up to how many rows of A products go to Hopper's kernel."""
    yield simulated.set_wgmma_rows
    simulated.set_wgmma_rows(sim.WGMMA_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [FUSED_ROWS, FUSED_ROWS + 1, 130])
def test_many_rows_are_multiplied_as_exactly_on_wgmma_as_by_torch(simulated, wgmma_rows, dtype, rows):
    weight, A = torch.randn(48, 320), torch.randn(rows, 320).to(dtype)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, blocksize=64)
    exact = A.double() @ functional.dequantize_4bit(packed, state).double().t()
    terms = A.double().abs() @ functional.dequantize_4bit(packed, state).double().abs().t()
    bound = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for most in (0, rows):
        wgmma_rows(most)
        product = functional.gemm_4bit(A, packed, state)
        assert ((product.double() - exact).abs() <= bound * terms).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_many_rows_are_multiplied_by_the_weights_that_dequantizing_gives(simulated, dtype, nested):
    """To the bit: rows of the identity pick them."""
    packed, state = functional.quantize_4bit(torch.randn(200, 448), compress_statistics=nested)
    state.dtype = dtype
    weights = functional.gemm_4bit(torch.eye(448, dtype=dtype), packed, state).t()
    assert torch.equal(weights, functional.dequantize_4bit(packed, state))


def test_hoppers_kernel_takes_what_it_can_read(simulated):
    """Whole steps of 64 columns, each in one block, at addresses that are multiples of 16."""
    codes = torch.zeros(2**16, dtype=torch.uint8)

    def takes(dtype=torch.bfloat16, K=192, blocksize=64, A_from=0, codes_from=0):
        A = torch.zeros(100 * K + A_from, dtype=dtype)[A_from:].view(100, K)
        weight = Weight4bit(codes[codes_from:][: 8 * K], (16, K), torch.zeros(1024), blocksize, "nf4")
        return simulated.takes_wgmma(A, weight)

    assert takes() == takes(dtype=torch.float16) == takes(blocksize=4096) == ("cuda" in simulated.__name__)
    assert not any(
        (
            takes(dtype=torch.float32),
            takes(K=64),
            takes(K=200),
            takes(blocksize=32),
            takes(A_from=1),
            takes(codes_from=8),
        )
    )


@pytest.mark.parametrize("most", [0, 99, 100])
def test_many_rows_go_to_hoppers_kernel_where_it_takes_them(simulated, wgmma_rows, monkeypatch, most):
    multiplied = []
    monkeypatch.setattr(dequantized, "_multiply", lambda A, weight, bias, out: multiplied.append(A.shape))
    wgmma_rows(most)
    for blocksize, rows in ((64, FUSED_ROWS), (64, 100), (32, 100)):
        packed, state = functional.quantize_4bit(torch.randn(16, 192), blocksize=blocksize)
        functional.gemm_4bit(torch.randn(rows, 192, dtype=torch.bfloat16), packed, state)
    assert len(multiplied) == (1 if "cuda" in simulated.__name__ and most == 100 else 2)


@pytest.mark.parametrize("variable", ["-1", "many", "64.0"])
def test_a_number_of_rows_that_is_none_is_an_error_that_names_the_variable(monkeypatch, variable):
    monkeypatch.setenv(compiled_gpu.WGMMA_VARIABLE, variable)
    for name in ("_other_maker", "_why_unavailable"):
        monkeypatch.setattr(compiled_gpu, name, lambda *of: None)
    monkeypatch.setattr(compiled_gpu, "import_module", lambda name: SimpleNamespace(set_wgmma_rows=int))
    with pytest.raises(registry.SettingError, match=f"BNB_WGMMA_ROWS: expected a number of rows.*, got '{variable}'"):
        compiled_gpu.make_backend(compiled_gpu.GpuPlatform("cuda", build="", compiler=""))


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

name, module = sys.argv[1:]
with bnb_core.use_backend(name):
    A = torch.randn(2, 1024, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(torch.randn(64, 1024), quant_type="nf4", compress_statistics=True)
    parameter = torch.nn.Parameter(torch.randn(8192))
    parameter.grad = torch.randn(8192)
    optimizer = optim.LAMB8bit([parameter])
    out, scales = torch.empty(1, 64), torch.rand(1024)
    pointers = [functional.get_ptr(tensor) for tensor in (torch.randn(1, 1024), packed, scales, state.code, out)]
    import_module("bnb_core.backends.sim." + module).set_capturing(True)
    functional.gemm_4bit(A, packed, state)
    functional.dequantize_4bit(packed, state)
    functional.int8_double_quant(A.float())
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

    kernel = compiled_gpu._on_its_device(registry.Kernel(function, several=function))
    on_meta = torch.empty(4, device="meta")
    weight = Weight4bit(on_meta, (4,), on_meta, 64, "nf4")
    kernel.function(weight, torch.float32, out=on_meta)
    kernel.several("step", [on_meta], [on_meta])
    assert entered == [on_meta.device] * 2
    assert calls == [(weight, torch.float32), ("step", [on_meta], [on_meta])]

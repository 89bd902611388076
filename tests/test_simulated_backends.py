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
from bnb_core.backends import compiled_gpu, gpu
from bnb_core.backends.native import DTYPE_CODES

SIMULATED = {"cuda-sim": "_cuda_kernels", "hip-sim": "_hip_kernels"}


@pytest.fixture(params=SIMULATED)
def simulated(request):
    backend = registry.backends()[request.param]
    if backend.unavailable:
        pytest.skip(f"{request.param}: {backend.unavailable}")
    with bnb_core.use_backend(request.param):
        yield import_module(f"bnb_core.backends.sim.{SIMULATED[request.param]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [gpu.FUSED_ROWS, gpu.FUSED_ROWS + 1, 130])
def test_the_fused_kernel_takes_as_many_rows_as_torch(simulated, monkeypatch, dtype, rows):
    weight, A = torch.randn(48, 320), torch.randn(rows, 320).to(dtype)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, blocksize=64)
    exact = A.double() @ functional.dequantize_4bit(packed, state).double().t()
    terms = A.double().abs() @ functional.dequantize_4bit(packed, state).double().abs().t()
    bound = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for fused_rows in (gpu.FUSED_ROWS, rows):
        monkeypatch.setattr(gpu.GpuKernels, "most_fused_rows", lambda *operands, most=fused_rows: most)
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
    A, packed = torch.zeros(2**16, dtype=torch.bfloat16), torch.zeros(2**16, dtype=torch.uint8)

    def takes(A=A, dtype=torch.bfloat16, K=192, packed=packed, blocksize=64):
        return simulated.takes_wgmma(A, DTYPE_CODES[dtype], K, packed, blocksize)

    assert takes() == takes(dtype=torch.float16) == takes(blocksize=4096) == ("cuda" in simulated.__name__)
    assert not any(
        (
            takes(dtype=torch.float32),
            takes(K=64),
            takes(K=200),
            takes(blocksize=32),
            takes(A[1:]),
            takes(packed=packed[8:]),
        )
    )


def test_many_rows_go_to_hoppers_kernel_where_it_takes_them(simulated, monkeypatch):
    multiplied = []
    monkeypatch.setattr(gpu, "_multiply", lambda A, weight, bias, out: multiplied.append(A.shape))
    for blocksize, rows in ((64, gpu.FUSED_ROWS), (64, 100), (32, 100)):
        packed, state = functional.quantize_4bit(torch.randn(16, 192), blocksize=blocksize)
        functional.gemm_4bit(torch.randn(rows, 192, dtype=torch.bfloat16), packed, state)
    assert len(multiplied) == (1 if "cuda" in simulated.__name__ else 2)


@pytest.mark.parametrize("variable", ["-1", "many", "64.0"])
def test_a_number_of_rows_that_is_none_is_an_error_that_names_the_variable(monkeypatch, variable):
    monkeypatch.setenv(compiled_gpu.WGMMA_VARIABLE, variable)
    for name in ("_other_maker", "_why_unavailable"):
        monkeypatch.setattr(compiled_gpu, name, lambda *of: None)
    monkeypatch.setattr(compiled_gpu, "import_module", lambda name: SimpleNamespace())
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

"""The GPU backends' code around their kernels, run in the simulator; without it these tests say so and are skipped."""

from __future__ import annotations

import ctypes
from importlib import import_module

import pytest
import torch

import bnb_core
from bnb_core import functional, registry
from bnb_core.backends import gpu

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
    through_torch = functional.gemm_4bit(A, packed, state)
    monkeypatch.setattr(gpu, "FUSED_ROWS", rows)
    fused = functional.gemm_4bit(A, packed, state)
    exact = A.double() @ functional.dequantize_4bit(packed, state).double().t()
    terms = A.double().abs() @ functional.dequantize_4bit(packed, state).double().abs().t()
    bound = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for product in (fused, through_torch):
        assert ((product.double() - exact).abs() <= bound * terms).all()


def test_managed_memory_is_zero_and_limited_to_the_devices(simulated):
    address = simulated.allocate_managed(4096)
    assert ctypes.string_at(address, 4096) == bytes(4096)
    simulated.prefetch_managed(address, 4096, True, 0)
    simulated.prefetch_managed(address, 4096, False, 0)
    with pytest.raises(
        RuntimeError, match=r"cannot allocate \d+ bytes of paged memory: device 0 has \d+, of which .* 4096"
    ):
        simulated.allocate_managed(2**60)
    simulated.free_managed(address)

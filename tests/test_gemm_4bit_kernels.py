"""Every kernel for products with a 4-bit weight in the simulator, and which of them the table chooses."""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from gemm_4bit_choice import KERNELS, program

import bnb_core
from bnb_core import functional, registry
from bnb_core.backend import SettingError
from bnb_core.backends import compiled_gpu, dequantized, gemm_4bit_kernel
from bnb_core.backends.sim.gpu import ORDERS
from bnb_core.records import Weight4bit

SIMULATED = {"cuda-sim": "_cuda_kernels", "hip-sim": "_hip_kernels"}
NVIDIAS_ALONE = {"wgmma", *(name for name in KERNELS if name.startswith("staged"))}
ANY_DTYPE = {"f32", "dense"}
BOUND = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(params=SIMULATED)
def simulated(request):
    backend = registry.backends()[request.param]
    if backend.unavailable:
        pytest.skip(f"{request.param}: {backend.unavailable}")
    module = import_module(f"bnb_core.backends.sim.{SIMULATED[request.param]}")
    order = module.order()
    with bnb_core.use_backend(request.param):
        yield module
    module.set_order(order)
    module.set_gemm_4bit_kernel(gemm_4bit_kernel.AS_THE_TABLE_SAYS)


def served_by(module, A, packed, state) -> str:
    weight = Weight4bit(packed, tuple(state.shape), state.absmax, state.blocksize, state.quant_type)
    return module.gemm_4bit_kernels[module.gemm_4bit_kernel(A, weight)]


def takes(name, module, dtype) -> bool:
    """Whether it takes a product of large enough blocks and whole accesses."""
    return name in ANY_DTYPE or (dtype != torch.float32 and ("cuda" in module.__name__ or name not in NVIDIAS_ALONE))


def rows_of(kernel: str) -> int:
    """Of A that a block takes."""
    return int(re.sub(r"\D.*", "", kernel.lstrip("abcdefghijklmnopqrstuvwxyz")) or 64)


def test_the_module_has_the_kernels_of_the_table(simulated):
    assert list(simulated.gemm_4bit_kernels) == KERNELS


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_as_exact_as_promised_in_all_orders(simulated, kernel, dtype):
    """With one row, with all of a block's, and with one more; N and K no multiples of what a block takes."""
    simulated.set_gemm_4bit_kernel(KERNELS.index(kernel))
    rows = rows_of(kernel)
    for order, M, N, K, nested in zip(
        ORDERS, (1, rows, rows + 1), (75, 200, 136), (1088, 576, 320), (False, True, False), strict=True
    ):
        simulated.set_order(order)
        A, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
        packed, state = functional.quantize_4bit(torch.randn(N, K), compress_statistics=nested, blocksize=64)
        assert (served_by(simulated, A, packed, state) == kernel) == takes(kernel, simulated, dtype)
        weight = functional.dequantize_4bit(packed, state).double()
        exact = A.double() @ weight.t() + bias.double()
        terms = A.double().abs() @ weight.abs().t() + bias.double().abs()
        product = functional.gemm_4bit(A, packed, state, bias=bias)
        assert ((product.double() - exact).abs() <= BOUND[dtype] * terms).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_on_wgmma_weights_are_those_that_dequantizing_gives(simulated, dtype, nested):
    """To the bit: rows of the identity pick them."""
    simulated.set_gemm_4bit_kernel(KERNELS.index("wgmma"))
    packed, state = functional.quantize_4bit(torch.randn(200, 448), compress_statistics=nested)
    state.dtype = dtype
    weights = functional.gemm_4bit(torch.eye(448, dtype=dtype), packed, state).t()
    assert torch.equal(weights, functional.dequantize_4bit(packed, state))


def test_hoppers_kernel_takes_what_it_can_read(simulated):
    """Whole steps of 64 columns, each in one block, at addresses that are multiples of 16."""
    codes = torch.zeros(2**16, dtype=torch.uint8)
    simulated.set_gemm_4bit_kernel(KERNELS.index("wgmma"))

    def takes(dtype=torch.bfloat16, K=192, blocksize=64, A_from=0, codes_from=0):
        A = torch.zeros(100 * K + A_from, dtype=dtype)[A_from:].view(100, K)
        weight = Weight4bit(codes[codes_from:][: 8 * K], (16, K), torch.zeros(1024), blocksize, "nf4")
        return KERNELS[simulated.gemm_4bit_kernel(A, weight)] == "wgmma"

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


def test_what_the_table_leaves_to_torch_is_multiplied_by_torch(simulated, monkeypatch):
    multiplied = []
    monkeypatch.setattr(dequantized, "_multiply", lambda A, weight, bias, out: multiplied.append(A.shape))
    packed, state = functional.quantize_4bit(torch.randn(16, 192), blocksize=64)
    for rows in (1, 64, 2000):
        functional.gemm_4bit(torch.randn(rows, 192, dtype=torch.bfloat16), packed, state)
    assert multiplied == [(2000, 192)]


TABLE = """
#include "gemm_4bit_kernels.h"

namespace bnb {
constexpr Gemm4bitChoice kGemm4bitChoices[] = {
    {80, 8, 1000, Gemm4bitKernel::mma8},
    {80, 8, kAnyNumber, Gemm4bitKernel::mma16},
    {90, 64, kAnyNumber, Gemm4bitKernel::wgmma},
    {kAnyChip, 32, kAnyNumber, Gemm4bitKernel::mma32},
    {kAnyChip, 64, kAnyNumber, Gemm4bitKernel::mma64},
    {kAnyChip, kAnyNumber, kAnyNumber, Gemm4bitKernel::dense},
};
}  // namespace bnb
"""


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    return program(tmp_path_factory.mktemp("choice"), TABLE)


def test_a_product_has_the_first_choice_of_the_newest_listed_chip_that_covers_it(chosen):
    assert chosen(80, 8, 1000) == chosen(86, 1, 999) == chosen(89, 2, 1) == "mma8"
    assert chosen(80, 8, 1001) == "mma16"
    assert chosen(90, 1, 1) == chosen(120, 64, 10**12) == "wgmma"


def test_what_a_chips_choice_does_not_take_or_cover_has_those_for_any_chip(chosen):
    assert chosen(75, 1, 1) == chosen(80, 9, 1) == chosen(90, 1, 1, "wgmma") == "mma32"
    assert chosen(75, 1, 1, "mma32") == "mma64"
    assert chosen(90, 65, 1) == "dense"
    assert chosen(90, 65, 1, "dense") == "f32"


def test_a_kernel_that_there_is_not_is_an_error_that_names_the_variable(monkeypatch):
    monkeypatch.setenv(gemm_4bit_kernel.VARIABLE, "fastest")
    for name in ("_other_maker", "_why_unavailable"):
        monkeypatch.setattr(compiled_gpu, name, lambda *of: None)
    built = SimpleNamespace(gemm_4bit_kernels=("f32", "dense"))
    monkeypatch.setattr(compiled_gpu, "import_module", lambda name: built)
    with pytest.raises(SettingError, match="BNB_GEMM_4BIT_KERNEL: expected f32 or dense, got 'fastest'"):
        compiled_gpu.make_backend(compiled_gpu.GpuPlatform("cuda", build="", compiler="", minor=10))


def test_the_kernel_that_the_variable_names_serves(simulated, monkeypatch):
    packed, state = functional.quantize_4bit(torch.randn(64, 256), blocksize=64)
    A = torch.randn(1, 256, dtype=torch.float16)
    for asked, serving in (("mma64", "mma64"), ("", "mma8")):
        monkeypatch.setenv(gemm_4bit_kernel.VARIABLE, asked)
        gemm_4bit_kernel.ask_for_kernel(simulated)
        assert served_by(simulated, A, packed, state) == serving

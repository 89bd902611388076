"""Kernels that others register for the operators of bitsandbytes serve the API of bnb_core, and disturb nobody.

Each test is a function of this module that a process of its own calls, in which bnb_core takes the name bitsandbytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import PACKAGES, run_python
from torch.utils import backend_registration

import bnb_core
from bnb_core import functional as F
from bnb_core import nn, registry
from bnb_core.backend import BackendError

needs_fake_device = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device in Python",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that registers kernels on the CPU, installed."""
    folder = tmp_path_factory.mktemp("kernels")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = str(PACKAGES / "registered_kernels")
    subprocess.run([*command, "--target", str(folder), source], check=True, capture_output=True, timeout=300)
    return folder


def run(function: Callable[[], None], *folders: Path) -> None:
    """Call a function of this module in a process of its own."""
    path = os.pathsep.join(map(str, [Path(__file__).parent, *folders]))
    result = run_python(f"import test_registered_kernels as t; t.{function.__name__}()", Path(path))
    assert result.returncode == 0, result.stdout + result.stderr


def served(call: Callable[[], Any]) -> tuple[Any, list[tuple[str, str]]]:
    """What a call gives, and who served which primitive."""
    seen: list[tuple[str, str]] = []
    with registry.observe(lambda *by: seen.append(by)):
        return call(), seen


def refusal(call: Callable[[], Any]) -> str:
    """Why no backend serves a call."""
    with pytest.raises(BackendError) as error:
        call()
    return str(error.value)


def _sample() -> tuple[torch.Tensor, torch.Tensor]:
    """A [5, 160] and W [24, 160], with an outlier column."""
    torch.manual_seed(0)
    A, W = torch.randn(5, 160), torch.randn(24, 160)
    A[2, 7] = 20.0
    return A, W


def test_nothing_is_available_where_nothing_is_registered():
    backend = registry.backends()["operators"]
    assert not backend.available and "install_as_bitsandbytes()" in str(backend.unavailable)
    with pytest.raises(BackendError, match="'operators' is not available"), bnb_core.use_backend("operators"):
        pass
    assert set(registry.serving("mps").values()) == {"reference"}


def a_package_registers_and_is_named() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bnb_core.install_as_bitsandbytes()
        bnb_core.install_as_bitsandbytes()
    failures = [str(warning.message) for warning in caught]
    assert len(failures) == 2, failures
    assert "'absent' of bnb-registered-kernels" in failures[0] and "no such device" in failures[0]
    assert "'not-callable' of bnb-registered-kernels" in failures[1] and "TypeError" in failures[1]
    import registered_kernels

    assert registered_kernels.calls == ["registered for bitsandbytes"]
    registered_kernels.calls.clear()
    _a_native_backend_goes_first_and_named_kernels_serve_strictly(registered_kernels.calls)
    _layers_of_int8(registered_kernels.calls)
    _steps_with_8bit_state()


def _a_native_backend_goes_first_and_named_kernels_serve_strictly(calls: list[str]) -> None:
    A, W = _sample()
    packed, state = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)

    def results() -> list[torch.Tensor]:
        x = A.clone().requires_grad_()
        y = bnb_core.matmul_4bit(x, packed, state)
        (dx,) = torch.autograd.grad(y.sum(), x)
        product = F.int8_linear_matmul(A.clamp(-9, 9).char().view(1, 5, 160), W.char())
        return [F.dequantize_4bit(packed, state), product, y, dx]

    expected, seen = served(results)
    assert {backend for _, backend in seen} == {"cpu"} and calls == []
    torch.ops.bitsandbytes.dequantize_4bit(packed, torch.ones(60), 64, "nf4", W.shape, torch.float32)
    assert calls == ["dequantize_4bit"]  # by the dispatcher
    calls.clear()
    with bnb_core.use_backend("operators"):
        got, seen = served(results)
        assert {backend for _, backend in seen} == {"operators"}
        assert calls == ["dequantize_4bit", "dequantize_4bit", "int8_linear_matmul", "dequantize_4bit"], calls
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        torch.testing.assert_close(got[2:], expected[2:], rtol=1e-5, atol=1e-5)
        assert "no kernel for bitsandbytes::quantize_4bit is registered on cpu" in refusal(lambda: F.quantize_4bit(W))
        serving = registry.serving("cpu")
        assert serving["gemm_4bit"] == "operators" and "has no kernel for it on cpu" in serving["quantize_4bit"]


def _layers_of_int8(calls: list[str]) -> None:
    """Outliers and all, over a kernel for the int8 product alone."""
    A, W = _sample()
    layer = nn.Linear8bitLt(160, 24, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": W, "bias": torch.randn(24)})
    layer.to("cpu")
    y = layer(A)
    with bnb_core.use_backend("int8_mixed_scaled_mm=operators,*=cpu"):
        torch.testing.assert_close(layer(A), y, rtol=1e-4, atol=1e-4)
    assert calls[-1] == "int8_linear_matmul"


def _steps_with_8bit_state() -> None:
    """Tensors of any strides; but the operator has no bound on the update, and is not for such steps."""

    def add(name: str, g: torch.Tensor, p: torch.Tensor, *rest: Any) -> None:
        assert p.is_contiguous()
        p.add_(g)

    def step(max_unorm: float) -> torch.Tensor:
        p, g = torch.zeros(2, 300).t(), torch.ones(1).expand(300, 2)
        states = [torch.zeros(300, 2, dtype=torch.uint8) for _ in range(2)]
        maps = [F.create_dynamic_map(), F.create_dynamic_map(signed=False)]
        scales = [torch.zeros(3), torch.zeros(3)]
        F.optimizer_update_8bit_blockwise(
            "adam", g, p, *states, 0.9, 0.99, 0.0, 0.0, 1e-8, 1, 0.1, *maps, *scales, unorm_vec=torch.zeros(1),
            max_unorm=max_unorm,
        )  # fmt: skip
        return p

    torch.library.register_kernel("bitsandbytes::optimizer_update_8bit_blockwise", "cpu", add)
    with bnb_core.use_backend("operators"):
        assert torch.equal(step(0.0), torch.ones(300, 2))
        assert "has no max_unorm" in refusal(lambda: step(0.5))


def test_a_package_of_kernels(folder):
    run(a_package_registers_and_is_named, folder)


def _program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "bnb_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120)


def test_the_suite_holds_what_a_package_registered_to_the_contract(folder):
    result = _program(folder, "conformance", "--backend", "operators", "--primitive", "int8_linear_matmul")
    assert result.returncode == 0 and "0 failed" in result.stdout, result.stdout + result.stderr


def test_info_lists_the_operators_that_have_kernels(folder):
    facts = json.loads(_program(folder, "info", "--json").stdout)
    assert facts["backends"]["operators"]["available"]
    assert facts["backends"]["operators"]["details"] == {"cpu": "dequantize_4bit, int8_linear_matmul"}
    assert set(facts["serving"]["dequantize_4bit"].values()) == {"cpu"}


def kernels_registered_late_serve_a_device_without_a_backend() -> None:
    from fake_device import DEVICE, to_device, to_host

    bnb_core.install_as_bitsandbytes()
    A, W = _sample()
    calls: list[str] = []

    def register(name: str, function: Callable[..., Any]) -> None:
        """The function of host tensors, for the device."""

        def kernel(*arguments: Any) -> Any:
            calls.append(name)
            result = function(*map(to_host, arguments))
            return tuple(map(to_device, result)) if isinstance(result, tuple) else to_device(result)

        torch.library.register_kernel(f"bitsandbytes::{name}", DEVICE, kernel)

    def by(expected: str, call: Callable[[], Any]) -> list[str]:
        """The operators that were called."""
        calls.clear()
        with torch.inference_mode():  # autograd would make tensors of its own
            _, seen = served(call)
        assert {backend for _, backend in seen} == {expected}, seen
        return list(calls)

    def matmul(rows: int, state: Any) -> Callable[[], None]:
        x, (packed, weight_state) = A[:rows], state
        expected = F.gemm_4bit(x, packed, weight_state)

        def call() -> None:
            on_device = weight_state.from_dict(weight_state.as_dict(), DEVICE)
            y = F.gemm_4bit(x.to(DEVICE), packed.to(DEVICE), on_device)
            torch.testing.assert_close(y.to("cpu"), expected, rtol=1e-4, atol=1e-4)

        return call

    plain = F.quantize_4bit(W, quant_type="nf4")
    nested = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)

    assert set(registry.serving(DEVICE).values()) == {"reference"}
    assert by("reference", matmul(5, plain)) == []

    register("dequantize_4bit", lambda A, absmax, *rest: _dequantized(A, absmax, *rest))
    assert registry.serving(DEVICE)["gemm_4bit"] == "operators"
    assert registry.serving(DEVICE)["quantize_4bit"] == "reference"
    assert by("operators", matmul(5, plain)) == by("operators", matmul(1, nested)) == ["dequantize_4bit"]
    assert by("reference", lambda: F.int8_vectorwise_dequant(W.char().to(DEVICE), torch.ones(24, device=DEVICE))) == []

    register("gemv_4bit", lambda A, B, shape, absmax, code, size: A @ _dequantized(B, absmax, size, "nf4", shape).t())
    assert by("operators", matmul(1, plain)) == ["gemv_4bit"]
    assert by("operators", matmul(5, plain)) == by("operators", matmul(1, nested)) == ["dequantize_4bit"]

    def gemm(
        A: Any, B: Any, shape: Any, absmax: Any, size: int, quant_type: str, bias: Any = None, *double: Any
    ) -> Any:
        if double:
            absmax_8bit, code, offset = double
            absmax = code[absmax_8bit.long()] * absmax.repeat_interleave(256)[: absmax_8bit.numel()] + offset
        return A @ _dequantized(B, absmax, size, quant_type, shape).t()

    register("gemm_4bit", gemm)
    assert by("operators", matmul(1, plain)) == by("operators", matmul(5, nested)) == ["gemm_4bit"]

    register("quantize_blockwise", lambda A, code, size: (A.char(), torch.ones(1)))
    with pytest.raises(
        RuntimeError, match=r"quantize_blockwise gave \(5, 160\) of torch.int8, expected .* torch.uint8"
    ):
        F.quantize_blockwise(A.to(DEVICE))


def _dequantized(A: Any, absmax: Any, size: int, quant_type: str, shape: Any, dtype: Any = torch.float32) -> Any:
    """By definition, from f32 scales."""
    packed = A.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    values = F.get_4bit_type(quant_type)[codes.int()].view(-1, size) * absmax.view(-1, 1)
    return values.to(dtype).view(*shape)


@needs_fake_device
def test_a_device_without_a_backend():
    run(kernels_registered_late_serve_a_device_without_a_backend)

"""The Triton kernels in the interpreter, beyond the conformance suite: forms that it does not reach, and the mending.

Run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton: pip install bnb_core[triton]")
tl = pytest.importorskip("triton.language")

import bnb_core  # noqa: E402
from bnb_core import primitives, registry  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from bnb_core.backends.xpu import int8_matmul  # noqa: E402


@pytest.fixture(autouse=True)
def served_by_xpu():
    with bnb_core.use_backend("xpu"):
        yield


@triton.jit
def convert_kernel(source, out, n, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    values = tl.load(source + index, mask=index < n, other=0.0)
    tl.store(out + index, values.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def arithmetic_kernel(a, b, out, is_less, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(out + index, x * y)
    tl.store(out + SIZE + index, x + y)
    tl.store(is_less + index, (x < y).to(tl.int8))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + row * SIZE + column), tl.load(b + row * SIZE + column))
    tl.store(out + row * SIZE + column, product)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0), b.nan_to_num(nan=7.0, posinf=8.0, neginf=9.0))


AWKWARD = torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, -65505.0])
SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf")])


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_as_torch_does(source, dtype):
    values = torch.cat([AWKWARD, SPECIAL, torch.randn(4000)]).to(source)
    out = torch.empty(values.numel(), dtype=dtype)
    convert_kernel[(1,)](values, out, values.numel(), 4096)
    assert same(out, values.to(dtype))


def test_bfloat16_sums_products_and_comparisons_are_those_of_the_values():
    a, b = torch.randn(256).bfloat16(), torch.randn(256).bfloat16()
    out, is_less = torch.empty(2, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.int8)
    arithmetic_kernel[(1,)](a, b, out, is_less, 256)
    assert same(out, torch.stack([a * b, a + b]))
    assert torch.equal(is_less.bool(), a < b)


def test_a_bfloat16_dot_is_that_of_the_values():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, out, 32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_products_are_the_same_where_there_is_no_dot_of_codes(monkeypatch, dtype):
    M, N, K = 18, 70, 1100
    A, B = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    A[0], B[0] = -128, -128
    mask = torch.arange(K) % 97 == 0
    X, scales = torch.randn(M, K).to(dtype), (torch.rand(M), torch.rand(N))
    with_dot = primitives.int8_mixed_scaled_mm(X, A, B, *scales, mask, None)
    monkeypatch.setattr(int8_matmul, "has_int8_dot", lambda device: False)
    assert torch.equal(primitives.int8_linear_matmul(A[:5], B).long(), A[:5].long() @ B.long().t())
    assert torch.equal(primitives.int8_mixed_scaled_mm(X, A, B, *scales, mask, None), with_dot)


def bounded_step(p: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, float]:
    """p after a step of SGD with a bounded update, and the norm of the update."""
    p, unorm = p.clone(), torch.full((1,), -1.0)
    hyperparameters = (0.9, 0.0, 0.0, 0.0, 0.0, 1, 0.5, 0.0, 1.0, 0.02, False)
    primitives.optimizer_update_32bit("momentum", g, p, torch.zeros_like(p), None, unorm, *hyperparameters)
    return p, unorm.item()


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_norms_neither_overflow_nor_vanish(magnitude):
    n = 3 * 2048 + 5
    p, g = torch.randn(n) * magnitude, torch.randn(n) * magnitude
    stepped, unorm = bounded_step(p, g)
    with registry.use_backend("reference"):
        expected, expected_unorm = bounded_step(p, g)
    torch.testing.assert_close(stepped, expected, rtol=1e-6, atol=1e-6 * magnitude)
    assert unorm == pytest.approx(expected_unorm, rel=1e-6) and unorm == pytest.approx(
        g.double().norm().item(), rel=1e-6
    )


def test_the_update_of_nothing_has_norm_zero():
    assert bounded_step(torch.empty(0), torch.empty(0))[1] == 0.0

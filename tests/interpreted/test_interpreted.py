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
from bnb_core.records import Int8Rows, Int8Weight, OptimizerState32bit, OptimizerStep  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from bnb_core.backends.triton import _with_first_calls, int8_matmul, optimizer  # noqa: E402
from bnb_core.backends.triton.interpreter import InterpreterBuilder, mended  # noqa: E402
from bnb_core.backends.triton.launch import launch, tile_of_program, tiles  # noqa: E402


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
    launch(convert_kernel, 1, values, out, values.numel(), SIZE=4096)
    assert same(out, values.to(dtype))


def test_a_bfloat16_dot_is_that_of_the_values():
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    out = torch.empty(32, 32)
    launch(dot_kernel, 1, a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_a_row_of_a_dot_has_the_same_bits_at_every_place():
    a, b = torch.randn(32, 32), torch.randn(32, 32)
    out, reversed_out = torch.empty(2, 32, 32)
    launch(dot_kernel, 1, a, b, out, SIZE=32)
    launch(dot_kernel, 1, a.flip(0).contiguous(), b, reversed_out, SIZE=32)
    assert torch.equal(out, reversed_out.flip(0))


def test_the_interpreter_is_as_it_was_around_our_kernels():
    before = dict(vars(InterpreterBuilder))
    with mended(), mended():
        assert InterpreterBuilder.create_dot is not before["create_dot"]
    with pytest.raises(ZeroDivisionError), mended():
        raise ZeroDivisionError
    primitives.int8_linear_matmul(*torch.ones(2, 3, 16, dtype=torch.int8))
    assert dict(vars(InterpreterBuilder)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_products_are_the_same_where_there_is_no_dot_of_codes(monkeypatch, dtype):
    M, N, K = 18, 70, 1100
    A, B = (torch.randint(-128, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    A[0], B[0] = -128, -128
    mask = torch.arange(K) % 97 == 0
    X, operands = torch.randn(M, K).to(dtype), (Int8Rows(A, torch.rand(M)), Int8Weight(B, torch.rand(N)))
    with_dot = primitives.int8_mixed_scaled_mm(X, *operands, mask, None)
    monkeypatch.setattr(int8_matmul, "has_int8_dot", lambda device: False)
    assert torch.equal(primitives.int8_linear_matmul(A[:5], B).long(), A[:5].long() @ B.long().t())
    assert torch.equal(primitives.int8_mixed_scaled_mm(X, *operands, mask, None), with_dot)


def test_a_kernel_that_triton_is_imported_for_late_is_the_kernel():
    code, out = torch.linspace(-1, 1, 256), torch.empty(70)
    q, absmax = primitives.quantize_blockwise(torch.randn(70), code, 64)
    _with_first_calls()["dequantize_blockwise"](q, absmax, code, 64, torch.float32, out=out)
    assert torch.equal(out, primitives.dequantize_blockwise(q, absmax, code, 64, torch.float32))


@triton.jit
def which_tile_kernel(out, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tile_of_program(columns, ROWS, COLUMNS)
    inside = (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    tl.store(out + place, tl.load(out + place, mask=inside, other=0) + 1, mask=inside)


def test_the_tiles_of_programs_cover_a_matrix_once():
    out = torch.zeros(12, 21, dtype=torch.int32)
    launch(which_tile_kernel, tiles(12, 21, 4, 8), out, 21, ROWS=4, COLUMNS=8)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize(("rule", "kernels"), [("adam", 1), ("lion", 1), ("momentum", 2)])
def test_only_momentum_has_a_kernel_of_its_own_for_the_first_step(monkeypatch, rule, kernels):
    compiled = set()

    def launched(kernel, programs, *arguments, **constants):
        names = [name for name in constants if name.isupper()]
        compiled.add(tuple((name, constants[name]) for name in names))

    monkeypatch.setattr(optimizer, "launch", launched)
    g, p, state1, state2 = torch.randn(4, 300)
    state = OptimizerState32bit(state1, state2 if rule == "adam" else None)
    for number in (1, 2, 3):
        step = OptimizerStep(rule, number, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8)
        primitives.optimizer_update_32bit(step, g, p, state, None)
    assert len(compiled) == kernels


def bounded_step(p: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, float]:
    """p after a step of SGD with a bounded update, and the norm of the update."""
    p, unorm = p.clone(), torch.full((1,), -1.0)
    step = OptimizerStep("momentum", 1, lr=0.5, beta1=0.9, max_unorm=0.02)
    primitives.optimizer_update_32bit(step, g, p, OptimizerState32bit(torch.zeros_like(p)), unorm)
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

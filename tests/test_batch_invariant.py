"""Under bnb_core.batch_invariant() a row of a layer's result is the same alone and in any batch, to the bit."""

from __future__ import annotations

import threading

import pytest
import torch

import bnb_core
from bnb_core import functional, nn, primitives, registry
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.backend import Backend
from bnb_core.quant_state import weight_4bit
from bnb_core.records import Int8Rows, Int8Weight


def _experts():
    experts = nn.Experts4bit(6, 128, 64, device="cpu").to("cpu")

    def forward(x):
        top = (x[:, :6].float()).topk(2)
        return experts(x, top.indices, top.values.softmax(-1).to(x.dtype))

    return forward


LAYERS = {
    "4-bit": lambda: nn.LinearNF4(128, 96).to("cpu"),
    "8-bit": lambda: nn.Linear8bitLt(128, 96, has_fp16_weights=False).to("cpu"),
    "8-bit with outliers": lambda: nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=2.0).to("cpu"),
    "experts": _experts,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_rows_of_a_layer_do_not_depend_on_their_batch(build, dtype):
    layer, x = build(), torch.randn(37, 128).to(dtype)
    with bnb_core.batch_invariant():
        whole = layer(x)
        for rows in ([0], [36], [5, 20], list(range(16)), list(range(36, 10, -1))):
            assert torch.equal(layer(x[rows]), whole[rows]), rows


@torch.no_grad()
def test_an_outlier_of_another_row_changes_nothing():
    layer, x = nn.Linear8bitLt(64, 8, has_fp16_weights=False, threshold=6.0).to("cpu"), torch.randn(2, 64)
    x[1, 3] = 50.0
    with bnb_core.batch_invariant():
        assert torch.equal(layer(x)[:1], layer(x[:1]))
        assert torch.equal(layer(x)[1:], layer(x[1:]))
    assert not torch.equal(layer(x)[:1], layer(x[:1]))


def test_codes_from_elsewhere_keep_their_meaning_in_the_mode():
    A, (CB, SCB, _) = torch.randn(4, 64), functional.int8_vectorwise_quant(torch.randn(8, 64))
    A[1, 3] = 50.0
    q, row_stats, mask = primitives.int8_vectorwise_quant(A, 6.0)
    arguments = A, Int8Rows(q, row_stats), Int8Weight(CB, SCB), mask, None
    expected = primitives.int8_mixed_scaled_mm(*arguments)
    with bnb_core.batch_invariant():
        torch.testing.assert_close(primitives.int8_mixed_scaled_mm(*arguments), expected, atol=0.5, rtol=0.0)


@torch.no_grad()
def test_a_compiled_function_is_in_the_mode_when_it_is_called_in_it():
    layer, x = nn.LinearNF4(128, 96).to("cpu"), torch.randn(37, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outside = compiled(x)
    with bnb_core.batch_invariant():
        inside = compiled(x)
        assert torch.equal(inside, torch.cat([compiled(row) for row in x.split(1)]))
    assert not torch.equal(inside, outside)
    assert torch.equal(compiled(x), outside)


def test_it_cannot_be_entered_in_a_compiled_function():
    layer = nn.LinearNF4(128, 96).to("cpu")

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        with bnb_core.batch_invariant():
            return layer(x)

    with pytest.raises(Exception, match="batch_invariant"):
        function(torch.randn(3, 128))


def test_use_backend_keeps_it_and_other_threads_are_not_in_it():
    in_it = []

    def look():
        in_it.append(registry.BATCH_INVARIANT in registry._override_in_force())

    with bnb_core.batch_invariant(), bnb_core.use_backend("reference"):
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert registry.served_by("gemm_4bit", "cpu") == "reference"
    with bnb_core.use_backend("reference"), bnb_core.batch_invariant():
        look()
        assert registry.served_by("gemm_4bit", "cpu") == "reference"
    look()
    assert in_it == [True, False, True, False]


def test_gradients_are_those_of_elsewhere():
    layer = nn.LinearNF4(128, 96).to("cpu")
    x, dy = torch.randn(20, 128, requires_grad=True), torch.randn(20, 96)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    calls = []
    with bnb_core.batch_invariant():
        y = layer(x)
        with registry.observe(lambda primitive, backend: calls.append(primitive)):
            (gradient,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(gradient, expected) and calls == ["gemm_4bit_backward"]


def test_a_kernel_that_says_nothing_about_rows_is_called_for_one_at_a_time():
    rows = []

    def gemm(A, B, bias, out):
        rows.append(len(A))
        out.fill_(len(rows))

    weight = weight_4bit(*functional.quantize_4bit(torch.randn(8, 64)))
    arguments = torch.randn(3, 64), weight, None
    with registry.registered(Backend("counting", ("cpu",), 1000, {"gemm_4bit": gemm})):
        primitives.gemm_4bit(*arguments)
        with bnb_core.batch_invariant():
            result = primitives.gemm_4bit(*arguments)
    assert rows == [3, 1, 1, 1]
    assert result[:, 0].tolist() == [2, 3, 4]


@torch.no_grad()
def test_weights_stored_the_other_way_round():
    packed, state = functional.quantize_4bit(torch.randn(3, 64, 128), quant_type="nf4")
    x, offsets = torch.randn(20, 64).bfloat16(), torch.tensor([0, 4, 4, 20], dtype=torch.int32)
    with bnb_core.batch_invariant():
        whole = grouped_linear_4bit(x, packed, state, offsets, transposed=True)
        one = grouped_linear_4bit(x[7:8], packed, state, torch.tensor([0, 0, 0, 1], dtype=torch.int32), transposed=True)
    assert torch.equal(one, whole[7:8])

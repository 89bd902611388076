"""Experts in 4 bits: what they compute, and that they are modules like any other."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import bnb_core
from bnb_core import functional
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.autograd.grouped_low_rank import grouped_low_rank
from bnb_core.nn import Experts4bit, GroupedLinear4bit

EXPERTS, HIDDEN, INTERMEDIATE = 6, 64, 96


def dequantized(layer: GroupedLinear4bit) -> torch.Tensor:
    """[E, out, in]."""
    weights = functional.dequantize_4bit(layer.weight, layer.quant_state)
    return weights.transpose(1, 2) if layer.transposed else weights


def one_by_one(experts: Experts4bit, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the experts make of each token, one expert after the other."""
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    total = torch.zeros_like(hidden)
    for e in range(experts.num_experts):
        projected = nn.functional.linear(hidden, dequantized(first)[e], None if first.bias is None else first.bias[e])
        gate, up = projected.chunk(2, dim=-1) if experts.has_gate else (projected, 1.0)
        down = experts.down_proj
        out = nn.functional.linear(
            experts.act_fn(gate) * up, dequantized(down)[e], None if down.bias is None else down.bias[e]
        )
        total = total + out * (weights * (index == e)).sum(dim=1, keepdim=True)
    return total


def inputs(tokens: int = 9, top_k: int = 2, dtype: torch.dtype = torch.float32):
    index = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :top_k].contiguous()
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, top_k)


@pytest.fixture
def experts() -> Experts4bit:
    return Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE).to("cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_gate": False, "act_fn": nn.GELU()},
        {"bias": True},
        {"transposed": True},
        {"transposed": True, "bias": True},
        {"quant_type": "fp4", "compress_statistics": False, "blocksize": 128},
        {"quant_storage": torch.bfloat16},
    ],
    ids=str,
)
def test_each_token_gets_the_sum_of_its_experts(backend, options):
    experts = Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE, **options).to("cpu")
    for parameter in experts.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    hidden, index, weights = inputs()
    torch.testing.assert_close(experts(hidden, index, weights), one_by_one(experts, hidden, index, weights))


def test_gradients_of_tokens_routing_and_biases(backend):
    experts = Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE, bias=True).to("cpu")
    hidden, index, weights = inputs()
    wanted = (hidden.requires_grad_(), weights.requires_grad_(), experts.gate_up_proj.bias, experts.down_proj.bias)
    dY = torch.randn(9, HIDDEN)
    got = torch.autograd.grad(experts(hidden, index, weights), wanted, dY)
    expected = torch.autograd.grad(one_by_one(experts, hidden, index, weights), wanted, dY)
    torch.testing.assert_close(got, expected)


def test_an_expert_that_does_not_exist_counts_for_nothing(experts):
    """So expert parallelism marks tokens that another process serves."""
    hidden, index, weights = inputs()
    elsewhere = index.clone()
    elsewhere[:, 1] = EXPERTS
    expected = experts(hidden, index[:, :1], weights[:, :1])
    torch.testing.assert_close(experts(hidden, elsewhere, weights), expected)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (1, EXPERTS), (40, 3)])
def test_any_number_of_tokens(experts, tokens, top_k):
    hidden, index, weights = inputs(tokens, top_k)
    torch.testing.assert_close(experts(hidden, index, weights), one_by_one(experts, hidden, index, weights))


def test_the_output_has_the_dtype_of_the_input(experts):
    hidden, index, weights = inputs(dtype=torch.bfloat16)
    assert experts(hidden, index, weights).dtype == torch.bfloat16
    computing_in_f32 = GroupedLinear4bit(2, 64, 32, compute_dtype=torch.float32).to("cpu")
    offsets = torch.tensor([0, 3, 9], dtype=torch.int32)
    exact = grouped_linear_4bit(
        hidden.float(), computing_in_f32.weight, computing_in_f32.quant_state, offsets, computing_in_f32.bias
    )
    assert torch.equal(computing_in_f32(hidden, offsets), exact.bfloat16())


def test_compiled_without_a_graph_break_and_once_for_any_routing(experts):
    hidden, index, weights = inputs()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, index, weights), experts(hidden, index, weights))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = torch.randint(EXPERTS, index.shape)
        torch.testing.assert_close(compiled(hidden, other, weights), experts(hidden, other, weights))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(experts, copied):
    arguments = inputs()
    assert torch.equal(copied(experts)(*arguments), experts(*arguments))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_restores_them(experts, device):
    arguments, state = inputs(), experts.state_dict()
    fresh = Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE, device=device)
    fresh.load_state_dict(state, assign=device == "meta")
    assert torch.equal(fresh(*arguments), experts(*arguments))
    assert {name: value.tolist() for name, value in fresh.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }


def test_weights_are_not_used_before_they_are_quantized():
    with pytest.raises(RuntimeError, match="not quantized yet"):
        Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE)(*inputs())


def test_a_block_that_reaches_into_two_weights_is_refused():
    with pytest.raises(ValueError, match=r"^blocksize: .* 200 elements of a weight, got 64"):
        GroupedLinear4bit(4, 10, 20)


@pytest.mark.parametrize("mode", [nullcontext, bnb_core.batch_invariant])
@pytest.mark.parametrize("offsets", [[0, 3, 2, 9], [1, 3, 4, 9], [0, 3, 4, 8], [0, 3, 4, 12], [0, -1, 4, 9]])
def test_offsets_that_are_none_are_refused_where_the_host_reads_them(backend, offsets, mode):
    layer = GroupedLinear4bit(3, 64, 32).to("cpu")
    wrong = pytest.raises(ValueError, match=r"^offsets: expected numbers that ascend from 0 to the 9 rows, got \[")
    with wrong, mode():
        layer(torch.randn(9, 64), torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^offsets:"):
        bnb_core.primitives.grouped_gemm_4bit_backward(
            torch.randn(9, 32), layer.quant_state.weight_4bit(layer.weight), torch.tensor(offsets, dtype=torch.int32)
        )


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_low_rank_products_and_their_gradients(rank, dtype):
    offsets = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    x, A, B = (torch.randn(*shape, dtype=dtype) for shape in ((9, 64), (3, rank, 64), (3, 32, rank)))
    arguments = [tensor.requires_grad_() for tensor in (x, A, B)]
    dY = torch.randn(9, 32, dtype=dtype)
    got = grouped_low_rank(*arguments, offsets)
    rows = [slice(0, 3), slice(3, 3), slice(3, 9)]
    expected = torch.cat([x[m].double() @ A[e].double().t() @ B[e].double().t() for e, m in enumerate(rows)])
    tolerance = {"rtol": 2e-2, "atol": 1.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got.double(), expected, **tolerance)
    for gradient, exact in zip(
        torch.autograd.grad(got, arguments, dY), torch.autograd.grad(expected, arguments, dY.double()), strict=True
    ):
        torch.testing.assert_close(gradient, exact, **tolerance)


@pytest.mark.parametrize(
    "options", [{}, {"compress_statistics": False}, {"quant_storage": torch.bfloat16}, {"transposed": True}], ids=str
)
def test_a_change_is_added_to_each_weight_and_quantized_as_the_whole_would_be(backend, options):
    layer = GroupedLinear4bit(3, 64, 32, **options).to("cpu")
    change = torch.randn(3, *layer._weight_shape()[1:])
    sums = functional.dequantize_4bit(layer.weight, layer.quant_state) + change
    layer.add_(lambda e: change[e])
    codes, state = functional.quantize_4bit(
        sums, compress_statistics=options.get("compress_statistics", True), quant_type="nf4",
        quant_storage=options.get("quant_storage", torch.uint8),
    )  # fmt: skip
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.view(torch.uint8))
    assert layer.quant_state == layer.weight.quant_state == state

"""Tokens sent to the ranks of their experts: the results and the gradients of one process."""

from __future__ import annotations

import copy
from typing import Any

import documentation
import pytest
import torch
from documentation import ROOT, SEVERAL_PROCESSES
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bnb_core import functional
from bnb_core.autograd.grouped_low_rank import grouped_low_rank
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Experts4bit, GroupedLinear4bit, OffloadedLinear4bit, parallelize_experts
from bnb_core.nn.fused_experts import quantized_experts

EXPERTS, HIDDEN, INTERMEDIATE = 4, 64, 32
KINDS: dict[str, dict[str, Any]] = {
    "double-quantized": {},
    "plain": {"compress_statistics": False},
    "bias and transposed": {"bias": True, "transposed": True},
    "bf16 storage": {"quant_storage": torch.bfloat16, "has_gate": False},
}
BATCHES = {
    "one each": (5, 5),
    "uneven": (7, 2),
    "a rank without tokens": (0, 6),
    "no tokens": (0, 0),
}


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def _experts(**options: Any) -> Experts4bit:
    torch.manual_seed(0)
    experts = Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE, **options).to("cpu")
    for parameter in experts.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return experts


def _inputs(tokens: int, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of this rank, and the gradient of its result."""
    generator = torch.Generator().manual_seed(1 + torch.distributed.get_rank())
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :2].contiguous()
    x, weights, dy = (torch.randn(tokens, n, generator=generator) for n in (HIDDEN, 2, HIDDEN))
    return x, index, weights, dy


def _close(got: Tensor, expected: Tensor) -> None:
    bound = 1e-4 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def _compare(whole: nn.Module, cut: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Results and gradients on this rank."""
    hidden, index, weights, dy = inputs
    gradients = []
    for module in (whole, cut):
        x, factors = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        y = module(x, index, factors)
        y.backward(dy)
        gradients.append((y.detach(), x.grad, factors.grad))
    for expected, got in zip(*gradients, strict=True):
        _close(got, expected)


def _of_all_ranks(gradient: Tensor | None, like: Tensor) -> Tensor:
    total = torch.zeros_like(like) if gradient is None else gradient.clone()
    torch.distributed.all_reduce(total)
    return total


def _same_as_one_process() -> None:
    rank, mesh = torch.distributed.get_rank(), _mesh()
    for options in KINDS.values():
        whole = _experts(**options)
        cut = parallelize_experts(copy.deepcopy(whole), mesh)
        for tokens in BATCHES.values():
            _compare(whole, cut, _inputs(tokens[rank]))
        for (name, of_cut), of_whole in zip(cut.named_parameters(), whole.parameters(), strict=True):
            if of_whole.requires_grad:
                assert of_cut.to_local().shape[0] * mesh.size() == EXPERTS, name
                _close(of_cut.grad.full_tensor(), _of_all_ranks(of_whole.grad, of_whole))
            else:
                assert of_cut.to_local().nbytes * mesh.size() == of_whole.nbytes, name


def test_results_and_gradients_are_those_of_one_process(ranks: Ranks):
    ranks.run(2, _same_as_one_process)


def _all_to_one_and_to_none() -> None:
    whole = _experts()
    cut = parallelize_experts(copy.deepcopy(whole), _mesh())
    x, index, weights, dy = _inputs(6)
    for experts in (torch.full_like(index, EXPERTS - 1), torch.where(index == 1, EXPERTS, index)):
        _compare(whole, cut, (x, experts, weights, dy))


def test_all_tokens_at_one_expert_and_tokens_without_one(ranks: Ranks):
    ranks.run(2, _all_to_one_and_to_none)


class Adapted(nn.Module):
    """A projection with an adapter of low rank for each of some experts."""

    def __init__(self, base: GroupedLinear4bit, part: slice = slice(None)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        A, B = (torch.randn(EXPERTS, *size, generator=generator) for size in ((4, INTERMEDIATE), (HIDDEN, 4)))
        self.base, self.A, self.B = base, nn.Parameter(A[part]), nn.Parameter(B[part])

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return self.base(x, offsets) + grouped_low_rank(x, self.A, self.B, offsets)


def _adapters_of_own_experts() -> None:
    rank, mesh = torch.distributed.get_rank(), _mesh()
    whole = _experts()
    cut = parallelize_experts(copy.deepcopy(whole), mesh)
    own = slice(rank * cut.down_proj.groups, (rank + 1) * cut.down_proj.groups)
    whole.down_proj, cut.down_proj = Adapted(whole.down_proj), Adapted(cut.down_proj, own)
    _compare(whole, cut, _inputs((3, 0)[rank]))
    for name in ("A", "B"):
        of_whole, of_cut = getattr(whole.down_proj, name), getattr(cut.down_proj, name)
        _close(of_cut.grad, _of_all_ranks(of_whole.grad, of_whole)[own])


def test_adapters_of_a_ranks_own_experts_learn_from_all_tokens(ranks: Ranks):
    ranks.run(2, _adapters_of_own_experts)


class SourceOfRowsInOrder(nn.Module):
    """Experts that are given as many rows each, as Llama 4 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INTERMEDIATE))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN))
        self.act_fn, self.num_experts = nn.SiLU(), EXPERTS

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise NotImplementedError


def _rows_in_order() -> None:
    whole: Any = quantized_experts(SourceOfRowsInOrder())
    cut: Any = parallelize_experts(nn.ModuleList([copy.deepcopy(whole)]), _mesh())[0]
    rows = torch.randn(EXPERTS * (2 + torch.distributed.get_rank()), HIDDEN)
    _close(cut(rows), whole(rows))


def test_experts_that_take_rows_in_order(ranks: Ranks):
    ranks.run(2, _rows_in_order)


def _state_dict() -> str:
    whole = _experts(bias=True)
    cut = parallelize_experts(copy.deepcopy(whole), _mesh())
    state_dict = cut.state_dict()
    for name in ("gate_up_proj", "down_proj"):
        layer = getattr(whole, name)
        same_bits(name, state_dict[f"{name}.weight"], layer.weight.data)
        same_bits(name, state_dict[f"{name}.weight.absmax"], functional.dequantize_absmax(layer.quant_state))
        same_bits(name, state_dict[f"{name}.bias"].full_tensor(), layer.bias.data)
    plain = {key: value.full_tensor() if key.endswith("bias") else value for key, value in state_dict.items()}
    loaded = _experts(bias=True)
    loaded.load_state_dict(plain)
    x, index, weights, _ = _inputs(3)
    torch.testing.assert_close(loaded(x, index, weights), whole(x, index, weights), rtol=0, atol=0)
    with pytest.raises(RuntimeError) as raised:
        cut.load_state_dict(plain)
    return str(raised.value)


def test_the_state_dict_has_all_experts(ranks: Ranks):
    for message in ranks.run(2, _state_dict):
        assert "this layer has been cut over processes; load the state dict before that" in message


def _refused() -> list[str]:
    mesh, square = _mesh(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "experts"))
    adapted, offloaded = _experts(), _experts()
    adapted.down_proj = Adapted(adapted.down_proj)
    offloaded.down_proj = OffloadedLinear4bit.__new__(OffloadedLinear4bit)
    nn.Module.__init__(offloaded.down_proj)
    cases: list[tuple[nn.Module, DeviceMesh]] = [
        (nn.Linear(2, 2), mesh),
        (nn.ModuleDict({"a": _experts(), "b": Experts4bit(3, HIDDEN, INTERMEDIATE).to("cpu")}), mesh),
        (_experts(), square),
        (parallelize_experts(_experts(), mesh), mesh),
        (adapted, mesh),
        (offloaded, mesh),
        (Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE), mesh),
    ]
    messages = []
    for module, of_case in cases:
        before = [(name, id(parameter)) for name, parameter in module.named_parameters()]
        with pytest.raises((ValueError, RuntimeError)) as raised:
            parallelize_experts(module, of_case)
        assert [(name, id(parameter)) for name, parameter in module.named_parameters()] == before
        messages.append(str(raised.value))
    with pytest.raises(RuntimeError, match=r"^weight: its groups are on several processes"):
        parallelize_experts(_experts(), mesh).down_proj.add_(lambda e: torch.zeros(1))
    return messages


def test_what_cannot_be_divided_is_refused(ranks: Ranks):
    beginnings = (
        "module: expected quantized experts",
        "module: b: 3 experts over 2 processes: expected a multiple of 2",
        "mesh: expected one dimension, got 2",
        "module: its experts are on several processes already",
        "module: expected projections GroupedLinear4bit, got Adapted, GroupedLinear4bit, SiLU",
        "module: expected projections GroupedLinear4bit, got GroupedLinear4bit, OffloadedLinear4bit, SiLU",
        "",
    )
    for messages in ranks.run(2, _refused):
        for message, beginning in zip(messages, beginnings, strict=True):
            assert message.startswith(beginning), message
        assert "quantized" in messages[-1]


def _documented() -> None:
    page = ROOT / "docs" / "distributed.md"
    blocks = [block for block in documentation.python_blocks(page) if "parallelize_experts" in block.text]
    assert len(blocks) == 1 and blocks[0].needs == SEVERAL_PROCESSES
    documentation.run_blocks(page, blocks)


def test_the_documented_code_runs(ranks: Ranks):
    ranks.run(2, _documented)

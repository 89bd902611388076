"""Experts in 4 bits under FSDP2: whole experts on each rank, or parts of one, and the results of one process."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Experts4bit

HIDDEN = 64


class AdaptedExperts(nn.Module):
    """Frozen experts, an adapter of low rank before them, and a router."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = Experts4bit(experts, HIDDEN, 32).requires_grad_(False)
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.down, self.up = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        top = self.router(x).softmax(-1).topk(1)
        return self.experts(x + self.up(self.down(x)), top.indices, top.values)


def _sharded_experts(experts: int) -> dict[str, list[Tensor]]:
    """The codes of each projection that this rank holds, and of which all of them are."""
    torch.manual_seed(0)
    plain = AdaptedExperts(experts).to("cpu")
    x, dy = torch.randn(7, HIDDEN), torch.randn(7, HIDDEN)
    sharded = copy.deepcopy(plain)
    for layer in (sharded.experts, sharded):
        fully_shard(layer)
    expected, got = plain(x), sharded(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    expected.backward(dy)
    got.backward(dy)
    for (name, parameter), of_plain in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.full_tensor(), of_plain.grad, rtol=1e-6, atol=1e-6, msg=name)
    for key, value in get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)).items():
        same_bits(key, value, plain.state_dict()[key])
    held = {}
    for name in ("gate_up_proj", "down_proj"):
        weight, whole = getattr(sharded.experts, name).weight, getattr(plain.experts, name).weight.data
        assert isinstance(weight, DTensor)
        held[name] = [weight.to_local().clone(), whole.clone()]
    return held


@pytest.mark.parametrize("experts", [4, 3], ids=["whole experts", "half an expert"])
def test_experts_shard_and_compute_the_same(experts: int, ranks: Ranks):
    by_rank = ranks.run(2, _sharded_experts, experts)
    for name in ("gate_up_proj", "down_proj"):
        whole = by_rank[0][name][1]
        parts = whole.chunk(2)
        for (held, _), part in zip((of_rank[name] for of_rank in by_rank), parts, strict=True):
            same_bits(name, held, part)
            assert held.numel() * 2 == whole.numel()
    if experts % 2 == 0:
        of_expert = whole.numel() // experts
        assert by_rank[1][name][0].numel() % of_expert == 0

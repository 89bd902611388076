"""Meshes of two dimensions: FSDP2 in copies (HSDP), and FSDP2 over tensor parallelism."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized import adapted_model, one_layer
from ranks import Ranks
from test_tensor_parallel import KINDS, Block
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import build, optimizer_for

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _mesh(outer: str, inner: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=(outer, inner))


def _losses(model: nn.Module, optimizer: Any, parts: int = 1, part: int = 0, first: int = 0) -> list[float]:
    """Each of ``parts`` of the ranks has other rows of every batch."""
    width = next(module for module in model.modules() if isinstance(module, nn.Linear)).in_features
    losses = []
    for step in range(first, first + 3):
        x = torch.randn(8, width, generator=torch.Generator().manual_seed(step)).chunk(parts)[part]
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        total = loss.detach().clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            total /= torch.distributed.get_world_size()
        losses.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _hsdp(kind: str) -> list[float]:
    mesh = _mesh("replicate", "shard")
    model = build() if kind == "plain" else adapted_model(kind)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_for("AdamW8bit", _trained(model), min_8bit_size=256)
    return _losses(model, optimizer, 4, torch.distributed.get_rank())


@pytest.mark.parametrize("kind", ["plain", "4bit", "8bit"])
def test_copies_of_shards_train_as_one_process(kind: str, ranks: Ranks):
    model = build() if kind == "plain" else adapted_model(kind)
    losses = _losses(model, optimizer_for("AdamW8bit", _trained(model), min_8bit_size=256))
    for of_rank in ranks.run(4, _hsdp, kind):
        assert of_rank == pytest.approx(losses, abs=2e-3, rel=0)


def _round_trip_in_copies(layer: str) -> None:
    plain, x = one_layer(layer)
    mesh = _mesh("replicate", "shard")
    sharded = fully_shard(copy.deepcopy(plain), mesh=mesh)
    torch.testing.assert_close(sharded(x), plain(x), rtol=0, atol=0)
    other = fully_shard(one_layer(layer, seed=5)[0], mesh=mesh)
    set_model_state_dict(other, get_model_state_dict(sharded))
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["nf4, torch.uint8", "nf4, torch.float32", "8-bit", "4-bit embedding"])
def test_a_quantized_layer_in_copies_of_shards_round_trips(layer: str, ranks: Ranks):
    ranks.run(4, _round_trip_in_copies, layer)


class PlainBlock(Block):
    """The same layers, not quantized."""

    def __init__(self, width: int = 256, hidden: int = 512) -> None:
        nn.Module.__init__(self)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.adapter = nn.Linear(width, width)


def _block(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return (PlainBlock() if kind == "none" else Block(kind)).to("cpu")


def _over_tensor_parallelism(kind: str, seed: int = 0) -> tuple[nn.Module, DeviceMesh]:
    mesh = _mesh("data", "tensor")
    model = parallelize_module(_block(kind, seed), mesh["tensor"], PLAN)
    fully_shard(model, mesh=mesh["data"])
    return model, mesh


def _values(model: nn.Module) -> dict[str, Tensor]:
    detached = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in detached.items()}


def _two_dimensional(kind: str, optimizer_kind: str) -> tuple[list[float], dict[str, Tensor], int]:
    model, mesh = _over_tensor_parallelism(kind)
    held = sum(p.to_local().nbytes for p in (model.up.weight, model.down.weight))
    optimizer = optimizer_for(optimizer_kind, _trained(model))
    losses = _losses(model, optimizer, 2, mesh["data"].get_local_rank())
    return losses, _values(model), held


CASES = [("none", "AdamW8bit"), ("none", "LAMB32bit"), *((kind, "AdamW8bit") for kind in KINDS)]


@pytest.mark.parametrize(("kind", "optimizer_kind"), CASES)
def test_fsdp2_over_tensor_parallelism_trains_as_one_process(kind: str, optimizer_kind: str, ranks: Ranks):
    """8-bit inputs are scaled by their part of a row."""
    model = _block(kind)
    size = model.up.weight.nbytes + model.down.weight.nbytes
    losses = _losses(model, optimizer_for(optimizer_kind, _trained(model)))
    assert losses[-1] < losses[0]
    for of_rank, values, held in ranks.run(4, _two_dimensional, kind, optimizer_kind):
        assert held * 4 == size
        assert of_rank == pytest.approx(losses, abs=2e-2 if kind == "8-bit" else 2e-3, rel=0)
        if optimizer_kind == "LAMB32bit":  # whose update depends on norms of whole parameters
            for name, value in _values(model).items():
                torch.testing.assert_close(values[name], value, rtol=0, atol=1e-4, msg=name)


def _resumed(full: bool) -> tuple[list[float], list[float]]:
    model, mesh = _over_tensor_parallelism("none")
    part = mesh["data"].get_local_rank()
    optimizer = optimizer_for("AdamW8bit", _trained(model))
    _losses(model, optimizer, 2, part)
    options = StateDictOptions(full_state_dict=full)
    saved = copy.deepcopy(
        (get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options))
    )
    after = _losses(model, optimizer, 2, part, first=3)
    other, _ = _over_tensor_parallelism("none", seed=5)
    resumed = optimizer_for("AdamW8bit", _trained(other))
    set_model_state_dict(other, saved[0], options=options)
    set_optimizer_state_dict(other, resumed, saved[1], options=options)
    return after, _losses(other, resumed, 2, part, first=3)


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "full"])
def test_state_over_tensor_parallelism_resumes(full: bool, ranks: Ranks):
    for after, resumed in ranks.run(4, _resumed, full):
        assert resumed == (pytest.approx(after, abs=2e-3, rel=0) if full else after)

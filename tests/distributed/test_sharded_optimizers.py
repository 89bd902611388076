"""Optimizers on DTensor parameters take the steps of one process, and the whole parameter decides on their state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from training import KINDS, ODD_WIDTH, WIDTH, build, optimizer_for, train

from bnb_core import optim
from bnb_core.conformance.compare import same_bits

BOUND = SimpleNamespace(max_unorm=1e-3)


def _fsdp2_losses(kind: str, width: int) -> list[float]:
    model = build(width=width)
    fully_shard(model)
    return train(model, optimizer_for(kind, model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_under_fsdp2_are_those_of_one_process(kind: str, world_size: int, ranks: Ranks):
    for width in (WIDTH, ODD_WIDTH):
        model = build(width=width)
        losses = train(model, optimizer_for(kind, model.parameters()))
        for of_rank in ranks.run(world_size, _fsdp2_losses, kind, width):
            assert of_rank == pytest.approx(losses, abs=2e-3, rel=0)


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) * 10.0**-step for step in range(3)]


def _steps_of_one_process(kind: str, shape: tuple[int, ...], **settings: Any) -> Tensor:
    p = nn.Parameter(start(shape))
    optimizer = optimizer_for(kind, [p], lr=1e-2, **settings)
    for p.grad in gradients(shape):
        optimizer.step()
    return p.detach()


def _steps_of_a_dtensor(
    kind: str, shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: list[Any], settings: dict[str, Any]
) -> Tensor:
    mesh = init_device_mesh("cpu", mesh_shape)
    p = nn.Parameter(distribute_tensor(start(shape), mesh, placements))
    optimizer = optimizer_for(kind, [p], lr=1e-2, **settings)
    for gradient in gradients(shape):
        p.grad = distribute_tensor(gradient, mesh, placements)
        optimizer.step()
    return p.detach().full_tensor()


LAYOUTS = {
    "rows": ((32, 256), (4,), [Shard(0)]),
    "an empty shard": ((3, 2048), (4,), [Shard(0)]),
    "one dimension": ((8192,), (4,), [Shard(0)]),
    "copies of shards": ((32, 256), (2, 2), [Replicate(), Shard(0)]),
    "rows and columns": ((32, 1024), (2, 2), [Shard(0), Shard(1)]),
    "copies": ((32, 256), (4,), [Replicate()]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_whole_blocks_take_the_bits_of_the_whole(kind: str, layout: str, ranks: Ranks):
    """But for the norms of LAMB and LARS, which are added up in another order."""
    shape, mesh_shape, placements = LAYOUTS[layout]
    expected = _steps_of_one_process(kind, shape)
    for value in ranks.run(4, _steps_of_a_dtensor, kind, shape, mesh_shape, placements, {}):
        if kind.startswith(("LAMB", "LARS")):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        else:
            same_bits(kind, value, expected)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "Lion32bit", "SGD8bit"])
def test_a_bounded_update_takes_the_norms_of_the_whole(kind: str, ranks: Ranks):
    shape, settings = (32, 256), {"args": BOUND}
    expected = _steps_of_one_process(kind, shape, **settings)
    assert not torch.allclose(expected, _steps_of_one_process(kind, shape), atol=1e-3)
    for value in ranks.run(4, _steps_of_a_dtensor, kind, shape, (4,), [Shard(0)], settings):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def _steps_with_partial_gradients() -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(start((32, 256)), mesh, [Shard(0)]))
    optimizer = optimizer_for("AdamW8bit", [p], lr=1e-2)
    for gradient in gradients((32, 256)):
        part = gradient * (0.25, 0.75)[torch.distributed.get_rank()]
        p.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        optimizer.step()
    return p.detach().full_tensor()


def test_a_gradient_that_is_a_sum_over_ranks_is_summed_up(ranks: Ranks):
    for value in ranks.run(2, _steps_with_partial_gradients):
        torch.testing.assert_close(value, _steps_of_one_process("AdamW8bit", (32, 256)), rtol=1e-5, atol=1e-3)


def _refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.ones(8, 8), mesh, [Partial()], run_check=False)
    messages = []
    for values, settings in ((partial, {}), (sharded, {"args": BOUND, "capturable": True})):
        p = nn.Parameter(values)
        p.grad = values.detach().clone()
        optimizer = optim.AdamW([p], **settings)
        with pytest.raises(ValueError) as raised:
            optimizer.step()
        messages.append(str(raised.value))
        same_bits("p", p.detach().to_local(), values.to_local())
        assert not optimizer.state
    return messages


def test_what_cannot_be_stepped_is_refused_before_anything_changes(ranks: Ranks):
    for of_partial, of_bound in ranks.run(2, _refusals):
        assert "expected DTensors with placements Shard or Replicate" in of_partial
        assert "capturable=False" in of_bound


def _forms() -> dict[str, tuple[bool, int]]:
    model = nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 62, bias=False), nn.Linear(62, 66))
    fully_shard(model)
    optimizer = optim.AdamW8bit(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = ((name, optimizer.state[p]["state1"]) for name, p in model.named_parameters())
    return {name: (state1.dtype == torch.uint8, state1.numel()) for name, state1 in states}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_size_of_the_whole_parameter_decides_on_8_bit_state(world_size: int, ranks: Ranks):
    """4160, 4030 and 4092 elements; on 2 and 4 ranks every shard has fewer than 4096."""
    quantized = {"0.weight": True, "0.bias": False, "1.weight": False, "2.weight": False, "2.bias": False}
    sizes = dict.fromkeys(quantized, 0)
    for forms in ranks.run(world_size, _forms):
        assert {name: form for name, (form, _) in forms.items()} == quantized
        sizes = {name: size + forms[name][1] for name, size in sizes.items()}
    assert sizes == {"0.weight": 4160, "0.bias": 65, "1.weight": 4030, "2.weight": 4092, "2.bias": 66}


def _clipped_norm() -> float:
    model = build()
    if torch.distributed.is_initialized():
        fully_shard(model)
    optimizer = optimizer_for("AdamW8bit", model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def test_gradients_are_clipped_by_the_norm_of_the_whole_model(ranks: Ranks):
    assert ranks.run(4, _clipped_norm) == [pytest.approx(_clipped_norm(), rel=1e-5)] * 4


def _compiled_and_not(kind: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Graphs and graph breaks; the backend runs what the compiler has captured, without code of its own."""
    results = []
    torch._dynamo.reset()
    counters.clear()
    for compiled in (False, True):
        model = build()
        fully_shard(model)
        optimizer = optimizer_for(kind, model.parameters(), capturable=True, **settings)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        steps = SimpleNamespace(step=step, zero_grad=optimizer.zero_grad)
        losses = train(model, steps)
        states = [state for p in model.parameters() for state in optimizer.state[p].values()]
        results.append((losses, [p.detach().to_local() for p in model.parameters()] + states))
    (losses, tensors), (of_compiled, others) = results
    assert of_compiled == losses
    for tensor, other in zip(tensors, others, strict=True):
        assert torch.equal(other, tensor)
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("AdamW8bit", {}), ("AdEMAMix8bit", {}), ("SGD32bit", {"momentum": 0.0})],
)
def test_a_compiled_step_takes_the_bits_of_one_that_is_not(kind: str, settings: dict[str, Any], ranks: Ranks):
    for graphs, breaks in ranks.run(2, _compiled_and_not, kind, settings):
        assert (graphs, breaks) == (1, 0)


def _bounded_and_compiled() -> str:
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamW([p], args=BOUND, capturable=True)
    with pytest.raises(Exception, match="capturable=False") as raised:
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    same_bits("p", p.detach().to_local(), torch.ones(4, 8))
    return str(raised.value)


def test_a_compiled_step_refuses_norms_of_shards(ranks: Ranks):
    for message in ranks.run(2, _bounded_and_compiled):
        assert "max_unorm: a capturable optimizer cannot bound" in message

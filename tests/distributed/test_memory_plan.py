"""What `bnb-core plan` says, held to what ranks have in training: each part within 5 %."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from llama import decoder
from ranks import Ranks
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bnb_core import optim
from bnb_core.nn import Linear4bit, Linear8bitLt
from bnb_core.plan import Settings, Shape, plan

SMALL = Shape(layers=2, width=256, mlp_width=704, kv_width=128, vocabulary=512)
SHAPES = {"small": SMALL, "deep, tied": Shape(4, 192, 512, 192, 400, tied=True)}
CASES = [
    ("small", Settings(ranks=4, dtype_bytes=4, sequence=64, batch=2)),
    ("small", Settings(ranks=2, dtype_bytes=4, sequence=64, lora_rank=32, state_bits=32, double_quantization=False)),
    ("deep, tied", Settings(ranks=2, dtype_bytes=4, sequence=96, bits=8, checkpointing=False)),
    ("deep, tied", Settings(ranks=1, dtype_bytes=4, sequence=64, checkpointing=False)),
    ("small", Settings(ranks=1, dtype_bytes=4, sequence=128)),
]


class Kept:
    """The bytes that autograd keeps, each storage once; parameters are no part of it."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._others = {p.untyped_storage().data_ptr() for p in parameters}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in self._others:
            self._sizes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)  # so that no other tensor gets its address
        return tensor

    @property
    def total(self) -> int:
        return sum(self._sizes.values())


def _scale_tensors(module: Any) -> list[Tensor]:
    if isinstance(module, Linear4bit):
        return [v for k, v in module.quant_state.as_dict(packed=True).items() if "bitsandbytes" not in k]
    return [module.SCB] if isinstance(module, Linear8bitLt) else []


def _measured(shape: Shape, settings: Settings) -> dict[str, int]:
    model = decoder(shape, settings)
    tokens = torch.randint(shape.vocabulary, (settings.batch, settings.sequence + 1))
    inputs = settings.batch * settings.sequence * shape.width * settings.dtype_bytes
    result = {"activations": _kept_by_autograd(model, tokens, settings, inputs)}
    if settings.ranks > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = (optim.AdamW8bit if settings.state_bits == 8 else optim.AdamW32bit)(trained)
    gathered: list[tuple[int, int]] = []
    first = model.layers[0]
    first.norms[1].register_forward_hook(lambda *_: gathered.append((_plain(first), _plain(model, first))))
    model.loss(tokens).backward()
    optimizer.step()
    scales = [t for m in model.modules() for t in _scale_tensors(m)]
    result["scales"] = sum(t.nbytes for t in scales)
    result["weights"] = sum(_local(p).nbytes for p in model.parameters() if not p.requires_grad)
    result["adapters"] = sum(_local(p).nbytes for p in trained)
    result["gradients"] = sum(_local(p.grad).nbytes for p in trained)
    states = [t for p in trained for k, t in optimizer.state[p].items() if k.startswith(("state", "absmax"))]
    result["states"] = sum(t.nbytes for t in states)
    result["gathered_layers"] = 2 * gathered[0][0] if settings.ranks > 1 else 0
    result["gathered_root"] = gathered[0][1] if settings.ranks > 1 else 0
    return result


def _local(p: Any) -> Tensor:
    return p.to_local() if isinstance(p, DTensor) else p


def _plain(module: torch.nn.Module, but: torch.nn.Module | None = None) -> int:
    """The bytes of the parameters that are gathered now."""
    others = set(but.parameters()) if but is not None else set()
    return sum(p.nbytes for p in module.parameters() if not isinstance(p, DTensor) and p not in others)


def _kept_by_autograd(model: Any, tokens: Tensor, settings: Settings, inputs: int) -> int:
    parameters = [*model.parameters(), *(t for m in model.modules() for t in _scale_tensors(m))]
    of_layer, of_loss = Kept(parameters), Kept(parameters)
    x = model.embedding(tokens[:, :-1]).requires_grad_(True)
    with saved_tensors_hooks(of_layer.pack, lambda t: t):
        y = model.layers[0](x)
    logits = model.head(y.detach())
    with saved_tensors_hooks(of_loss.pack, lambda t: t):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).requires_grad_(True), tokens[:, 1:].flatten())
    layers = len(model.layers)
    of_layers = of_layer.total + (layers - 1) * inputs if settings.checkpointing else layers * of_layer.total
    return of_layers + of_loss.total + logits.nbytes


@pytest.mark.parametrize(("shape", "settings"), CASES)
def test_each_part_is_what_a_rank_has(shape: str, settings: Settings, ranks: Ranks):
    planned = plan(SHAPES[shape], settings)
    for measured in ranks.run(settings.ranks, _measured, SHAPES[shape], settings):
        assert measured == {name: pytest.approx(getattr(planned, name), rel=0.05) for name in measured}
        assert sum(measured.values()) == pytest.approx(planned.total, rel=0.05)


def test_a_plan_for_more_ranks_takes_less_on_each():
    totals = [plan(SMALL, replace(CASES[0][1], ranks=ranks)).states for ranks in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 4

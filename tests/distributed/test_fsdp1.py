"""Optimizers under FSDP1, which joins parameters and cuts them anywhere."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from training import ODD_WIDTH, build, optimizer_for, train

from bnb_core import optim

CPU = torch.device("cpu")
# To a CPU tensor, torch's offload to the CPU is no copy: all states of any optimizer would be the last one.
CONFIGS: dict[str, tuple[StateDictType, Any, Any]] = {
    "full": (
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(rank0_only=False),
        FullOptimStateDictConfig(rank0_only=False, offload_to_cpu=False),
    ),
    "sharded": (StateDictType.SHARDED_STATE_DICT, None, ShardedOptimStateDictConfig(offload_to_cpu=False)),
}


def _setup(kind: str, use_orig_params: bool, seed: int, form: str) -> tuple[FSDP, Any]:
    model = FSDP(build(seed, ODD_WIDTH), use_orig_params=use_orig_params, device_id=CPU)
    FSDP.set_state_dict_type(model, *CONFIGS[form])
    return model, optimizer_for(kind, model.parameters())


def _saved_and_loaded(kind: str, use_orig_params: bool, form: str) -> tuple[list[float], list[float], list[float]]:
    model, optimizer = _setup(kind, use_orig_params, 0, form)
    before = train(model, optimizer, steps=3)
    saved = copy.deepcopy((model.state_dict(), FSDP.optim_state_dict(model, optimizer)))
    other, resumed = _setup(kind, use_orig_params, 5, form)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, saved[1]))
    return before, train(model, optimizer, first=3), train(other, resumed, first=3)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "PagedLion8bit", "SGD8bit"])
@pytest.mark.parametrize("use_orig_params", [True, False], ids=["original parameters", "flat parameters"])
@pytest.mark.parametrize("form", ["full", "sharded"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_training_goes_on_from_a_saved_state(
    kind: str, use_orig_params: bool, form: str, world_size: int, ranks: Ranks
):
    model = build(width=ODD_WIDTH)
    losses = train(model, optimizer_for(kind, model.parameters()), steps=3)
    for before, after, resumed in ranks.run(world_size, _saved_and_loaded, kind, use_orig_params, form):
        assert before == pytest.approx(losses, abs=2e-3, rel=0)
        assert resumed == after


def _from_full_optim_state_dict(kind: str, use_orig_params: bool) -> tuple[list[float], list[float] | str]:
    model, optimizer = _setup(kind, use_orig_params, 0, "full")
    train(model, optimizer, steps=3)
    weights = copy.deepcopy(model.state_dict())
    saved = FSDP.full_optim_state_dict(model, optimizer, rank0_only=False)
    after = train(model, optimizer, first=3)
    other, resumed = _setup(kind, use_orig_params, 5, "full")
    other.load_state_dict(weights)
    try:
        resumed.load_state_dict(FSDP.optim_state_dict_to_load(other, resumed, saved))
    except ValueError as error:
        assert not resumed.state
        return after, str(error)
    return after, train(other, resumed, first=3)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "Lion8bit"])
def test_the_older_full_state_of_flat_parameters_resumes(kind: str, ranks: Ranks):
    for after, resumed in ranks.run(2, _from_full_optim_state_dict, kind, False):
        assert resumed == after


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit"])
def test_full_state_that_torch_has_overwritten_is_refused(kind: str, ranks: Ranks):
    for _, message in ranks.run(2, _from_full_optim_state_dict, kind, True):
        assert message.startswith("state[")
        assert "FullOptimStateDictConfig(offload_to_cpu=False)" in message


def _forms(use_orig_params: bool, layers: list[tuple[int, int]]) -> dict[str, str]:
    model = FSDP(
        nn.Sequential(*(nn.Linear(*sizes) for sizes in layers)), use_orig_params=use_orig_params, device_id=CPU
    )
    optimizer = optim.AdamW8bit(model.parameters())
    model(torch.randn(4, layers[0][0])).sum().backward()
    optimizer.step()
    states = ((name, optimizer.state[p]) for name, p in model.named_parameters() if p.grad is not None and p.numel())
    return {name.removeprefix("_fsdp_wrapped_module."): str(state["state1"].dtype) for name, state in states}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_size_of_the_original_parameter_decides_on_8_bit_state(world_size: int, ranks: Ranks):
    expected = {"0.weight": "torch.uint8", "1.weight": "torch.float32", "2.weight": "torch.float32"}
    expected |= {f"{layer}.bias": "torch.float32" for layer in range(3)}
    found: dict[str, str] = {}
    for forms in ranks.run(world_size, _forms, True, [(64, 65), (65, 62), (62, 66)]):
        assert forms.items() <= expected.items()
        found |= forms
    assert found == expected


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(
    ("layers", "dtype"), [([(62, 62)] * 8, "torch.float32"), ([(62, 62), (62, 67), (67, 5)], "torch.uint8")]
)
def test_a_flat_parameter_has_the_form_of_its_largest(layers: Any, dtype: str, world_size: int, ranks: Ranks):
    for forms in ranks.run(world_size, _forms, False, layers):
        assert set(forms.values()) == {dtype}


def _bounded() -> str:
    model = FSDP(build(width=ODD_WIDTH), use_orig_params=True, device_id=CPU)
    optimizer = optimizer_for("LAMB8bit", model.parameters())
    with pytest.raises(ValueError) as raised:
        train(model, optimizer, steps=1)
    assert not optimizer.state
    return str(raised.value)


def test_norms_that_fsdp1_hides_are_refused(ranks: Ranks):
    for message in ranks.run(2, _bounded):
        assert message.startswith("max_unorm: ")
        assert "fully_shard" in message

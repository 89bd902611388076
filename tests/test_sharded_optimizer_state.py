"""Optimizer state through torch's distributed state dicts and FSDP1, in a process group of one, and cut by hand."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel

from bnb_core import functional, optim
from bnb_core.conformance.compare import same_bits
from bnb_core.optim.optimizer import Optimizer8bit

OPTIMIZERS = {
    name: getattr(optim, name)
    for name in ("Adam8bit", "Adam32bit", "PagedAdamW8bit", "AdEMAMix8bit", "AdEMAMix32bit", "Lion8bit", "SGD8bit")
}
optimizers = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
SETTINGS = {"SGD8bit": {"momentum": 0.9}}


def _optimizer(kind: type[Optimizer8bit], model: nn.Module) -> Optimizer8bit:
    return kind(model.parameters(), lr=1e-2, min_8bit_size=512, **SETTINGS.get(kind.__name__, {}))


def _model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 50), nn.ReLU(), nn.Linear(50, 20))


def _train(model: nn.Module, optimizer: Optimizer8bit, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(8, 48, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _same_from_here(one: tuple[nn.Module, Optimizer8bit], other: tuple[nn.Module, Optimizer8bit]) -> None:
    _train(*one, seed=2)
    _train(*other, seed=2)
    for (name, value), loaded in zip(one[0].named_parameters(), other[0].parameters(), strict=True):
        same_bits(name, loaded.data, value.data)


def _through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@optimizers
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
def test_state_comes_back_through_the_distributed_state_dict(kind, flatten):
    model = _model(0)
    optimizer = _optimizer(kind, model)
    _train(model, optimizer, seed=1)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = _through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    other = _optimizer(kind, resumed)
    set_optimizer_state_dict(resumed, other, saved, options=options)
    _same_from_here((model, optimizer), (resumed, other))


def test_live_state_is_flat_for_everything_but_plain_iteration():
    model = _model(0)
    optimizer = _optimizer(optim.Adam8bit, model)
    _train(model, optimizer, seed=1)
    state = optimizer.state[model[0].weight]
    flat = ["step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"]
    assert list(state.keys()) == [key for key, _ in state.items()] == list(dict(state)) == list({**state}) == flat
    assert list(state) == list(optimizer.state_dict()["state"][0]) == ["step", "__bnb_optimizer_quant_state__"]
    assert list(copy.deepcopy(state).keys()) == flat
    for name in state:
        assert state[name] is not None
    assert list(state["__bnb_optimizer_quant_state__"]) == flat[1:]
    with pytest.raises(KeyError, match="unknown"):
        state["unknown"]


@optimizers
@pytest.mark.parametrize("use_orig_params", [False, True], ids=["flat parameters", "original parameters"])
@pytest.mark.filterwarnings("ignore")
def test_state_comes_back_through_fsdp1(kind, use_orig_params, process_group):
    def build(seed: int) -> tuple[nn.Module, Optimizer8bit]:
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(_model(seed), use_orig_params=use_orig_params, device_id=cpu)
        return model, _optimizer(kind, model)

    model, optimizer = build(0)
    _train(model, optimizer, seed=1)
    saved = _through_a_file(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    resumed, other = build(5)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(resumed, other, saved))
    _same_from_here((model, optimizer), (resumed, other))


def _flattened(values: torch.Tensor) -> nn.Parameter:
    p = nn.Parameter(values)
    p._fsdp_flattened = True
    return p


def _stepped(kind: type[Optimizer8bit], p: nn.Parameter) -> Optimizer8bit:
    optimizer = kind([p], min_8bit_size=512)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    return optimizer


def _values(state: dict, key: str) -> torch.Tensor:
    quant_state = functional.QuantState(state[f"absmax{key[-1]}"], code=state[f"qmap{key[-1]}"], blocksize=256)
    return functional.dequantize_blockwise(state[key], quant_state)


@pytest.mark.parametrize("kind", [optim.Adam8bit, optim.Lion8bit], ids=lambda kind: kind.__name__)
def test_a_shard_of_whole_blocks_keeps_its_bits_and_a_shifted_one_its_values(kind):
    p = _flattened(torch.randn(2048))
    optimizer = _stepped(kind, p)
    saved = optimizer.state_dict()["state"][0]
    live = optimizer.state[p]
    for first, length in ((512, 1024), (700, 900)):
        shard = _flattened(p.detach()[first : first + length].clone())
        other = kind([shard], min_8bit_size=512)
        part = {k: v[first : first + length] if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
        other.load_state_dict({"state": {0: part}, "param_groups": other.state_dict()["param_groups"]})
        loaded = other.state[shard]
        assert loaded["step"] == 1
        for key in (key for key in ("state1", "state2") if key in live):
            expected = _values(live, key)[first : first + length]
            if first % 256 == 0:
                same_bits(key, loaded[key], live[key][first : first + length])
                same_bits(key, _values(loaded, key), expected)
            else:
                torch.testing.assert_close(_values(loaded, key), expected, rtol=0.08, atol=0.02 * float(expected.max()))


def test_what_fills_up_a_shard_is_zero_and_changes_no_block():
    p = _flattened(torch.randn(1024))
    optimizer = _stepped(optim.Adam8bit, p)
    saved, live = optimizer.state_dict()["state"][0], optimizer.state[p]
    longer = _flattened(torch.zeros(1100))
    other = optim.Adam8bit([longer], min_8bit_size=512)
    part = {k: nn.functional.pad(v, (0, 76)) if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
    other.load_state_dict({"state": {0: part}, "param_groups": other.state_dict()["param_groups"]})
    for key in ("state1", "state2"):
        same_bits(key, other.state[longer][key][:1024], live[key])
        assert not _values(other.state[longer], key)[1024:].any()


def test_a_small_parameters_32_bit_state_may_share_a_flat_parameter_with_8_bit_state():
    large, small = _flattened(torch.randn(1024)), _flattened(torch.randn(300))
    parts = [_stepped(optim.Adam8bit, p).state_dict()["state"][0] for p in (large, small)]
    joined = {k: torch.cat([part[k] for part in parts]) for k in parts[0] if k != "step"} | {"step": 1}
    both = _flattened(torch.zeros(1324))
    other = optim.Adam8bit([both], min_8bit_size=512)
    other.load_state_dict({"state": {0: joined}, "param_groups": other.state_dict()["param_groups"]})
    for key in ("state1", "state2"):
        expected = parts[1][key]
        loaded = _values(other.state[both], key)[1024:]
        torch.testing.assert_close(loaded, expected, rtol=0.08, atol=0.02 * float(expected.max()))


def test_codes_per_element_that_are_none_are_refused_by_name():
    p = _flattened(torch.randn(1024))
    optimizer = _stepped(optim.Adam8bit, p)
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["state1"][5] = 300.5
    with pytest.raises(ValueError, match="whole numbers from 0 to 255"):
        optimizer.load_state_dict(state_dict)

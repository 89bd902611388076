"""Optimizer state through torch.distributed.checkpoint and full state dicts: on as many ranks, on more, on fewer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from training import KINDS, ODD_WIDTH, WIDTH, build, optimizer_for, train, whole

from bnb_core import functional
from bnb_core.conformance.compare import same_bits

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = StateDictOptions()


def _setup(
    kind: str, width: int, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[nn.Module, Any]:
    model = build(seed, width).to(dtype)
    fully_shard(model)
    return model, optimizer_for(kind, model.parameters(), **settings)


def _values(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The parameters and what their state stands for, gathered."""
    options = StateDictOptions(full_state_dict=True)
    result = whole(model)
    for name, state in get_optimizer_state_dict(model, optimizer, options=options)["state"].items():
        quantized = state.get("__bnb_optimizer_quant_state__", {})
        for key in ("state1", "state2"):
            if key in quantized:
                codes, scales = quantized[key], quantized[f"absmax{key[-1]}"]
                run = codes.shape[-1] // scales.shape[-1]
                values = quantized[f"qmap{key[-1]}"][codes.long()] * scales.repeat_interleave(run, -1)
                result[f"{name}.{key}"] = values
                result[f"{name}.{key}.codes"] = codes.clone()
            elif key in state:
                result[f"{name}.{key}"] = state[key].clone()
    return result


def _save(folder: str, kind: str, width: int, options: StateDictOptions) -> tuple[dict[str, Tensor], list[float]]:
    """What is saved after 3 steps, and the losses of the 3 that follow."""
    model, optimizer = _setup(kind, width)
    train(model, optimizer, steps=3)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.save(state, checkpoint_id=folder)
    return _values(model, optimizer), train(model, optimizer, first=3)


def _load(
    folder: str, kind: str, width: int, options: StateDictOptions, to: str = ""
) -> tuple[dict[str, Tensor], list[float]]:
    """What is loaded, into another model; saved again in ``to``; and the losses of the steps that follow."""
    model, optimizer = _setup(kind, width, seed=5)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    if to:
        state = {"model": get_model_state_dict(model)}
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save(state, checkpoint_id=to)
    return _values(model, optimizer), train(model, optimizer, first=3)


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, NESTED) for kind in KINDS), ("AdEMAMix8bit", FLAT), ("SGD32bit", FLAT)]
)
def test_as_many_ranks_resume_bit_for_bit(kind: str, options: StateDictOptions, ranks: Ranks, tmp_path: Path):
    for width in (WIDTH, ODD_WIDTH):
        folder = str(tmp_path / str(width))
        saved = ranks.run(2, _save, folder, kind, width, options)
        loaded = ranks.run(2, _load, folder, kind, width, options)
        for (values, losses), (loaded_values, loaded_losses) in zip(saved, loaded, strict=True):
            assert loaded_losses == losses
            for name, value in values.items():
                same_bits(name, loaded_values[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_move_whole_from_2_ranks_to_4_to_1(kind: str, ranks: Ranks, tmp_path: Path):
    folders = [str(tmp_path / name) for name in ("by 2", "by 4", "by 1")]
    (values, losses), _ = ranks.run(2, _save, folders[0], kind, WIDTH, NESTED)
    on_4 = ranks.run(4, _load, folders[0], kind, WIDTH, NESTED, folders[1])
    on_1 = ranks.run(1, _load, folders[1], kind, WIDTH, NESTED)
    for loaded, loaded_losses in (*on_4, *on_1):
        assert loaded_losses == pytest.approx(losses, abs=2e-3, rel=0)
        for name, value in values.items():
            same_bits(name, loaded[name], value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "8bit" in kind])
def test_blocks_that_a_new_border_cuts_are_quantized_once(kind: str, ranks: Ranks, tmp_path: Path):
    """From 2 ranks to 4 and to 1 some blocks keep their elements, and then their bits."""
    folders = [str(tmp_path / name) for name in ("by 2", "by 4")]
    (values, losses), _ = ranks.run(2, _save, folders[0], kind, ODD_WIDTH, NESTED)
    on_4 = ranks.run(4, _load, folders[0], kind, ODD_WIDTH, NESTED, folders[1])
    on_1 = ranks.run(1, _load, folders[1], kind, ODD_WIDTH, NESTED)
    for moves, (loaded, loaded_losses) in ((1, on_4[0]), (2, on_1[0])):
        assert loaded_losses == pytest.approx(losses, abs=2e-3, rel=0)
        for name, value in values.items():
            if name.endswith(("state1", "state2")) and f"{name}.codes" in values:
                unchanged = (loaded[name] == value).float().mean()
                assert 0.2 < unchanged < 1, (name, unchanged)
                error = (loaded[name] - value).abs()
                assert (error <= moves * (0.07 * value.abs() + 0.011 * value.abs().max())).all(), name
                assert not (loaded[name] == 0)[value != 0].any() or name.endswith("state1"), name
            elif not name.endswith(".codes"):
                same_bits(name, loaded[name], value)


def _full_state(
    kind: str, width: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    model, optimizer = _setup(kind, width, dtype=dtype)
    train(model, optimizer, steps=3, dtype=dtype)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    full, of_model = copy.deepcopy((full, get_model_state_dict(model, options=options)))
    return full, of_model, train(model, optimizer, first=3, dtype=dtype)


def _from_full_state(
    kind: str, width: int, full: Any, of_model: Any, broadcast: bool, dtype: torch.dtype = torch.float32
) -> list[float]:
    model, optimizer = _setup(kind, width, seed=5, dtype=dtype)
    if broadcast and torch.distributed.get_rank() != 0:
        full, of_model = {}, {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, of_model, options=options)
    set_optimizer_state_dict(model, optimizer, full, options=options)
    return train(model, optimizer, first=3, dtype=dtype)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "PagedLion8bit"])
@pytest.mark.parametrize("broadcast", [False, True], ids=["on every rank", "broadcast from rank 0"])
def test_a_full_state_dict_loads_back(kind: str, broadcast: bool, ranks: Ranks):
    for width in (WIDTH, ODD_WIDTH):
        full, of_model, losses = ranks.run(2, _full_state, kind, width)[0]
        for loaded in ranks.run(2, _from_full_state, kind, width, full, of_model, broadcast):
            assert loaded == losses


@pytest.mark.parametrize("broadcast", [False, True], ids=["on every rank", "broadcast from rank 0"])
def test_a_full_state_dict_of_a_bf16_model_loads_back(broadcast: bool, ranks: Ranks):
    """bitsandbytes' #1732: its state, gathered by get_optimizer_state_dict, stopped in an assertion."""
    dtype = torch.bfloat16
    full, of_model, losses = ranks.run(2, _full_state, "AdamW8bit", WIDTH, dtype)[0]
    assert "__bnb_optimizer_quant_state__" in full["state"]["0.weight"]
    for loaded in ranks.run(2, _from_full_state, "AdamW8bit", WIDTH, full, of_model, broadcast, dtype):
        assert loaded == losses


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit"])
def test_a_full_state_dict_loads_in_one_process_that_shards_nothing(kind: str, ranks: Ranks):
    for width in (WIDTH, ODD_WIDTH):
        full, of_model, losses = ranks.run(2, _full_state, kind, width)[0]
        model = build(5, width)
        model.load_state_dict(of_model)
        optimizer = optimizer_for(kind, model.parameters())
        numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
        state = {numbers[name]: value for name, value in full["state"].items()}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in full["param_groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        assert train(model, optimizer, first=3) == pytest.approx(losses, abs=2e-3, rel=0)


def _from_one_process(kind: str, width: int, state_dict: Any, of_model: Any) -> tuple[list[float], dict[str, Tensor]]:
    model, optimizer = _setup(kind, width, seed=5)
    set_model_state_dict(model, of_model, options=StateDictOptions(full_state_dict=True))
    optimizer.load_state_dict(state_dict)
    values = _values(model, optimizer)
    return train(model, optimizer, first=3), values


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW32bit", "AdEMAMix8bit", "Lion8bit"])
def test_the_state_of_one_process_is_cut_for_several(kind: str, ranks: Ranks):
    model = build()
    optimizer = optimizer_for(kind, model.parameters())
    train(model, optimizer, steps=3)
    state_dict, of_model = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    codes = {name: optimizer.state[p]["state1"].clone() for name, p in model.named_parameters()}
    losses = train(model, optimizer, first=3)
    for loaded, values in ranks.run(4, _from_one_process, kind, WIDTH, state_dict, of_model):
        assert loaded == pytest.approx(losses, abs=2e-3, rel=0)
        for name, value in codes.items():
            same_bits(name, values.get(f"{name}.state1.codes", values[f"{name}.state1"]), value)


def _through_placements(kind: str, shape: tuple[int, ...]) -> list[Tensor]:
    """The values of a state that is saved from one layout and loaded in the next."""
    layouts = [
        ((4,), [Shard(0)]),
        ((4,), [Shard(1)]),
        ((2, 2), [Shard(0), Shard(1)]),
        ((2, 2), [Replicate(), Shard(0)]),
    ]
    saved, result = None, []
    for mesh_shape, placements in layouts:
        mesh = init_device_mesh("cpu", mesh_shape)
        p = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements))
        optimizer = optimizer_for(kind, [p])
        if saved is None:
            p.grad = distribute_tensor(torch.randn(shape), mesh, placements)
            optimizer.step()
        else:
            optimizer.load_state_dict(saved)
        saved = optimizer.state_dict()
        state = optimizer.state[p]
        quant_state = functional.QuantState(state["absmax2"], code=state["qmap2"], blocksize=256)
        values = functional.dequantize_blockwise(state["state2"], quant_state)
        quantized = saved["state"][0]["__bnb_optimizer_quant_state__"]
        assert quantized["state2"].placements == tuple(placements)
        result.append((distribute_tensor(torch.zeros(shape), mesh, placements), values))
    gathered = []
    for like, values in result:
        like.to_local().copy_(values)
        gathered.append(like.full_tensor())
    return gathered


@pytest.mark.parametrize("shape", [(64, 1024), (64, 256), (40, 250)])
def test_state_moves_between_shards_of_rows_and_of_columns(shape: tuple[int, ...], ranks: Ranks):
    first, *others = ranks.run(4, _through_placements, "AdamW8bit", shape)[0]
    for values in others:
        error = (values - first).abs()
        assert (error <= 3 * (0.07 * first + 0.011 * first.max())).all()
        assert not (values == 0)[first != 0].any()


def _malformed() -> list[str]:
    model, optimizer = _setup("AdamW8bit", WIDTH)
    train(model, optimizer, steps=1)
    messages = []
    for key, change in (
        ("state1", lambda value: value.full_tensor()[:-1]),
        ("absmax1", lambda value: value.full_tensor()[..., :-1]),
        ("qmap1", lambda value: value[:-1]),
        ("absmax2", lambda value: None),
    ):
        state_dict = optimizer.state_dict()
        quantized = state_dict["state"][0]["__bnb_optimizer_quant_state__"]
        quantized[key] = change(quantized[key])
        if quantized[key] is None:
            del quantized[key]
        before = optimizer.state
        with pytest.raises(ValueError) as raised:
            optimizer.load_state_dict(state_dict)
        messages.append(str(raised.value))
        assert optimizer.state is before
    return messages


def test_a_malformed_state_is_refused_by_its_key(ranks: Ranks):
    for messages in ranks.run(2, _malformed):
        for key, message in zip(("state1", "absmax1", "qmap1", "absmax2"), messages, strict=True):
            assert f"state[0]['{key}']" in message

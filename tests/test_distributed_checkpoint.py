"""Quantized layers in torch.distributed's state dicts and checkpoints, and sharded, in a process group of one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearFP4, LinearNF4

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "double-quantized": lambda: LinearNF4(64, 48),
    "plain": lambda: LinearFP4(64, 48, compress_statistics=False),
    "8-bit": lambda: Linear8bitLt(64, 48, has_fp16_weights=False),
    "4-bit embedding": lambda: EmbeddingNF4(48, 64),
    "8-bit embedding": lambda: Embedding8bit(48, 64),
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def _model(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(build()).to("cpu")


def _input(model: nn.Module) -> torch.Tensor:
    return torch.arange(48) if isinstance(model[0], nn.Embedding) else torch.randn(5, 64)


def _same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for key, value in first.items():
        same_bits(key, value, second[key])


@layers
def test_every_key_is_a_path_of_attributes(build):
    model = _model(build)
    for key, value in model.state_dict().items():
        found = model
        for name in key.split("."):
            found = getattr(found, name)
        same_bits(key, found.data, value)


@layers
def test_a_model_state_dict_is_taken_and_set(build):
    one, other = _model(build), _model(build, seed=1)
    set_model_state_dict(other, get_model_state_dict(one))
    _same_state(one, other)


@layers
def test_a_checkpoint_loads_whatever_values_the_model_has(build, tmp_path, caplog):
    """The offset of double-quantized scales has more digits in one weight than in another."""
    caplog.set_level(logging.ERROR)
    lengths = set()
    for seed in range(8):
        one, other = _model(build, seed), _model(build, seed + 100)
        dcp.save(get_model_state_dict(one), checkpoint_id=tmp_path / str(seed))
        state_dict = get_model_state_dict(other)
        lengths |= {value.numel() for key, value in state_dict.items() if "bitsandbytes__" in key}
        dcp.load(state_dict, checkpoint_id=tmp_path / str(seed))
        set_model_state_dict(other, state_dict)
        _same_state(one, other)
    assert len(lengths) > 1 or build is not LAYERS["double-quantized"]


def test_other_files_hold_the_packed_values_as_a_plain_tensor(tmp_path):
    state_dict = _model(LAYERS["double-quantized"]).state_dict()
    torch.save(state_dict, tmp_path / "state.pt")
    save_file(state_dict, tmp_path / "state.safetensors")
    copied = copy.deepcopy(state_dict)
    assert {type(value) for value in copied.values()} == {type(value) for value in state_dict.values()}
    for loaded in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        assert {type(value) for value in loaded.values()} == {torch.Tensor}
        for key, value in state_dict.items():
            same_bits(key, loaded[key], value)


@layers
def test_a_layer_that_is_sharded_before_its_first_forward_keeps_its_scales(build, process_group):
    plain, sharded = _model(build), _model(build)
    x = _input(plain)
    expected, keys = plain(x), list(plain.state_dict())
    fully_shard(sharded)
    assert list(sharded.state_dict()) == keys
    torch.testing.assert_close(sharded(x), expected, rtol=0, atol=0)

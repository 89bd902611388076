"""save_quantized and load_quantized: any module, into one as it was before, on meta too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnb_core
from bnb_core.checkpoints import CheckpointFileError
from bnb_core.nn.parametrize import replace_parameter_4bit
from bnb_core.quantize import METHODS, QuantizationConfig


class Model(nn.Module):
    """A tied head, a bias, a buffer, a layer that stays and a parameter of three dimensions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.experts = nn.Module()
        self.experts.weight_of_all = nn.Parameter(torch.randn(2, 64, 64))
        self.lm_head = nn.Linear(64, 30, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, tokens):
        hidden = self.down(torch.relu(self.up(self.embed(tokens))))
        return self.lm_head(hidden @ self.experts.weight_of_all.sum(0)) * self.scale


TOKENS = torch.arange(30)


def quantized(method):
    model = Model()
    with pytest.warns(UserWarning, match="three dimensions"):
        return bnb_core.quantize_model(model, QuantizationConfig(method, blocksize=128))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_a_loaded_module_computes_the_same_bits(tmp_path, method, shard_bytes, made_on):
    model = quantized(method)
    replace_parameter_4bit(model.experts, "weight_of_all")
    bnb_core.save_quantized(model, tmp_path / "out", shard_bytes)
    with torch.device(made_on):
        fresh = Model()
    loaded = bnb_core.load_quantized(tmp_path / "out", fresh)
    assert loaded is fresh and loaded.lm_head.weight is loaded.embed.weight
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert type(loaded.up) is type(model.up)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) == 1) == (shard_bytes == 10**9)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_saved_and_loaded(tmp_path, method):
    kinds = {"int8": bnb_core.nn.Embedding8bit, "nf4": bnb_core.nn.EmbeddingNF4, "fp4": bnb_core.nn.EmbeddingFP4}
    model = nn.ModuleDict({"words": kinds[method](30, 64).to("cpu")})
    bnb_core.save_quantized(model, tmp_path / "out")
    loaded = bnb_core.load_quantized(tmp_path / "out", nn.ModuleDict({"words": nn.Embedding(30, 64)}))
    assert torch.equal(loaded["words"](TOKENS), model["words"](TOKENS))


def test_a_plain_module_is_saved_and_loaded_as_it_is(tmp_path):
    model = Model()
    bnb_core.save_quantized(model, tmp_path / "out")
    assert torch.equal(bnb_core.load_quantized(tmp_path / "out", Model())(TOKENS), model(TOKENS))


def test_a_folder_that_quantize_checkpoint_made_is_loaded_into_the_same_module(tmp_path):
    model = Model()
    bnb_core.save_quantized(model, tmp_path / "plain")
    bnb_core.quantize_checkpoint(tmp_path / "plain", tmp_path / "out", QuantizationConfig(compute_dtype=torch.float32))
    with pytest.warns(UserWarning, match="three dimensions"):
        expected = bnb_core.quantize_model(model)(TOKENS)
    assert torch.equal(bnb_core.load_quantized(tmp_path / "out", Model())(TOKENS), expected)


def test_what_exists_is_not_replaced(tmp_path):
    bnb_core.save_quantized(nn.Linear(2, 2), tmp_path / "out")
    with pytest.raises(CheckpointFileError, match="out: exists"):
        bnb_core.save_quantized(nn.Linear(2, 2), tmp_path / "out")


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    bnb_core.save_quantized(quantized("nf4"), tmp_path / "out")
    with pytest.raises(CheckpointFileError, match="the model has no module 'down'"):
        bnb_core.load_quantized(tmp_path / "out", nn.ModuleDict({"up": nn.Linear(64, 96)}))
    smaller = Model()
    smaller.up = nn.Linear(32, 96)
    with pytest.raises(ValueError, match=r"up\.weight: expected shape"):
        bnb_core.load_quantized(tmp_path / "out", smaller)
    with pytest.raises(CheckpointFileError, match="names no architecture; give the model"):
        bnb_core.load_quantized(tmp_path / "out")
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module or None, got str"):
        bnb_core.load_quantized(tmp_path / "out", "model")


def test_what_would_stay_on_meta_is_named(tmp_path):
    bnb_core.save_quantized(Model(), tmp_path / "out")
    with torch.device("meta"):
        fresh = Model()
        fresh.register_buffer("position", torch.arange(4), persistent=False)
    with pytest.raises(ValueError, match="position: on meta"):
        bnb_core.load_quantized(tmp_path / "out", fresh)

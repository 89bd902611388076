"""Modules made on meta, moved there and back, and work on real tensors while meta is the default device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bnb_core import functional as F
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearNF4, Params4bit

MODULES = {
    "4bit": partial(LinearNF4, 64, 48),
    "8bit": partial(Linear8bitLt, 64, 48, has_fp16_weights=False),
    "8bit that trains": partial(Linear8bitLt, 64, 48),
    "4bit embedding": partial(EmbeddingNF4, 30, 64),
    "8bit embedding": partial(Embedding8bit, 30, 24),
}
modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def _input(module):
    return torch.arange(5) if isinstance(module, nn.Embedding) else torch.randn(5, 64)


@modules
def test_offloaded_module_comes_back_from_its_state_dict(build):
    model = nn.Sequential(build()).to("cpu")
    x, kind = _input(model[0]), type(model[0].weight)
    expected = model(x).detach()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta")
    assert type(model[0].weight) is kind and model[0].weight.is_meta
    model.load_state_dict(state, assign=True)
    assert type(model[0].weight) is kind
    same_bits("result", model(x).detach(), expected)


@modules
def test_module_made_on_meta_is_given_memory_then_values(build):
    source = build()
    with torch.device("meta"):
        module = build()
    kind = type(module.weight)
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert type(module.weight) is kind
    x = _input(module)
    same_bits("result", module.to("cpu")(x).detach(), source.to("cpu")(x).detach())


@modules
def test_meta_has_no_values_to_move_back(build):
    model = nn.Sequential(build()).to("cpu").to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        model.to("cpu")
    assert model[0].weight.is_meta


@modules
def test_default_device_meta_does_not_reach_what_a_cpu_module_saves(build):
    module = build().to("cpu")
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.device("meta"):
        state = module.state_dict()
    for key, value in expected.items():
        same_bits(key, state[key], value)


def test_real_weights_are_quantized_while_meta_is_the_default_device():
    """As loaders do, which build the model under meta and fill it as they read."""
    weight = torch.randn(48, 64)
    expected = Params4bit(weight.clone(), quant_type="nf4").to("cpu").quant_state
    with torch.device("meta"):
        assert Params4bit(weight.clone(), quant_type="nf4").to("cpu").quant_state == expected


@pytest.mark.parametrize(
    "make",
    [
        F.create_dynamic_map,
        F.create_linear_map,
        F.create_fp8_map,
        F.create_normal_map,
        partial(F.get_4bit_type, "nf4"),
        partial(F.pack_dict_to_tensor, {"a": 1}),
    ],
)
def test_codebooks_are_made_on_the_cpu_whatever_the_default_device(make):
    expected = make()
    with torch.device("meta"):
        assert torch.equal(make(), expected)

"""Experts in 4 bits compute what the model does with the same weights in full precision, and train, save and reload."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from ecosystem import moe_models
from packaging.version import Version

import bnb_core
from bnb_core.quantize import QuantizationConfig

if Version(transformers.__version__) < Version("5"):
    pytest.skip("before Transformers 5 experts are linear layers", allow_module_level=True)

IDS = torch.arange(1, 13).view(2, 6)


def quantize(model):
    # LongCat's router reads the weight of its linear layer itself.
    return bnb_core.quantize_model(model, QuantizationConfig(skip_modules=("lm_head", "classifier")))


each_model = pytest.mark.parametrize("name", moe_models.CONFIGS)


@pytest.fixture
def pair(name):
    """A quantized model, and one of full precision with the weights that it stands for."""
    dense = moe_models.make(name)
    quantized = quantize(copy.deepcopy(dense))
    assert moe_models.set_dequantized(dense, quantized) >= 2 or name == "doge"
    return quantized, dense


@each_model
@torch.no_grad()
def test_the_logits_are_those_of_the_dequantized_weights(pair):
    quantized, dense = pair
    torch.testing.assert_close(quantized(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@each_model
def test_gradients_of_the_inputs_are_those_of_the_dequantized_weights(pair):
    gradients = []
    for model in pair:
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().mean().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


@each_model
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_compute_the_same(name, copied):
    model = quantize(moe_models.make(name))
    assert torch.equal(copied(model)(IDS).logits, model(IDS).logits)


@each_model
@torch.no_grad()
def test_a_state_dict_restores_them(name):
    model = quantize(moe_models.make(name))
    fresh = moe_models.make(name)
    for parameter in fresh.parameters():
        parameter.zero_()
    fresh = quantize(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)

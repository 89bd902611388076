"""Experts in 4 bits compute what the model does with the same weights in full precision, and train, save and reload."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from ecosystem import moe_models
from ecosystem.upstream import FACE
from packaging.version import Version

import bnb_core
from bnb_core.nn import GroupedLinear4bit
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


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)


def from_pretrained_in_4bit(folder, **options):
    options = {**_NF4, "llm_int8_skip_modules": ["lm_head", "classifier"], **options}
    return from_pretrained(folder, quantization_config=transformers.BitsAndBytesConfig(**options))


@pytest.fixture(params=["one tensor for each expert", "fused"])
def folder(request, name, tmp_path):
    """A checkpoint of full precision; Transformers saves the layout that a model's first checkpoints had."""
    moe_models.make(name).save_pretrained(tmp_path / "dense", save_original_format=request.param != "fused")
    return tmp_path / "dense"


@each_model
@torch.no_grad()
def test_from_pretrained_quantizes_experts(folder, name):
    model = from_pretrained_in_4bit(folder)
    dense = from_pretrained(folder)
    assert moe_models.set_dequantized(dense, model) >= 2 or name == "doge"
    expected = bnb_core.quantize_model(
        from_pretrained(folder),
        QuantizationConfig(
            double_quantization=False, compute_dtype=torch.float32, skip_modules=("lm_head", "classifier")
        ),
    )
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@each_model
@pytest.mark.parametrize("double", [False, True])
@torch.no_grad()
def test_a_quantized_model_is_saved_and_reloaded(folder, tmp_path, name, double):
    model = from_pretrained_in_4bit(folder, bnb_4bit_use_double_quant=double)
    model.save_pretrained(tmp_path / "quantized")
    reloaded, information = from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(information[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    reloaded.save_pretrained(tmp_path / "again")
    again = from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_dequantize_gives_transformers_own_modules_back(folder, tmp_path, name):
    model = from_pretrained_in_4bit(folder)
    expected = model(IDS).logits
    dense = model.dequantize()
    assert {type(module) for module in dense.modules()} == {
        type(module) for module in from_pretrained(folder).modules()
    }
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_can_be_left_out(folder, name):
    model = from_pretrained_in_4bit(folder, llm_int8_skip_modules=["lm_head", "experts"])
    assert not any(isinstance(module, GroupedLinear4bit) for module in model.modules())
    assert model.model.layers[1].mlp.experts.gate_up_proj.is_floating_point()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
@torch.no_grad()
def test_generating_gives_what_the_dequantized_weights_give(folder, name):
    quantized, dense = from_pretrained_in_4bit(folder), from_pretrained(folder)
    moe_models.set_dequantized(dense, quantized)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(quantized.generate(IDS, **options), dense.generate(IDS, **options))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_training_what_is_not_quantized_lowers_the_loss(folder, name):
    model = from_pretrained_in_4bit(folder).train()
    codes = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("_proj.weight")}
    trained = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in trained], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, codes[key]) for key, value in model.state_dict().items() if key in codes)


_INSTALL = "import bnb_core; bnb_core.install_as_bitsandbytes()"
_IMPORT = "from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer as Quantizer"


@pytest.mark.skipif(FACE == "real", reason="it is about bnb_core")
@pytest.mark.parametrize(
    ("program", "taught"),
    [
        ([_INSTALL, _IMPORT], True),
        ([_IMPORT, _INSTALL], True),
        ([_IMPORT, "import bnb_core"], False),
    ],
    ids=["installed first", "imported first", "under its own name"],
)
def test_the_quantizer_is_changed_only_while_bitsandbytes_is_bnb_core(program, taught):
    ask = "print(Quantizer.get_quantize_ops.__module__, hasattr(Quantizer.get_quantize_ops, '__wrapped__'))"
    command = [sys.executable, "-W", "ignore", "-c", "; ".join([*program, ask])]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.split()[-1] == str(taught)

"""Transformers: from_pretrained, save, reload, generate, dequantize; equal to the real bitsandbytes."""

from __future__ import annotations

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from ecosystem import models, tasks
from ecosystem.models import CONFIGS, QUANTIZATIONS, greedy, inputs, logits
from ecosystem.upstream import REASONS
from packaging.version import Version
from safetensors.torch import load_file

IS_5 = Version(transformers.__version__) >= Version("5")

BOTH = [pytest.mark.parametrize("name", CONFIGS), pytest.mark.parametrize("quantization", QUANTIZATIONS)]


def each_model_and_quantization(test):
    for mark in BOTH:
        test = mark(test)
    return test


def quantized_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]


@pytest.fixture(scope="module")
def quantized(full_precision):
    """Each model, quantized; made once, not to be changed."""
    made = {}

    def get(name, quantization):
        if (name, quantization) not in made:
            made[name, quantization] = models.load(name, full_precision[name], quantization)
        return made[name, quantization]

    return get


@each_model_and_quantization
def test_every_linear_layer_but_the_head_is_quantized(quantized, name, quantization):
    layers = quantized_layers(quantized(name, quantization))
    kind = Linear8bitLt if quantization == "int8" else Linear4bit
    assert layers and all(isinstance(layer, kind) for layer in layers)
    assert all(not layer.weight.is_floating_point() or layer.weight.bnb_quantized for layer in layers)


@each_model_and_quantization
def test_parameters_and_bytes_are_counted(quantized, full_precision, name, quantization):
    model = quantized(name, quantization)
    assert model.num_parameters() == models.load(name, full_precision[name]).num_parameters()
    layers = quantized_layers(model)
    packed = {layer.weight for layer in layers}
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor not in packed)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert model.get_memory_footprint() == rest + (weights if quantization == "int8" else weights // 2)


@each_model_and_quantization
def test_a_saved_model_is_the_same_when_reloaded(quantized, tmp_path, name, quantization):
    model = quantized(name, quantization)
    model.save_pretrained(tmp_path)
    reloaded = models.load(name, tmp_path)
    assert len(quantized_layers(reloaded)) == len(quantized_layers(model))
    assert torch.equal(logits(name, reloaded), logits(name, model))
    assert greedy(reloaded) == greedy(model)


@each_model_and_quantization
def test_the_dequantized_model_computes_the_same(full_precision, name, quantization):
    """To the rounding of the activations where they are int8, and of everything where bf16 computes."""
    model = models.load(name, full_precision[name], quantization)
    expected = logits(name, model)
    dense = model.dequantize()
    assert not quantized_layers(dense)
    tolerance = 1e-4 if quantization == "nf4" else 0.05
    assert (logits(name, dense) - expected).abs().max() <= tolerance * expected.abs().max()


@each_model_and_quantization
def test_it_computes_what_the_real_one_does_from_the_same_folder(peer, full_precision, tmp_path, name, quantization):
    ours, theirs = str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt")
    folder = str(full_precision[name])
    assert tasks.run(name, folder, ours, quantization) == peer.run(name, folder, theirs, quantization)
    _compare(torch.load(ours), torch.load(theirs), quantization)


@each_model_and_quantization
@pytest.mark.parametrize("saved_by", ["bnb_core", "bitsandbytes"])
def test_saved_models_are_read_by_both(peer, full_precision, tmp_path, name, quantization, saved_by):
    ours, theirs, folder = str(tmp_path / "ours.pt"), str(tmp_path / "theirs.pt"), str(tmp_path / "model")
    saver = tasks if saved_by == "bnb_core" else peer
    saver.quantize(name, str(full_precision[name]), quantization, folder)
    assert tasks.run(name, folder, ours) == peer.run(name, folder, theirs)
    _compare(torch.load(ours), torch.load(theirs), quantization)


def _compare(ours, theirs, quantization):
    """To the real one's own rounding: it computes f32 in bf16 on some CPUs and squeezes int8 inputs through f16."""
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_both_save_the_same_entries(peer, full_precision, tmp_path, quantization):
    for saver, folder in ((tasks, "ours"), (peer, "theirs")):
        saver.quantize("llama", str(full_precision["llama"]), quantization, str(tmp_path / folder))
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        # A quant state is text, whose numbers may differ in their digits.
        assert ".quant_state." in key or value.shape == theirs[key].shape, key


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_device_maps(full_precision, quantization, device_map):
    model = models.load("llama", full_precision["llama"], quantization, device_map=device_map)
    assert {str(parameter.device) for parameter in model.parameters()} == {"cpu"}
    assert torch.isfinite(logits("llama", model)).all()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_layers_can_be_left_out(full_precision, quantization):
    options = {**QUANTIZATIONS[quantization], "llm_int8_skip_modules": ["lm_head", "down_proj"]}
    config = models.BitsAndBytesConfig(**options)
    model = models.model_class("llama").from_pretrained(full_precision["llama"], quantization_config=config)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in quantized_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("quantization", ["nf4 double bf16", "int8"])
def test_a_model_in_bf16(full_precision, quantization):
    model = models.load("llama", full_precision["llama"], quantization, dtype=torch.bfloat16)
    assert model(**inputs("llama")).logits.dtype == torch.bfloat16
    assert len(greedy(model)) == models.PROMPT.numel() + 12


@pytest.mark.parametrize(
    "saved_before",
    [False, pytest.param(True, marks=pytest.mark.xfail(IS_5, strict=True, reason=REASONS["dequantize"]))],
)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_model_is_dequantized_to_the_dtype_of_its_configuration(full_precision, tmp_path, quantization, saved_before):
    model = models.load("llama", full_precision["llama"], quantization)
    if saved_before:
        model.save_pretrained(tmp_path)
    model.dequantize()
    assert not quantized_layers(model) and model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


EXPERTS = ("gate_up_proj", "down_proj")


@pytest.mark.skipif(not IS_5, reason="before Transformers 5 experts are linear layers")
def test_fused_experts_are_quantized_by_the_parameter(full_precision):
    """Transformers leaves them out: it quantizes linear layers, and these are parameters of three dimensions."""
    model = models.load("mixtral", full_precision["mixtral"], "nf4")
    left_out = model.get_memory_footprint()
    for layer in model.model.layers:
        for name in EXPERTS:
            replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True)
    assert model.get_memory_footprint() < left_out / 3
    assert greedy(model) == list(range(1, 21))

    reloaded = models.load("mixtral", full_precision["mixtral"], "nf4")
    for layer, saved in zip(reloaded.model.layers, model.model.layers, strict=True):
        state = saved.mlp.experts.state_dict()
        for name in EXPERTS:
            setattr(layer.mlp.experts, name, torch.nn.Parameter(state[name], requires_grad=False))
            parts = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            replace_parameter_4bit_prequantized(layer.mlp.experts, name, parts, "cpu")
    assert torch.equal(logits("mixtral", reloaded), logits("mixtral", model))

"""Diffusers: a tiny UNet and a tiny DiT with its own BitsAndBytesConfig."""

from __future__ import annotations

import diffusers
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from ecosystem.models import aligned

QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


def make_dit() -> torch.nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )


def make_unet() -> torch.nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip


MODELS = {"dit": make_dit, "unet": make_unet}
CLASSES = {"dit": diffusers.DiTTransformer2DModel, "unet": diffusers.UNet2DConditionModel}

INPUTS = {
    "dit": lambda: {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])},
    "unet": lambda: {"timestep": torch.tensor([3]), "encoder_hidden_states": torch.randn(1, 5, 32)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}


@pytest.fixture(params=[(name, quantization) for name in MODELS for quantization in QUANTIZATIONS], ids=str)
def case(request, folders, cpu_as_gpu):
    """A model's name, its folder and how it is quantized."""
    name, quantization = request.param
    return name, folders[name], quantization


def load(name, folder, quantization=None):
    """In f32; where the quantized weights go is said by a device, as the text "cpu" is refused for them."""
    options = {"torch_dtype": torch.float32, "device_map": {"": torch.device("cpu")}}
    if quantization is not None:
        options["quantization_config"] = diffusers.BitsAndBytesConfig(**QUANTIZATIONS[quantization])
    return aligned(CLASSES[name].from_pretrained(folder, **options).eval())


@torch.no_grad()
def output(name, model):
    torch.manual_seed(1)
    return model(torch.randn(1, 4, 8, 8), **INPUTS[name]()).sample


def quantized_layers(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]


def distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_a_quantized_model_computes_nearly_what_the_full_one_does(case):
    name, folder, quantization = case
    model = load(name, folder, quantization)
    kind = Linear8bitLt if quantization == "int8" else Linear4bit
    layers = quantized_layers(model)
    assert layers and all(isinstance(layer, kind) for layer in layers)
    assert distance(output(name, model), output(name, load(name, folder))) < (0.02 if quantization == "int8" else 0.2)


def test_a_saved_model_is_the_same_when_reloaded(case, tmp_path):
    name, folder, quantization = case
    model = load(name, folder, quantization)
    model.save_pretrained(tmp_path)
    reloaded = load(name, tmp_path)
    assert len(quantized_layers(reloaded)) == len(quantized_layers(model))
    assert torch.equal(output(name, reloaded), output(name, model))


def test_the_dequantized_model_computes_the_same(case):
    name, folder, quantization = case
    model = load(name, folder, quantization)
    expected = output(name, model)
    dense = model.dequantize()
    assert not quantized_layers(dense)
    assert distance(output(name, dense), expected) < (0.02 if quantization == "int8" else 1e-4)


def test_it_counts_its_bytes(case):
    name, folder, quantization = case
    model = load(name, folder, quantization)
    assert model.get_memory_footprint() < load(name, folder).get_memory_footprint()
    assert model.num_parameters() == load(name, folder).num_parameters()

"""Accelerate: quantizing a model of one's own, and the hooks that offload it."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from ecosystem import models
from ecosystem.models import logits
from transformers import BitsAndBytesConfig

CONFIGS = {
    "4-bit": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, Linear4bit),
    "8-bit": ({"load_in_8bit": True}, Linear8bitLt),
}


def round_to_f16(model):
    """What Accelerate does to 8-bit weights before it quantizes them, if it loads them from a file."""
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.half().float()


@pytest.mark.parametrize("start", ["loaded", "meta"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_is_loaded_and_quantized(cpu_as_gpu, full_precision, tmp_path, config, start):
    options, kind = CONFIGS[config]
    full = models.load("llama", full_precision["llama"])
    quantization = BnbQuantizationConfig(**options, torch_dtype=torch.float32, skip_modules=["lm_head"])
    config = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=quantization.bnb_4bit_compute_dtype)
    if (config.load_in_8bit, start) == (True, "meta"):
        round_to_f16(full)
    full.save_pretrained(tmp_path / "full")
    by_transformers = models.load("llama", tmp_path / "full", quantization_config=config, dtype=torch.float32)
    if start == "loaded":
        model = load_and_quantize_model(full, quantization)
    else:
        file = str(tmp_path / "pytorch_model.bin")
        torch.save(full.state_dict(), file)
        with accelerate.init_empty_weights():
            model = models.model_class("llama").from_config(full.config).eval()
        model = load_and_quantize_model(model, quantization, weights_location=file)
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is kind and layer.weight.dtype in (torch.uint8, torch.int8)
    assert type(model.lm_head) is torch.nn.Linear
    assert torch.equal(logits("llama", model), logits("llama", by_transformers))


def offload(model, folder):
    if folder is None:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", ["host memory", "disk"])
@pytest.mark.parametrize("quantization", models.QUANTIZATIONS)
def test_offloaded_weights_come_back_for_each_forward(full_precision, tmp_path, quantization, place):
    model = models.load("llama", full_precision["llama"], quantization)
    expected = logits("llama", model)
    remove_hook_from_module(model, recurse=True)
    offload(model, tmp_path if place == "disk" else None)
    for _ in range(2):
        assert all(parameter.is_meta for parameter in model.model.layers.parameters())
        assert torch.equal(logits("llama", model), expected)
    remove_hook_from_module(model, recurse=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits("llama", model), expected)


@pytest.mark.parametrize("quantization", models.QUANTIZATIONS)
def test_an_accelerator_trains_beside_quantized_weights(full_precision, quantization):
    import bitsandbytes

    model = models.load("llama", full_precision["llama"], quantization)
    torch.manual_seed(0)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=model.dtype), torch.nn.Tanh(), model.lm_head)
    model.requires_grad_(False)
    model.lm_head[0].requires_grad_(True)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = bitsandbytes.optim.AdamW8bit(model.lm_head[0].parameters(), lr=1e-2, min_8bit_size=1)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(5):
        loss = model(input_ids=models.PROMPT, labels=models.PROMPT).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

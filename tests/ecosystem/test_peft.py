"""PEFT: every kind of adapter that has layers for bitsandbytes, on 4-bit and 8-bit weights."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from ecosystem import models
from ecosystem.models import PROMPT, VOCABULARY
from ecosystem.upstream import REASONS
from torch.overrides import TorchFunctionMode

TARGETS = ["q_proj", "v_proj", "down_proj"]
_RANK = {"r": 4, "target_modules": TARGETS}
_LORA = {**_RANK, "lora_alpha": 8, "task_type": "CAUSAL_LM"}

ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(**_LORA),
    "rsLoRA": lambda: peft.LoraConfig(**_LORA, use_rslora=True),
    "DoRA": lambda: peft.LoraConfig(**_LORA, use_dora=True),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=1, total_step=8, target_modules=TARGETS, task_type="CAUSAL_LM"
    ),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "RoAd": lambda: peft.RoadConfig(group_size=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
}

QUANTIZATIONS = ["nf4", "int8"]

# Merging quantizes the sum anew: as far as one quantization of these weights moves the logits.
MERGED_TOLERANCE = {"nf4": 0.3, "int8": 0.08}

_MERGING = ("test_it_merges_and_unmerges", "test_it_is_merged_for_good")
CANNOT = {
    (test, adapter, quantization): reason
    for test in _MERGING
    for adapter, quantization, reason in (
        *(("AdaLoRA", quantization, "AdaLoRA") for quantization in QUANTIZATIONS),
        *(("IA3", quantization, "IA3") for quantization in QUANTIZATIONS),
        ("RandLoRA", "nf4", "RandLoRA, 4-bit"),
        ("RandLoRA", "int8", "RandLoRA, 8-bit"),
    )
}
"""By test, adapter and quantization, the key in upstream.REASONS."""

LABELS = (PROMPT * 5 + 3) % VOCABULARY


@pytest.fixture(params=[(adapter, quantization) for quantization in QUANTIZATIONS for adapter in ADAPTERS], ids=str)
def trained(request, full_precision):
    """A model with an adapter that has been trained for a few steps, and the losses."""
    adapter, quantization = request.param
    reason = CANNOT.get((request.node.originalname, adapter, quantization))
    if reason is not None:
        request.applymarker(pytest.mark.xfail(strict=True, reason=REASONS[reason]))
    base = models.load("llama", full_precision["llama"], quantization)
    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, ADAPTERS[adapter]())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(8):
        loss = model(input_ids=PROMPT, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        if adapter == "AdaLoRA":
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    model.name, model.quantization, model.losses = adapter, quantization, losses
    return model


def adapted(model) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if hasattr(module, "base_layer")]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=PROMPT).logits


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def test_it_trains_on_frozen_quantized_weights(trained):
    assert trained.losses[-1] < trained.losses[0]
    layers = adapted(trained)
    kind = "Linear8bitLt" if trained.quantization == "int8" else "Linear4bit"
    assert layers and all(type(layer.base_layer).__name__ == kind for layer in layers)
    assert all(not layer.base_layer.weight.requires_grad for layer in layers)


def test_it_merges_and_unmerges(trained):
    before = logits(trained)
    trained.merge_adapter()
    assert all(layer.merged for layer in adapted(trained))
    tolerance = MERGED_TOLERANCE[trained.quantization]
    assert close(logits(trained), before, tolerance)
    trained.unmerge_adapter()
    assert not any(layer.merged for layer in adapted(trained))
    assert close(logits(trained), before, 2 * tolerance)


def test_it_is_merged_for_good(trained):
    before = logits(trained)
    merged = trained.merge_and_unload()
    assert not adapted(merged)
    layer = merged.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == ("Linear8bitLt" if trained.quantization == "int8" else "Linear4bit")
    assert close(logits(merged), before, MERGED_TOLERANCE[trained.quantization])


def test_it_is_saved_and_loaded(trained, full_precision, tmp_path):
    trained.save_pretrained(tmp_path)
    base = models.load("llama", full_precision["llama"], trained.quantization)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert close(logits(loaded), logits(trained), 1e-5), "AdaLoRA's file leaves out the ranks that are zero"


def test_it_is_switched_off_and_copied(trained, full_precision):
    base = models.load("llama", full_precision["llama"], trained.quantization)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), logits(base))
    assert torch.equal(logits(copy.deepcopy(trained)), logits(trained))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_gradient_checkpointing_gives_the_same_gradients(full_precision, quantization):
    gradients = []
    for checkpointing in (False, True):
        base = models.load("llama", full_precision["llama"], quantization)
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing)
        assert base.model.norm.weight.dtype == torch.float32
        torch.manual_seed(0)
        model = peft.get_peft_model(base, peft.LoraConfig(**_LORA, init_lora_weights=False)).train()
        model(input_ids=PROMPT, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


class CudaIsCpu(TorchFunctionMode):
    """PEFT computes LoftQ on cuda or xpu without asking what there is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def replace(value):
            return torch.device("cpu") if isinstance(value, str | torch.device) and str(value) == "cuda" else value

        kwargs = {name: replace(value) for name, value in (kwargs or {}).items()}
        return function(*map(replace, args), **kwargs)


def test_loftq_starts_nearer_to_the_full_model(full_precision):
    full = models.load("llama", full_precision["llama"])
    weight = full.model.layers[0].self_attn.q_proj.weight.detach().clone()
    config = peft.LoraConfig(
        **{**_LORA, "lora_alpha": _LORA["r"]}, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)
    )
    with CudaIsCpu():
        model = peft.get_peft_model(full, config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    adapter = layer.get_delta_weight("default")
    quantized = layer.base_layer.weight
    assert not torch.equal(quantized, weight)
    assert (quantized + adapter - weight).norm() < 0.9 * (quantized - weight).norm()


def test_loftq_weights_bring_a_quantized_model_nearer_to_the_full_one(full_precision):
    full = logits(models.load("llama", full_precision["llama"]))
    base = models.load("llama", full_precision["llama"], "nf4")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**_LORA)).eval()
    before = (logits(model) - full).norm()
    with CudaIsCpu():
        peft.replace_lora_weights_loftq(model, model_path=str(full_precision["llama"] / "model.safetensors"))
    assert (logits(model) - full).norm() < before

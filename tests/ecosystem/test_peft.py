"""PEFT: every kind of adapter that has layers for bitsandbytes, on 4-bit and 8-bit weights."""

from __future__ import annotations

import copy
from unittest import mock

import bitsandbytes
import peft
import pytest
import torch
from ecosystem import exact, models
from ecosystem.models import PROMPT, VOCABULARY
from ecosystem.upstream import cannot
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
    "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "SHiRA": lambda: peft.ShiraConfig(r=4, target_modules=TARGETS, random_seed=0, task_type="CAUSAL_LM"),
    "RoAd": lambda: peft.RoadConfig(group_size=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
}

QUANTIZATIONS = ["nf4", "int8"]

_CANNOT_MERGE = {
    **{(adapter, quantization): adapter for adapter in ("AdaLoRA", "IA3") for quantization in QUANTIZATIONS},
    ("RandLoRA", "nf4"): "RandLoRA, 4-bit",
    ("RandLoRA", "int8"): "RandLoRA, 8-bit",
    ("PVeRA", "nf4"): "PVeRA, 4-bit",
}
"""By adapter and quantization, the key in upstream.CANNOT."""

_CASES = [(adapter, quantization) for quantization in QUANTIZATIONS for adapter in ADAPTERS]
each_adapter = pytest.mark.parametrize("trained", _CASES, indirect=True, ids=str)
each_merged_adapter = pytest.mark.parametrize(
    "trained",
    [pytest.param(case, marks=[cannot(_CANNOT_MERGE[case])] if case in _CANNOT_MERGE else []) for case in _CASES],
    indirect=True,
    ids=str,
)

LABELS = (PROMPT * 5 + 3) % VOCABULARY


@pytest.fixture
def trained(request, full_precision):
    """A model with an adapter that has been trained for a few steps, and the losses."""
    adapter, quantization = request.param
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


def adapted(model) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=PROMPT).logits


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


@each_adapter
def test_it_trains_on_frozen_quantized_weights(trained):
    assert trained.losses[-1] < trained.losses[0]
    layers = adapted(trained).values()
    kind = "Linear8bitLt" if trained.quantization == "int8" else "Linear4bit"
    assert layers and all(type(layer.base_layer).__name__ == kind for layer in layers)
    assert all(not layer.base_layer.weight.requires_grad for layer in layers)


@torch.no_grad()
def made_of(layer, weight) -> torch.Tensor:
    """What the layer and its adapter multiply by together with this base weight: what they make of unit vectors."""
    with mock.patch.object(layer.get_base_layer(), "forward", lambda x: torch.nn.functional.linear(x, weight)):
        return layer(torch.eye(weight.shape[1])).T


def effective_weight(layer) -> torch.Tensor:
    """With the base weight that the layer has, in f32."""
    return made_of(layer, exact.dense_weight(layer.get_base_layer()))


def requantized(base, values) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and the scales of values, quantized as the layer's weight is."""
    if isinstance(base, bitsandbytes.nn.Linear8bitLt):
        return bitsandbytes.functional.int8_vectorwise_quant(values)[:2]
    state = base.weight.quant_state
    packed, state = bitsandbytes.functional.quantize_4bit(
        values, blocksize=state.blocksize, quant_type=state.quant_type
    )
    return packed, state.absmax


def scales(base) -> torch.Tensor:
    if isinstance(base, bitsandbytes.nn.Linear8bitLt):
        return base.weight.SCB if base.state.SCB is None else base.state.SCB
    return base.weight.quant_state.absmax


def check_quantized_from(base, values) -> None:
    """The weight is one quantization, and a little f32 rounding in PEFT, away from the values."""
    if isinstance(base, bitsandbytes.nn.Linear8bitLt):
        scale, half_gap = scales(base).view(-1, 1), 1 / 254
    else:
        state = base.weight.quant_state
        scale = state.absmax.repeat_interleave(state.blocksize).view(state.shape)
        half_gap = state.code.diff().max() / 2
    distance = (exact.dense_weight(base) - values).abs() / scale
    assert distance.max() <= half_gap + 1e-5


def adapter_removed(adapter, layer, merged, plain, effective) -> torch.Tensor:
    """The merged weight without the adapter, given a plain weight and what the adapter makes of it."""
    if adapter == "DoRA":
        sum_of_both = plain + layer.get_delta_weight("default")
        return merged * sum_of_both.norm(dim=1, keepdim=True) / effective.norm(dim=1, keepdim=True) - (
            sum_of_both - plain
        )
    if adapter == "HiRA":
        return merged / (1 + layer.get_delta_weight("default"))
    if adapter == "OFT":
        return merged @ layer.get_delta_weight("default").inverse().T
    if adapter == "BOFT":
        rotation, factors = layer.get_delta_weight("default")
        return merged / factors @ rotation.inverse().T
    if adapter == "RoAd":
        return made_of(layer, torch.eye(len(plain))).inverse() @ merged
    return merged - (effective - plain)


# Adapters whose merged weight PEFT computes as the sum that get_delta_weight says: codes are equal to the bit.
SUMS = ("LoRA", "rsLoRA", "VeRA", "PVeRA")


@each_merged_adapter
def test_it_merges_and_unmerges(trained):
    layers = adapted(trained)
    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    plain = {name: exact.dense_weight(base) for name, base in bases.items()}
    effective = {name: effective_weight(layer) for name, layer in layers.items()}
    trained.merge_adapter()
    assert all(layer.merged for layer in layers.values())
    for name, base in bases.items():
        check_quantized_from(base, effective[name])
        check_codes(trained, layers[name], plain[name], 1)

    merged = {name: exact.dense_weight(base) for name, base in bases.items()}
    trained.unmerge_adapter()
    assert not any(layer.merged for layer in layers.values())
    for name, layer in layers.items():
        removed = adapter_removed(trained.name, layer, merged[name], plain[name], effective[name])
        check_quantized_from(bases[name], removed)
        check_codes(trained, layer, merged[name], -1)


@torch.no_grad()
def check_codes(trained, layer, start, sign) -> None:
    if trained.name in SUMS:
        base = layer.get_base_layer()
        codes, expected = requantized(base, start + sign * layer.get_delta_weight("default"))
        assert torch.equal(base.weight, codes) and torch.equal(scales(base), expected)


@each_merged_adapter
def test_it_is_merged_for_good(trained):
    effective = {
        name.removeprefix("base_model.model."): effective_weight(layer) for name, layer in adapted(trained).items()
    }
    merged = trained.merge_and_unload()
    assert not adapted(merged)
    for name, weight in effective.items():
        layer = merged.get_submodule(name)
        assert type(layer).__name__ == ("Linear8bitLt" if trained.quantization == "int8" else "Linear4bit")
        check_quantized_from(layer, weight)


@each_adapter
def test_it_is_saved_and_loaded(trained, full_precision, tmp_path):
    trained.save_pretrained(tmp_path)
    base = models.load("llama", full_precision["llama"], trained.quantization)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with models.calls_recorded(models.int8_layers(trained)) as calls:
        expected = logits(trained)
    exact.follow_int8_inputs(loaded, calls, 1e-5)
    assert close(logits(loaded), expected, 1e-5), "AdaLoRA's file leaves out the ranks that are zero"


@each_adapter
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


def check_best_of_rank(adapter, residual) -> None:
    """The adapter makes up for as much of the residual as one of its rank can."""
    left = torch.linalg.svdvals(residual)[_RANK["r"] :].norm()
    assert (residual - adapter).norm() <= (1 + 1e-4) * left < residual.norm()


LOFTQ = {**_LORA, "lora_alpha": _RANK["r"]}
"""As LoftQ takes an adapter's product for what is added."""


@torch.no_grad()
def test_loftq_starts_as_near_to_the_full_model_as_its_rank_allows(full_precision):
    full = models.load("llama", full_precision["llama"])
    weight = full.model.layers[0].self_attn.q_proj.weight.clone()
    config = peft.LoraConfig(**LOFTQ, init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    with CudaIsCpu():
        model = peft.get_peft_model(full, config)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    check_best_of_rank(layer.get_delta_weight("default"), weight - layer.base_layer.weight)


@torch.no_grad()
def test_loftq_weights_bring_quantized_ones_as_near_to_the_full_ones_as_their_rank_allows(full_precision):
    full = models.load("llama", full_precision["llama"])
    base = models.load("llama", full_precision["llama"], "nf4")
    model = peft.get_peft_model(base, peft.LoraConfig(**LOFTQ)).eval()
    with CudaIsCpu():
        peft.replace_lora_weights_loftq(model, model_path=str(full_precision["llama"] / "model.safetensors"))
    for name, layer in adapted(model).items():
        weight = full.get_submodule(name.removeprefix("base_model.model.")).weight
        quantized = exact.dense_weight(layer.get_base_layer())
        check_best_of_rank(effective_weight(layer) - quantized, weight - quantized)

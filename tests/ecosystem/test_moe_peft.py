"""LoRA on experts in 4 bits: by expert, trained, merged, unmerged, saved and loaded."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from ecosystem import moe_models
from packaging.version import Version

import bnb_core
from bnb_core.nn import GroupedLinear4bit

if Version(transformers.__version__) < Version("5"):
    pytest.skip("before Transformers 5 experts are linear layers", allow_module_level=True)

IDS = torch.arange(1, 13).view(2, 6)

each_model = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])


def adapted(model, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.experts\.(gate_up_proj|down_proj)", **options)
    return peft.get_peft_model(model, config)


@pytest.fixture
def model(name):
    return adapted(bnb_core.quantize_model(moe_models.make(name)))


def adapters(model):
    """By the name of the layer in the model without adapters; only those of experts."""
    return {
        module_name.removeprefix("base_model.model."): module
        for module_name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), GroupedLinear4bit)
    }


def fill(model):
    """With something that matters; zeros would hide mistakes."""
    for module in adapters(model).values():
        for factor in (module.lora_A, module.lora_B):
            torch.nn.init.normal_(factor["default"].weight, std=0.2)


def dense_with_adapters(model, name):
    """The model of full precision whose weights are the dequantized ones and the adapters' products."""
    dense = moe_models.make(name)
    moe_models.set_dequantized(dense, copy.deepcopy(model).unload())
    with torch.no_grad():
        for layer, module in adapters(model).items():
            experts, _, parameter = layer.rpartition(".")
            getattr(dense.get_submodule(experts), parameter).add_(module.get_delta_weight("default"))
    return dense


@each_model
@torch.no_grad()
def test_adapters_begin_by_changing_nothing(name):
    plain = bnb_core.quantize_model(moe_models.make(name))
    expected = plain(IDS).logits
    assert torch.equal(adapted(plain)(IDS).logits, expected)


@each_model
def test_logits_and_gradients_are_those_of_the_sum(model, name):
    fill(model)
    dense = dense_with_adapters(model, name)
    embedded = [m.get_input_embeddings()(IDS).detach().requires_grad_() for m in (model, dense)]
    outputs = [m(inputs_embeds=e).logits for m, e in zip((model, dense), embedded, strict=True)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3 * float(outputs[1].detach().abs().max()))
    for output in outputs:
        output.square().mean().backward()
    gradients = [e.grad for e in embedded]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=2e-3 * float(gradients[1].abs().max()))


@each_model
def test_training_adapters_of_experts_lowers_the_loss(model, name):
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_nothing_as_large_as_a_weight_of_an_expert_in_full_precision_is_kept_for_the_backward():
    layer = GroupedLinear4bit(4, 256, 256).to("cpu")
    kept = []
    experts = torch.nn.ModuleDict({"gate_up_proj": layer})
    config = peft.LoraConfig(r=4, target_modules=["gate_up_proj"])
    wrapped = peft.inject_adapter_in_model(config, experts)["gate_up_proj"]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        wrapped(torch.randn(8, 256, requires_grad=True), torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32))
    assert kept and max(kept) < 4 * 256 * 256


@each_model
@torch.no_grad()
def test_merged_weights_are_a_quantization_away_from_the_sum_and_unmerging_takes_it_out(model, name):
    fill(model)
    with_adapter = model(IDS).logits
    before = _weights(model)
    deltas = {layer: module.get_delta_weight("default") for layer, module in adapters(model).items()}
    model.merge_adapter()
    merged = _weights(model)
    for layer, delta in deltas.items():
        exact = before[layer] + delta
        assert (merged[layer] - exact).norm() < 0.15 * exact.norm(), layer
    assert (model(IDS).logits - with_adapter).norm() < 0.5 * with_adapter.norm()
    model.unmerge_adapter()
    for layer, weight in _weights(model).items():
        assert (weight - before[layer]).norm() < 0.3 * (before[layer].norm() + deltas[layer].norm()), layer
    plain = model.merge_and_unload()
    assert not adapters(plain) and any(isinstance(module, GroupedLinear4bit) for module in plain.modules())


def _weights(model):
    dequantize = bnb_core.functional.dequantize_4bit
    layers = {name: module.base_layer for name, module in adapters(model).items()}
    return {name: dequantize(layer.weight, layer.quant_state) for name, layer in layers.items()}


PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def with_parameters(model, parameters=PARAMETERS, **options):
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=parameters, **options)
    )


@each_model
@torch.no_grad()
def test_target_parameters_means_the_experts_of_the_same_name(model, name, recwarn, tmp_path):
    fill(model)
    named = with_parameters(bnb_core.quantize_model(moe_models.make(name)))
    assert adapters(named).keys() == adapters(model).keys()
    values = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    assert not named.load_state_dict(values, strict=False).unexpected_keys
    assert torch.equal(named(IDS).logits, model(IDS).logits)
    named.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(bnb_core.quantize_model(moe_models.make(name)), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert not [each for each in recwarn if "no parameter was matched" in str(each.message)]


def test_target_parameters_takes_a_second_adapter_and_one_projection_alone():
    model = with_parameters(bnb_core.quantize_model(moe_models.make("mixtral")), ["experts.down_proj.weight"])
    assert all(name.endswith(".experts.down_proj") for name in adapters(model)) and adapters(model)
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj.weight"])
    model.add_adapter("second", config)
    assert all(set(layer.r) == {"default", "second"} for layer in adapters(model).values())


@each_model
@torch.no_grad()
def test_saved_adapters_are_loaded(model, name, tmp_path):
    fill(model)
    model.save_pretrained(tmp_path)
    fresh = bnb_core.quantize_model(moe_models.make(name))
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(IDS).logits, bnb_core.quantize_model(moe_models.make(name))(IDS).logits)


@pytest.mark.parametrize(
    ("options", "error"), [({"use_dora": True}, "^use_dora"), ({"init_lora_weights": "olora"}, "^init_lora_weights")]
)
def test_options_without_meaning_for_experts_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        adapted(bnb_core.quantize_model(moe_models.make("mixtral")), **options)

"""A whole model is quantized in place: every linear layer, nothing else, and it still computes what it did."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bnb_core
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Linear4bit, Linear8bitLt
from bnb_core.quantize import METHODS, QuantizationConfig

methods = pytest.mark.parametrize("method", METHODS)


def _model():
    layers = {"embed": nn.Embedding(20, 64), "body": nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))}
    return nn.ModuleDict({**layers, "norm": nn.LayerNorm(64), "lm_head": nn.Linear(64, 20, bias=False)})


def _run(model, tokens):
    return model["lm_head"](model["norm"](model["body"](model["embed"](tokens))))


@methods
def test_every_linear_layer_is_quantized_and_nothing_else(method):
    model = _model()
    kept = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("body")}
    biases = [model["body"][i].bias.clone() for i in (0, 2)]
    assert bnb_core.quantize_model(model, QuantizationConfig(method)) is model
    expected = Linear8bitLt if method == "int8" else Linear4bit
    assert [type(layer) for layer in model["body"]] == [expected, nn.ReLU, expected]
    for name, value in kept.items():
        same_bits(name, model.get_parameter(name).data, value)
    for i, bias in zip((0, 2), biases, strict=True):
        same_bits("bias", model["body"][i].bias.data, bias)
    assert not any(p.requires_grad for p in model.parameters())


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_stay_close(backend, method, dtype):
    model, tokens = _model().to(dtype), torch.arange(20)
    before = _run(model, tokens)
    after = _run(bnb_core.quantize_model(model, QuantizationConfig(method)), tokens)
    assert after.dtype == dtype
    assert (after - before).float().norm() < (0.03 if method == "int8" else 0.3) * before.float().norm()


@methods
def test_saved_model_is_loaded_into_one_made_on_meta(method, tmp_path):
    config, tokens = QuantizationConfig(method), torch.arange(20)
    model = bnb_core.quantize_model(_model(), config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = bnb_core.quantize_model(_model(), config)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True, assign=True)
    same_bits("logits", _run(fresh, tokens).detach(), _run(model, tokens).detach())


@methods
def test_values_are_assigned_to_a_model_on_meta_and_quantized_by_the_move(method):
    config, tokens, source = QuantizationConfig(method), torch.arange(20), _model()
    with torch.device("meta"):
        model = bnb_core.quantize_model(_model(), config)
    model.load_state_dict(source.state_dict(), assign=True)
    expected = _run(bnb_core.quantize_model(source, config), tokens)
    same_bits("logits", _run(model.to("cpu"), tokens).detach(), expected.detach())


@methods
def test_torchs_fused_transformer_layer_does_not_read_codes_as_values(method):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = layer(x)
        after = bnb_core.quantize_model(layer, QuantizationConfig(method))(x)
    assert isinstance(layer.linear1, (Linear4bit, Linear8bitLt))
    assert (after - before).norm() < 0.2 * before.norm()


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(64, 64)
    model = bnb_core.quantize_model(nn.ModuleDict({"a": shared, "b": shared}))
    assert model["a"] is model["b"] and isinstance(model["a"], Linear4bit)


def test_quantizing_twice_changes_nothing():
    model = bnb_core.quantize_model(_model())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bnb_core.quantize_model(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_settings_reach_the_layers():
    options = {"double_quantization": False, "quant_storage": torch.bfloat16, "compute_dtype": torch.bfloat16}
    layer = bnb_core.quantize_model(_model(), QuantizationConfig("fp4", **options, skip_modules=("0",)))["body"]
    assert type(layer[0]) is nn.Linear
    state = layer[2].quant_state
    assert state.quant_type == "fp4" and not state.nested and layer[2].compute_dtype == torch.bfloat16
    assert layer[2].weight.dtype == torch.bfloat16
    int8 = bnb_core.quantize_model(_model(), QuantizationConfig("int8", threshold=3.0))["body"][0]
    assert int8.state.threshold == 3.0 and not int8.state.has_fp16_weights


REFUSED = {
    "unknown method": (ValueError, "method", lambda: QuantizationConfig("int3")),
    "a dict": (TypeError, "config", lambda: bnb_core.quantize_model(_model(), {"method": "nf4"})),
    "a bare layer": (ValueError, "model", lambda: bnb_core.quantize_model(nn.Linear(4, 4))),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_wrong_arguments_are_refused(case):
    error, named, call = case
    with pytest.raises(error, match=f"^{named}: "):
        call()


def test_stacked_weights_that_stay_in_float_are_named_with_their_bytes(recwarn):
    experts = nn.Module()
    experts.up = nn.Parameter(torch.zeros(4, 64, 32))
    model = nn.ModuleDict({"linear": nn.Linear(32, 32), "experts": experts, "convolution": nn.Conv1d(4, 4, 3)})
    bnb_core.quantize_model(model)
    (warning,) = recwarn
    assert "leaves 32,768 bytes" in str(warning.message) and "experts.up (32,768 bytes)" in str(warning.message)
    assert "convolution" not in str(warning.message)
    recwarn.clear()
    bnb_core.nn.parametrize.replace_parameter_4bit(experts, "up")
    bnb_core.quantize_model(model)
    assert not recwarn


class _OtherExperts(nn.Module):
    """Made as none of the classes that have modules to take their places."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.kernels = nn.Parameter(torch.randn(4, 64, 32))

    def forward(self, x, expert):
        return x @ self.kernels[expert]


def test_experts_of_an_unknown_kind_are_dequantized_when_they_are_read(recwarn):
    model = nn.ModuleDict({"experts": _OtherExperts()})
    x = torch.randn(3, 64)
    before = model["experts"](x, 2)
    bnb_core.quantize_model(model)
    assert not recwarn and {parameter.dtype for parameter in model.parameters()} == {torch.uint8}
    assert (model["experts"](x, 2) - before).norm() < 0.2 * before.norm()


def test_experts_named_in_skip_modules_stay_as_they_are():
    model = nn.ModuleDict({"experts": _OtherExperts()})
    with pytest.warns(UserWarning, match=r"experts\.kernels"):
        bnb_core.quantize_model(model, QuantizationConfig(skip_modules=("experts",)))
    assert model["experts"].kernels.is_floating_point()

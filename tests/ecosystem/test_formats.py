"""from_pretrained with the formats and block sizes that Transformers' own BitsAndBytesConfig does not know."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from checkpoints import tensors_of
from ecosystem import moe_models
from ecosystem.models import logits
from ecosystem.tasks import same_bytes
from ecosystem.upstream import FACE
from packaging.version import Version

import bnb_core
from bnb_core import functional
from bnb_core.checkpoints import config_json
from bnb_core.formats import FORMATS
from bnb_core.nn import Linear4bit
from bnb_core.quantize import QuantizationConfig

if FACE == "real":
    pytest.skip("it is about bnb_core", allow_module_level=True)

IS_5 = Version(transformers.__version__) >= Version("5")
# Transformers 4 converts codes that are viewed as another float dtype than the model's.
STORAGE = torch.bfloat16 if IS_5 else torch.uint8


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)


@pytest.fixture(
    params=[(name, *rest) for name in FORMATS for rest in ((32, True, torch.uint8), (256, False, STORAGE))],
    ids=str,
)
def config(request):
    name, blocksize, double, storage = request.param
    return QuantizationConfig(name, double, blocksize, torch.float32, storage)


def as_json(config, skipped):
    return {
        "quant_method": "bnb_core",
        "format": config.method,
        "blocksize": config.blocksize,
        "double_quantization": config.double_quantization,
        "compute_dtype": "float32",
        "quant_storage": str(config.quant_storage).removeprefix("torch."),
        "skip_modules": skipped,
    }


def test_a_model_is_quantized_saved_and_loaded_by_from_pretrained_alone(full_precision, tmp_path, config):
    source = full_precision["llama"]
    model = load(source, quantization_config=bnb_core.transformers_config(config))
    weights = tensors_of(source)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) > 6 and "lm_head" not in layers
    for name, layer in layers.items():
        codes, state = functional.quantize_4bit(
            weights[f"{name}.weight"],
            blocksize=config.blocksize,
            quant_type=config.method,
            compress_statistics=config.double_quantization,
            quant_storage=config.quant_storage,
        )
        assert same_bytes(layer.weight.data, codes) and same_bytes(layer.weight.quant_state.absmax, state.absmax)
        assert (layer.weight.quant_state.blocksize, layer.weight.quant_state.quant_type) == (
            config.blocksize,
            config.method,
        )
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == as_json(config, None)
    again = load(tmp_path / "saved")
    assert again.config.quantization_config.to_dict() == as_json(config, None)
    assert torch.equal(logits("llama", again), logits("llama", model))


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.skipif(not IS_5, reason="fused"))]
)
def test_a_folder_of_the_command_in_a_format_of_our_own_is_the_model(
    tmp_path, monkeypatch, full_precision, config, name
):
    """A format is our own if bitsandbytes does not have it: here none is said to."""
    monkeypatch.setattr(config_json, "OF_BITSANDBYTES", ())
    source = full_precision["llama"]
    if name != "llama":
        source = tmp_path / "source"
        moe_models.make(name).save_pretrained(source)
    bnb_core.quantize_checkpoint(source, tmp_path / "out", config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == as_json(config, written["skip_modules"]) and "lm_head" in written["skip_modules"]
    model, expected = load(tmp_path / "out"), load(source, quantization_config=bnb_core.transformers_config(config))
    model.save_pretrained(tmp_path / "saved")
    found, wanted = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(same_bytes(value, wanted[key]) for key, value in found.items())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == written
    ids = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


def test_a_new_process_needs_no_more_than_the_name(full_precision, tmp_path):
    config = QuantizationConfig(blocksize=128)
    load(full_precision["llama"], quantization_config=bnb_core.transformers_config(config)).save_pretrained(tmp_path)
    program = (
        "import bnb_core, sys; bnb_core.install_as_bitsandbytes(); import transformers; "
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map='cpu'); "
        "print(model.model.layers[0].mlp.up_proj.weight.quant_state.blocksize)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1] == "128"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"format": "nf5"}, "format: expected one of fp4, nf4, got 'nf5'"),
        ({"blocksize": 48}, "blocksize"),
        ({"compute_dtype": "float7"}, "compute_dtype"),
        ({"quant_storage": torch.int64}, "quant_storage"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_by_name(arguments, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        type(bnb_core.transformers_config())(**arguments)


def test_int8_is_left_to_transformers():
    with pytest.raises(ValueError, match=r"BitsAndBytesConfig\(load_in_8bit=True\)"):
        bnb_core.transformers_config(QuantizationConfig("int8"))
    with pytest.raises(TypeError, match="config: expected a QuantizationConfig, got dict"):
        bnb_core.transformers_config({})

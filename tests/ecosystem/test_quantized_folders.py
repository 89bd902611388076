"""`bnb-core quantize`: Transformers loads the folder, and has the model that it would have quantized itself."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import tokenizers
import torch
import transformers
from checkpoints import tensors_of
from click.testing import CliRunner
from ecosystem import models, moe_models
from ecosystem.models import CONFIGS, QUANTIZATIONS, logits
from ecosystem.tasks import same_bytes
from packaging.version import Version
from tokenizers import Tokenizer

import bnb_core
from bnb_core.cli.commands import bnb_core as group
from bnb_core.quantize import QuantizationConfig

IS_5 = Version(transformers.__version__) >= Version("5")
CONFIG_OF = {
    "nf4": QuantizationConfig("nf4", double_quantization=False),
    "nf4 double bf16": QuantizationConfig("nf4", compute_dtype=torch.bfloat16),
    "fp4 bf16 storage": QuantizationConfig(
        "fp4", double_quantization=False, compute_dtype=torch.float32, quant_storage=torch.bfloat16
    ),
    "int8": QuantizationConfig("int8"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_folder_is_the_model_that_transformers_quantizes(full_precision, tmp_path, name, quantization):
    """But for routers, which the folder keeps as they are, and experts, which models.py leaves out."""
    config = CONFIG_OF[quantization]
    all_of_it = name != "mixtral"
    if IS_5 and not all_of_it:
        config = QuantizationConfig(config.method, skip_modules=("*.experts.*",))
    dtype = models.unquantized_dtype(transformers.BitsAndBytesConfig(**QUANTIZATIONS[quantization]))
    source = full_precision[name]
    if dtype != torch.float32:  # Transformers converts before it quantizes
        source = tmp_path / "source"
        models.load(name, full_precision[name], dtype=dtype).save_pretrained(source)
    bnb_core.quantize_checkpoint(source, tmp_path / "out", config, fuse_experts=IS_5)
    model = models.load(name, tmp_path / "out", dtype=dtype)
    expected = models.load(name, source, quantization)
    found, wanted = model.state_dict(), expected.state_dict()
    if all_of_it:
        assert found.keys() == wanted.keys()
    for key, value in found.items():
        is_router = not all_of_it and ".gate." in key
        if key in wanted and wanted[key].dtype == value.dtype and ".quant_state." not in key and not is_router:
            assert same_bytes(value, wanted[key]), key
    if all_of_it:
        assert torch.equal(logits(name, model), logits(name, expected))


@pytest.mark.skipif(not IS_5, reason="before Transformers 5 experts are linear layers")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h", "llama4", "jetmoe", "dbrx", "doge"])
@pytest.mark.parametrize("original_layout", [True, False], ids=["one tensor for each expert", "fused"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@torch.no_grad()
def test_the_folder_has_the_bytes_of_experts_that_transformers_quantizes(tmp_path, name, original_layout, double):
    """DBRX's stay as they are: Transformers quantizes them when it loads the folder."""
    source, ours, theirs = (tmp_path / each for each in ("source", "ours", "theirs"))
    moe_models.make(name).save_pretrained(source, save_original_format=original_layout)
    config = QuantizationConfig(double_quantization=double, compute_dtype=torch.float32)
    bnb_core.quantize_checkpoint(source, ours, config)
    quantization = json.loads((ours / "config.json").read_text())["quantization_config"]
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, device_map="cpu", dtype=torch.float32)
    model = load(source, quantization_config=transformers.BitsAndBytesConfig(**quantization))
    model.save_pretrained(theirs)
    if name != "dbrx":
        found, wanted = tensors_of(ours), tensors_of(theirs)
        assert found.keys() == wanted.keys()
        assert all(same_bytes(value, wanted[key]) for key, value in found.items())
    ids = torch.arange(1, 13).view(2, 6)
    loaded = bnb_core.load_quantized(ours)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    bnb_core.dequantize_checkpoint(ours, tmp_path / "back")
    if name not in ("dbrx", "doge"):
        torch.testing.assert_close(load(tmp_path / "back")(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not IS_5, reason="before Transformers 5 experts are linear layers")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_skipped_experts_stay_as_they_are_in_the_model(tmp_path, name):
    moe_models.make(name).save_pretrained(tmp_path / "source")
    bnb_core.quantize_checkpoint(tmp_path / "source", tmp_path / "out", QuantizationConfig(skip_modules=("experts",)))
    experts = bnb_core.load_quantized(tmp_path / "out").model.layers[1].mlp.experts
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source").model.layers[1].mlp.experts
    for parameter, expected in zip(experts.parameters(), original.parameters(), strict=True):
        assert same_bytes(parameter, expected)


@pytest.mark.skipif(not IS_5, reason="before Transformers 5 experts are linear layers")
def test_a_model_quantized_in_memory_is_the_folder_that_the_command_writes(tmp_path):
    """And is loaded into a model that was made by its configuration."""
    moe_models.make("qwen3_moe").save_pretrained(tmp_path / "source")
    bnb_core.quantize_checkpoint(tmp_path / "source", tmp_path / "out")
    model = bnb_core.quantize_model(moe_models.make("qwen3_moe"))
    bnb_core.save_quantized(model, tmp_path / "saved")
    found, wanted = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(same_bytes(value, wanted[key]) for key, value in found.items())
    loaded = bnb_core.load_quantized(tmp_path / "out", moe_models.make("qwen3_moe"))
    ids = torch.arange(1, 13).view(2, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.fixture
def with_tokenizer(full_precision, tmp_path):
    """A llama with a tokenizer that knows a letter for each of its tokens."""
    folder = tmp_path / "llama"
    shutil.copytree(full_precision["llama"], folder)
    letters = {chr(0x4E00 + number): number for number in range(models.VOCABULARY)}
    tokenizer = Tokenizer(tokenizers.models.WordLevel(letters, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_chat_answers_with_the_tokens_of_the_quantized_model(with_tokenizer, tmp_path):
    bnb_core.quantize_checkpoint(with_tokenizer, tmp_path / "out", CONFIG_OF["nf4"])
    prompt = "".join(chr(0x4E00 + number) for number in models.PROMPT[0].tolist())
    report = tmp_path / "report.json"
    arguments = ["chat", str(tmp_path / "out"), "--prompt", prompt, "--max-new-tokens", "12", "--json", str(report)]
    result = CliRunner().invoke(group, arguments)
    assert result.exit_code == 0, result.output
    (turn,) = json.loads(report.read_text())["turns"]
    assert [ord(letter) - 0x4E00 for letter in turn["answer"].replace(" ", "")] == models.answer("llama")[8:]
    assert turn["tokens"] == 12 and turn["memory"] > 0


def test_a_folder_without_a_model_given_is_loaded_by_its_architecture(full_precision, tmp_path):
    bnb_core.quantize_checkpoint(full_precision["llama"], tmp_path / "out", CONFIG_OF["nf4"])
    model = bnb_core.load_quantized(tmp_path / "out")
    assert type(model) is transformers.LlamaForCausalLM
    assert models.greedy(model.eval()) == models.answer("llama")

"""`bnb-core quantize`: Transformers loads the folder, and has the model that it would have quantized itself."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from ecosystem import models
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
    """But for routers and, in Transformers 5, experts of three dimensions, which the folder keeps as they are."""
    config = CONFIG_OF[quantization]
    if name == "mixtral":
        config = QuantizationConfig(config.method, skip_modules=("*.experts.*",)) if IS_5 else config
    dtype = models.unquantized_dtype(transformers.BitsAndBytesConfig(**QUANTIZATIONS[quantization]))
    source = full_precision[name]
    if dtype != torch.float32:  # Transformers converts before it quantizes
        source = tmp_path / "source"
        models.load(name, full_precision[name], dtype=dtype).save_pretrained(source)
    bnb_core.quantize_checkpoint(source, tmp_path / "out", config)
    model = models.load(name, tmp_path / "out", dtype=dtype)
    expected = models.load(name, source, quantization)
    found, wanted = model.state_dict(), expected.state_dict()
    if name != "mixtral":
        assert found.keys() == wanted.keys()
    for key, value in found.items():
        if key in wanted and wanted[key].dtype == value.dtype and ".quant_state." not in key:
            assert same_bytes(value, wanted[key]), key
    if name != "mixtral":
        assert torch.equal(logits(name, model), logits(name, expected))


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

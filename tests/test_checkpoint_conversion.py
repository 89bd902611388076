"""A checkpoint is quantized from file to file: the bits of the layers, all or nothing, the same after being killed."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import QUANTIZED, SHARDS, files_of, make_folder, tensors_of
from safetensors.torch import load_file, save_file
from torch import nn

import bnb_core
from bnb_core import dequantize_checkpoint, inspect_checkpoint, quantize_checkpoint, verify_checkpoint
from bnb_core.checkpoints import CheckpointFileError, convert, shard
from bnb_core.checkpoints.convert import Progress
from bnb_core.quantize import METHODS, QuantizationConfig

FIRST, SECOND = SHARDS
QUANTIZED_BY_OTHERS = b'{"quantization_config": {"quant_method": "gptq"}}'
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("made") / "source")


@pytest.fixture
def source(made, tmp_path):
    """One that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "source"))


def layer_entries(name, weight, config):
    """What a quantized layer with this weight has in its state dict."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    state = bnb_core.quantize_model(nn.ModuleDict({"layer": linear}), config).state_dict()
    return {key.replace("layer.", name.removesuffix("weight"), 1): value for key, value in state.items()}


@pytest.mark.parametrize(
    "config",
    [
        QuantizationConfig(),
        QuantizationConfig("nf4", double_quantization=False, blocksize=4096),
        QuantizationConfig("fp4", blocksize=128, quant_storage=torch.bfloat16),
        QuantizationConfig("int8"),
    ],
    ids=["nf4", "nf4 single, large blocks", "fp4 in bf16", "int8"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_entries_are_those_of_quantized_layers_to_the_bit(tmp_path, monkeypatch, config, dtype):
    monkeypatch.setattr(convert, "LEAST_PIECE", 20_000)  # so that a weight is read in many pieces
    monkeypatch.setattr(convert, "MOST_PIECE", 20_000)
    source = make_folder(tmp_path / "source", dtype)
    quantize_checkpoint(source, tmp_path / "out", config)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    expected = {key: value for key, value in before.items() if key not in QUANTIZED}
    for name in QUANTIZED:
        expected |= layer_entries(name, before[name], config)
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert after[key].dtype == value.dtype and after[key].shape == value.shape, key
        assert torch.equal(after[key].view(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), key


def test_the_folder_says_how_it_is_quantized_and_keeps_everything_else(made, tmp_path):
    result = quantize_checkpoint(made, tmp_path / "out", QuantizationConfig("nf4", skip_modules=("*.q_proj",)))
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"]
    assert quantization["bnb_4bit_quant_type"] == "nf4" and quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    skipped = quantization["llm_int8_skip_modules"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.self_attn.q_proj"} <= set(skipped)
    assert not {name.removesuffix(".weight") for name in QUANTIZED[:2]} & set(skipped)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(out).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert (out / "tokenizer" / "vocab.txt").read_text() == "a\nb\n"
    assert not (out / "pytorch_model.bin").exists() and not (tmp_path / "out.partial").exists()
    assert result.quantized == 2 and any("experts.down" in remark for remark in result.remarks)


@pytest.mark.parametrize("method", METHODS)
def test_dequantized_values_are_those_of_the_layers(made, tmp_path, method):
    quantize_checkpoint(made, tmp_path / "out", QuantizationConfig(method))
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    before, after = tensors_of(made), tensors_of(tmp_path / "back")
    assert {key: (t.dtype, t.shape) for key, t in after.items()} == {k: (t.dtype, t.shape) for k, t in before.items()}
    errors = {each.name: each for each in verify_checkpoint(tmp_path / "out", made)}
    assert errors.keys() == set(QUANTIZED)
    for name, value in before.items():
        if name not in QUANTIZED:
            assert torch.equal(after[name], value), name
            continue
        # A row's largest magnitude over 254, or half the widest gap between codes; and bf16's own rounding.
        step = 1 / 254 if method == "int8" else 0.17
        bound = step * value.abs().max().item() * 1.01
        assert errors[name].largest <= bound and (after[name] - value).abs().max() <= bound + 2**-8 * 5, name
        noise = (load_values(tmp_path / "out", name, method) - value.double()).square().sum()
        assert errors[name].sqnr == pytest.approx(10 * torch.log10(value.double().square().sum() / noise).item(), 1e-6)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config


def load_values(out, name, method):
    """The values of a quantized weight in f64, by the definition of the formats."""
    entries = {key: value for key, value in tensors_of(out).items() if key.startswith(name.removesuffix("weight"))}
    if method == "int8":
        return entries[name].double() * entries[name.replace("weight", "SCB")].double()[:, None] / 127
    packed, code = entries[name].view(-1), entries[f"{name}.quant_map"].double()
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1).long()
    nested = entries[f"{name}.nested_quant_map"].double()[entries[f"{name}.absmax"].long()]
    nested *= entries[f"{name}.nested_absmax"].double().repeat_interleave(256)[: len(nested)]
    state = next(value for key, value in entries.items() if ".quant_state." in key)
    state = json.loads(bytes(state.tolist()))
    scales = (nested + state["nested_offset"]).repeat_interleave(state["blocksize"])
    rows, columns = state["shape"]
    return (code[codes] * scales[: len(codes)])[: rows * columns].view(rows, columns)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_layers_that_store_their_weight_transposed_are_quantized_as_what_they_compute(tmp_path, method):
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn(96, 288)
    save_file({"h.0.attn.c_attn.weight": weight}, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "gpt2"}')
    quantize_checkpoint(source, tmp_path / "out", QuantizationConfig(method))
    expected = layer_entries("h.0.attn.c_attn.weight", weight.T.contiguous(), QuantizationConfig(method))
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    (errors,) = verify_checkpoint(tmp_path / "out", source)
    assert errors.sqnr > 18
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    assert (tensors_of(tmp_path / "back")["h.0.attn.c_attn.weight"] - weight).abs().max() < 0.8


def test_a_killed_run_is_gone_on_with_to_the_same_bytes(made, tmp_path):
    quantize_checkpoint(made, tmp_path / "whole")
    out = tmp_path / "out"
    in_the_second_file = len(SHARDS[FIRST]) + 2
    command = [sys.executable, checkpoints.__file__, str(made), str(out), str(in_the_second_file)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    read, earlier = [], []
    quantize_checkpoint(made, out, progress=Progress(advance=read.append, resumed=earlier.append))
    assert earlier[0] >= sum(tensor.nbytes for tensor in load_file(made / FIRST).values())
    assert sum(read) + earlier[0] == sum(tensor.nbytes for tensor in tensors_of(made).values())
    assert files_of(out) == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_another_input_or_other_options_do_not_go_on_with_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shard.ShardWriter, "finish", lambda self: refuse())

    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        quantize_checkpoint(source, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(CheckpointFileError, match="begun from another input or with other options"):
        quantize_checkpoint(source, tmp_path / "out", QuantizationConfig("fp4"))
    (tmp_path / "out.partial" / "journal").open("a").write('{"shard": "cut of')
    quantize_checkpoint(source, tmp_path / "out")
    assert verify_checkpoint(tmp_path / "out", source)


def test_what_exists_is_never_replaced(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for call in (quantize_checkpoint, dequantize_checkpoint):
        with pytest.raises(ValueError):
            call(made, out)
    assert list(out.iterdir()) == [] and not (tmp_path / "out.partial").exists()


def spoil(name, change):
    def spoiled(source):
        path = source / name
        path.write_bytes(change(path.read_bytes()))

    return spoiled


def drop_index_entry(content):
    index = json.loads(content)
    index["weight_map"]["surplus.weight"] = FIRST
    return json.dumps(index).encode()


def with_nan(source):
    tensors = load_file(source / FIRST)
    tensors[QUANTIZED[0]][3, 5] = float("nan")
    save_file(tensors, source / FIRST)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (spoil(FIRST, lambda content: content[:-5]), f"{FIRST}: truncated: its header tells of"),
        (spoil(FIRST, lambda content: content[:100]), f"{FIRST}: truncated: a header of"),
        (spoil(FIRST, lambda content: content + b"more"), "4 bytes follow the last tensor"),
        (spoil(FIRST, lambda content: b""), "no safetensors file"),
        (spoil(FIRST, lambda content: content[:8] + b"[" + content[9:]), "its header is not JSON"),
        (spoil(FIRST, lambda content: content.replace(b'"BF16"', b'"F32" ', 1)), "does not have"),
        (lambda source: (source / FIRST).unlink(), f"{FIRST}: missing, though model.safetensors.index.json names it"),
        (spoil(INDEX, drop_index_entry), "lacks surplus.weight"),
        (spoil(INDEX, lambda content: content.replace(b"model-00001", b"../x")), "names of files"),
        (spoil("config.json", lambda content: b"{"), "config.json: not JSON"),
        (spoil("config.json", lambda content: QUANTIZED_BY_OTHERS), r"already \(gptq\)"),
        (with_nan, f"{QUANTIZED[0]}: holds values that are not finite"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(source, tmp_path, change, sentence):
    change(source)
    with pytest.raises(CheckpointFileError, match=sentence):
        quantize_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_before_any_work(made, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointFileError, match="more bytes on the disk, which has 1 free"):
        quantize_checkpoint(made, tmp_path / "out")


def test_verifying_finds_what_has_changed(made, tmp_path):
    quantize_checkpoint(made, tmp_path / "out")
    file = tmp_path / "out" / FIRST
    tensors = load_file(file)
    tensors["model.layers.0.norm.weight"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointFileError, match=r"norm\.weight: differs from the original"):
        verify_checkpoint(tmp_path / "out", made)


@pytest.mark.parametrize("method", METHODS)
def test_sizes_are_those_of_the_files_and_what_is_promised_comes_true(made, tmp_path, method):
    promised = inspect_checkpoint(made).alternatives
    quantize_checkpoint(made, tmp_path / "out", QuantizationConfig(method, double_quantization=False))
    sizes = inspect_checkpoint(tmp_path / "out")
    assert sizes.nbytes == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert sizes.nbytes == promised[method] == sum(layer.nbytes for layer in sizes.layers)
    assert sizes.parameters == inspect_checkpoint(made).parameters
    assert inspect_checkpoint(tmp_path / "out").alternatives["bfloat16"] == inspect_checkpoint(made).nbytes


@pytest.mark.parametrize("files", [["diffusion_pytorch_model"], ["a", "b"]], ids=["one file", "two without an index"])
def test_files_keep_their_names_and_get_an_index_where_they_need_one(tmp_path, files):
    source = tmp_path / "source"
    source.mkdir()
    for name in files:
        save_file({f"{name}.weight": torch.randn(64, 64)}, source / f"{name}.safetensors")
    quantize_checkpoint(source, tmp_path / "out")
    expected = {"config.json", *(f"{name}.safetensors" for name in files)}
    expected |= {"model.safetensors.index.json"} if len(files) > 1 else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


def test_an_index_of_another_name_keeps_it(source, tmp_path):
    (source / INDEX).rename(source / "diffusion.safetensors.index.json")
    quantize_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "diffusion.safetensors.index.json").exists() and not (tmp_path / "out" / INDEX).exists()

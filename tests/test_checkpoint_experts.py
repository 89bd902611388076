"""The experts of a mixture from file to file: fused where they are one tensor each, also from several files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import checkpoints
import pytest
import torch
from checkpoints import files_of, tensors_of
from click.testing import CliRunner
from safetensors.torch import save_file

from bnb_core import dequantize_checkpoint, functional, inspect_checkpoint, quantize_checkpoint, verify_checkpoint
from bnb_core.checkpoints import CheckpointFileError, convert
from bnb_core.cli.commands import bnb_core as group
from bnb_core.quantize import METHODS, QuantizationConfig

EXPERTS = "model.layers.0.mlp.experts"
COUNT, HIDDEN, INNER = 11, 48, 20
"""An expert's gate has 960 elements, its down projection as many: no multiple of a piece, or of blocks of 512."""
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj.weight", f"{EXPERTS}.down_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def make_tensors(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    names = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors = {
        f"{EXPERTS}.{e}.{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for e in range(COUNT)
        for name, shape in names.items()
    }
    return {**tensors, Q_PROJ: torch.randn(64, HIDDEN, generator=generator).to(dtype)}


def fused(tensors):
    """As Transformers 5 has them."""
    of = {
        name: [tensors[f"{EXPERTS}.{e}.{name}.weight"] for e in range(COUNT)]
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    gate_up = torch.stack([torch.cat(pair) for pair in zip(of["gate_proj"], of["up_proj"], strict=True)])
    return {GATE_UP: gate_up, DOWN: torch.stack(of["down_proj"])}


def save(folder, tensors, model_type="qwen3_moe"):
    """In two files: the experts of a layer lie in both."""
    folder.mkdir()
    names = list(tensors)
    for number, each in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        if each:
            save_file({name: tensors[name].contiguous() for name in each}, folder / f"model-{number}.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """Of 1,280 bytes, which are no multiple of an expert."""
    monkeypatch.setattr(convert, "LEAST_PIECE", 1280)


@pytest.mark.parametrize("layout", ["one tensor for each expert", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_the_entries_are_those_of_the_whole_tensor(tmp_path, small_pieces, layout, dtype, blocksize, double):
    tensors = make_tensors(dtype)
    whole = fused(tensors)
    parameters = {name.removesuffix(".weight"): value for name, value in whole.items()}
    source = save(tmp_path / "source", {Q_PROJ: tensors[Q_PROJ], **parameters} if layout == "fused" else tensors)
    result = quantize_checkpoint(source, tmp_path / "out", QuantizationConfig("fp4", double, blocksize))
    assert result.kept == {}
    found = tensors_of(tmp_path / "out")
    for name, values in whole.items():
        codes, state = functional.quantize_4bit(
            values, blocksize=32 if values[0].numel() % 64 else blocksize, quant_type="fp4", compress_statistics=double
        )
        entries = {name: codes, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
        assert entries.keys() == {key for key in found if key.startswith(name)}
        assert all(torch.equal(found[key], value) for key, value in entries.items())


def test_a_smaller_block_serves_where_the_one_wanted_does_not_divide_an_expert(tmp_path):
    quantize_checkpoint(save(tmp_path / "source", make_tensors()), tmp_path / "out", QuantizationConfig(blocksize=512))
    formats = inspect_checkpoint(tmp_path / "out").formats
    assert formats.keys() == {"nf4, blocks of 512, double quantization", "nf4, blocks of 32, double quantization"}


def test_a_killed_run_is_gone_on_with_to_the_same_bytes(tmp_path):
    source = save(tmp_path / "source", make_tensors())
    quantize_checkpoint(source, tmp_path / "whole")
    for pieces in (5, 30):  # among the experts' gates, and among their down projections
        command = [sys.executable, checkpoints.__file__, str(source), str(tmp_path / "out"), str(pieces)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    quantize_checkpoint(source, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_verifying_holds_fused_experts_to_those_that_they_were_made_from(tmp_path):
    tensors = make_tensors()
    source = save(tmp_path / "source", tensors)
    quantize_checkpoint(source, tmp_path / "out")
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back", torch.float32)
    back = tensors_of(tmp_path / "back")
    errors = {each.name: each for each in verify_checkpoint(tmp_path / "out", source)}
    assert errors.keys() == {GATE_UP, DOWN, Q_PROJ}
    for name, values in fused(tensors).items():
        difference = values.double() - back[name.removesuffix(".weight")].double()
        assert errors[name].largest == difference.abs().max().item()
        assert errors[name].rms == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-12)
        assert errors[name].sqnr > 18
    tensors.pop(f"{EXPERTS}.{COUNT - 1}.up_proj.weight")
    with pytest.raises(CheckpointFileError, match=r"not in the original|missing"):
        verify_checkpoint(tmp_path / "out", save(tmp_path / "another", tensors))


def test_biases_are_named_after_their_layer_and_get_their_names_back(tmp_path):
    parameters = {name.removesuffix(".weight"): value for name, value in fused(make_tensors()).items()}
    bias = torch.randn(COUNT, 2 * INNER, generator=torch.Generator().manual_seed(1))
    tensors = {**parameters, f"{EXPERTS}.gate_up_proj_bias": bias}
    source = save(tmp_path / "source", tensors, "gpt_oss")
    quantize_checkpoint(source, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{EXPERTS}.gate_up_proj.bias"], bias)
    assert len(verify_checkpoint(tmp_path / "out", source)) == 2
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    assert back.keys() == tensors.keys() and torch.equal(back[f"{EXPERTS}.gate_up_proj_bias"], bias)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (QuantizationConfig("int8"), lambda tensors: None, "experts, which int8 leaves as they are"),
        (QuantizationConfig(skip_modules=("*.experts.*",)), lambda tensors: None, "skip *.experts.*"),
        (QuantizationConfig(skip_modules=("experts",)), lambda tensors: None, "skip experts"),
        (
            QuantizationConfig(),
            lambda tensors: tensors.pop(f"{EXPERTS}.3.up_proj.weight"),
            "an expert of a layer whose experts do not fit together",
        ),
        (
            QuantizationConfig(),
            lambda tensors: tensors.update({key: value[:, :9] for key, value in tensors.items() if "experts" in key}),
            "experts whose elements no block size divides",
        ),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_quantized_stay_as_they_are_and_are_spoken_of(tmp_path, config, change, reason):
    tensors = make_tensors()
    change(tensors)
    source = save(tmp_path / "source", tensors)
    result = quantize_checkpoint(source, tmp_path / "out", config)
    assert result.quantized == 1 and result.kept == {reason: len(tensors) - 1}
    assert reason.startswith("skip") or any(reason in remark for remark in result.remarks)
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in tensors.items() if name != Q_PROJ)
    assert len(verify_checkpoint(tmp_path / "out", source)) == 1


def test_separate_experts_are_linear_layers(tmp_path):
    tensors = make_tensors()
    source = save(tmp_path / "source", tensors)
    result = CliRunner().invoke(group, ["quantize", str(source), str(tmp_path / "out"), "--separate-experts"])
    assert result.exit_code == 0, result.output
    assert {name for name in tensors_of(tmp_path / "out") if name.endswith(".weight")} == tensors.keys()
    assert {each.name for each in verify_checkpoint(tmp_path / "out", source)} == tensors.keys()


def test_an_expert_that_is_not_finite_is_named(tmp_path):
    tensors = make_tensors()
    name = f"{EXPERTS}.7.up_proj.weight"
    tensors[name][3, 5] = float("nan")
    with pytest.raises(CheckpointFileError, match=f"{name}: holds values that are not finite"):
        quantize_checkpoint(save(tmp_path / "source", tensors), tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_promised_comes_true(tmp_path, method):
    parameters = {name.removesuffix(".weight"): value for name, value in fused(make_tensors()).items()}
    source = save(tmp_path / "source", {**parameters, Q_PROJ: make_tensors()[Q_PROJ]})
    quantize_checkpoint(source, tmp_path / "out", QuantizationConfig(method, double_quantization=False))
    sizes = inspect_checkpoint(tmp_path / "out")
    assert sizes.nbytes == inspect_checkpoint(source).alternatives[method]
    assert sizes.parameters == inspect_checkpoint(source).parameters
    assert sizes.alternatives["bfloat16"] == inspect_checkpoint(source).nbytes

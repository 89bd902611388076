"""`bnb-core quantize`, `dequantize`, `inspect` and `chat`: what they print, and how they refuse."""

from __future__ import annotations

import json

import pytest
from checkpoints import QUANTIZED, make_folder, tensors_of
from click.testing import CliRunner

from bnb_core.cli.commands import bnb_core as group


def run(*arguments):
    return CliRunner().invoke(group, list(map(str, arguments)), prog_name="bnb-core", env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture(scope="module")
def quantized(source):
    """What the command printed; the folder is beside the source."""
    folder = source.parent
    result = run(
        "quantize", source, folder / "out", "--format", "fp4", "--blocksize", "128", "--no-double-quant",
        "--skip", "*.q_proj",
        "--verify", "--picture", folder / "errors.png", "--json", folder / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result


def test_quantize_takes_every_option_and_reports(source, quantized):
    folder = source.parent
    assert "2 weights quantized to fp4" in quantized.output and "1 embedding" in quantized.output
    assert "experts.down: stays BF16" in quantized.output and "SQNR" in quantized.output
    report = json.loads((folder / "report.json").read_text())
    assert report["quantized"] == 2 and len(report["errors"]) == 2
    assert [each["format"] for each in report["errors"]] == ["fp4, blocks of 128"] * 2
    assert (folder / "errors.png").read_bytes()[1:4] == b"PNG"
    assert f"{QUANTIZED[2]}.absmax" not in tensors_of(folder / "out")


def test_inspect_shows_formats_layers_and_alternatives(source, quantized):
    output = run("inspect", source.parent / "out").output
    for text in ("fp4, blocks of 128", "BF16", "model.layers.1", "nf4, double quantization", "bits a parameter"):
        assert text in output
    facts = json.loads(run("inspect", source.parent / "out", "--json").output)
    assert facts["nbytes"] == sum(facts["formats"].values()) == sum(layer["nbytes"] for layer in facts["layers"])


def test_dequantize_brings_the_shapes_back(source, quantized, tmp_path):
    result = run("dequantize", source.parent / "out", tmp_path / "back", "--dtype", "float32", "--json", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "r").read_text())["quantized"] == 2
    assert {k: t.shape for k, t in tensors_of(tmp_path / "back").items()} == {
        k: t.shape for k, t in tensors_of(source).items()
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["quantize", "nonesuch", "out"], "nonesuch: no such folder"),
        (["quantize", "SOURCE", "SOURCE"], "source: exists; choose another name, or remove it"),
        (["quantize", "OUT", "new"], "is quantized already (bitsandbytes); dequantize it first"),
        (["quantize", "SOURCE", "new", "--device", "cuda:77"], "device: expected a device that this machine has"),
        (["quantize", "SOURCE", "new", "--picture", "a.png"], "--picture: shows what --verify finds"),
        (["quantize", "SOURCE", "new", "--verify", "--picture", "a.txt"], "expected a name that ends in .png"),
        (["quantize", "SOURCE", "new", "--blocksize", "96"], "'96' is not one of '32'"),
        (["quantize", "SOURCE", "new", "--json", "nonesuch/r.json"], "cannot write to"),
        (["dequantize", "SOURCE", "new"], "holds no weight that bitsandbytes or bnb_core has quantized"),
        (["inspect", "SOURCE/config.json"], "config.json: no safetensors file"),
        (["inspect", "SOURCE/tokenizer"], "no safetensors files in this folder"),
        (["inspect", ""], "expected a path, got ''"),
        (["chat", "nonesuch"], "nonesuch: no such folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(source, quantized, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = {"SOURCE": str(source), "OUT": str(source.parent / "out")}
    result = run(*(named.get(a, a.replace("SOURCE", str(source))) for a in arguments))
    assert result.exit_code == 2 and result.output.count("\n") == 1 and result.output.startswith("Error: ")
    assert sentence in result.output
    assert list(tmp_path.iterdir()) == []

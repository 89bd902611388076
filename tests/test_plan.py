"""`bnb-core plan`: the shapes that it takes, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bnb_core.cli.commands import bnb_core as program
from bnb_core.plan import KNOWN, Settings, plan, shape_of_config, shape_of_size

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def _run(*arguments: object):
    return CliRunner().invoke(program, ["plan", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_known_shapes_have_the_published_numbers_of_weights():
    assert {name: shape.weights for name, shape in KNOWN.items()} == {
        "8B": 8_030_261_248,
        "70B": 70_553_706_496,
        "405B": 405_853_388_800,
    }


def test_a_config_and_a_size_give_a_shape():
    assert shape_of_config(LLAMA_8B) == KNOWN["8B"]
    assert shape_of_size(8.03e9) == KNOWN["8B"]
    assert shape_of_size(70.5e9) == KNOWN["70B"]
    assert shape_of_config({**LLAMA_8B, "tie_word_embeddings": True, "head_dim": 64}).kv_width == 512


def test_parts_by_hand():
    """One layer's seven weights have 218,103,808 elements: 109,051,904 bytes, and 3,407,872 scales of a byte."""
    memory = plan(KNOWN["8B"], Settings(ranks=1, sequence=1, dtype_bytes=2))
    assert memory.weights == 32 * (109_051_904 + 2 * 4096 * 2) + (2 * 128256 * 4096 + 4096) * 2
    assert memory.scales == 32 * (3_407_872 + 7 * (16 + 256 + 1) * 4 + 3_407_872 // 256 * 4)
    assert memory.adapters == memory.gradients == 41_943_040 * 4
    assert memory.states == 41_943_040 * 2 + 41_943_040 // 256 * 8
    assert memory.gathered_root == memory.gathered_layers == 0


def test_the_report_says_what_the_table_does(tmp_path: Path):
    config, report = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_8B))
    result = _run("--config", config, "--ranks", 8, "--json", report)
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    assert content["shape"]["layers"] == 32 and content["settings"]["ranks"] == 8
    parts = {name: size for name, size in content["bytes"].items() if name != "total"}
    assert sum(parts.values()) == content["bytes"]["total"]
    assert f"{content['bytes']['total'] / 2**30:.2f}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected one of --params and --config"),
        (("--params", "7e9", "--config", "x"), "expected one of --params and --config"),
        (("--params", "1e6"), "--params: params: expected at least"),
        (("--params", "-1"), "--params: params: expected at least"),
        (("--params", "nan"), "--params: params: expected at least"),
        (("--config", "missing.json"), "missing.json"),
        (("--params", "7e9", "--ranks", "0"), "--ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(arguments: tuple[str, ...], message: str):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"vocab_size": "many"}, {"num_hidden_layers": 0}])
def test_a_config_that_lacks_an_entry_is_refused_by_its_name(change: dict[str, object], tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, **change}))
    result = _run("--config", tmp_path / "config.json")
    assert result.exit_code == 2
    assert f"{next(iter(change))}: expected a whole number > 0" in result.output

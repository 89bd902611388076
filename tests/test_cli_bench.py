"""`bnb-core bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from bnb_core import registry
from bnb_core.cli.commands import bnb_core as program
from bnb_core.registry import Backend

COLUMNS = ["primitive", "case", "time", "GB/s", "of copy", "GFLOP/s", "of dense matmul"]


def bench(*arguments):
    return CliRunner().invoke(program, ["bench", "--size", "64", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_report_has_a_row_for_each_call_and_says_where_it_comes_from(tmp_path):
    path = tmp_path / "bench.json"
    result = bench("--json", path)
    assert result.exit_code == 0, result.output
    content = json.loads(path.read_text())
    assert content["backend"] == registry.serving("cpu")["gemm_4bit"] and content["isa"] in content["details"]["isa"]
    assert content["device"] == "cpu" and content["size"] == 64 and content["machine"]["cpu"]
    assert all(list(row) == COLUMNS and row["time"].endswith(" ms") for row in content["rows"])
    limits = [row["case"] for row in content["rows"] if not row["primitive"]]
    assert limits == ["copy", "dense matmul, bf16, M=512"]
    assert {row["primitive"] for row in content["rows"] if row["primitive"]} <= set(registry.primitive_names())


def test_the_table_has_the_columns_and_rows_of_the_report(tmp_path):
    path = tmp_path / "bench.json"
    lines = bench("--backend", "reference", "--json", path).output.splitlines()
    assert [cell.strip() for cell in lines[1].strip("┃ ").split("┃")] == COLUMNS
    printed = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert printed == [list(row.values()) for row in json.loads(path.read_text())["rows"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--backend", "nowhere"], "registered are"),
        (["--backend", "cpu", "--device", "cuda"], "serves cpu"),
        (["--device", "abacus"], "'abacus'"),
        (["--json", "/missing/bench.json"], "--json: cannot write to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence):
    result = bench(*arguments)
    assert result.exit_code == 2 and result.output.count("\n") == 1 and sentence in result.output, result.output


def test_a_device_that_the_chosen_backend_does_not_serve_is_refused():
    with registry.use_backend("cpu"):
        result = bench("--device", "cuda")
    assert result.exit_code == 2 and "backend 'cpu' takes tensors on cpu" in result.output


def test_a_backend_without_a_primitive_is_refused_with_its_name():
    with registry.registered(Backend("partial", ("cpu",), 0, {})):
        result = bench("--backend", "partial")
    assert result.exit_code == 2 and "backend 'partial' does not have this primitive" in result.output


def test_conformance_times_every_instruction_set_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("bnb_core.conformance.perf.measure", lambda backend, device, size: [{"case": "none"}])
    path = tmp_path / "perf.json"
    result = CliRunner().invoke(
        program, ["conformance", "--backend", "cpu", "--perf", "--isa", "all", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    reports = json.loads(path.read_text())
    assert [r["isa"] for r in reports] == registry.backends()["cpu"].instruction_sets.available()

"""`bnb-core bench`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from bnb_core import registry
from bnb_core.backend import Backend
from bnb_core.cli.bench import check_size
from bnb_core.cli.commands import bnb_core as program
from bnb_core.cli.errors import BadInput
from bnb_core.conformance import report

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
        (["--json", ""], "'--json': expected a path, got ''"),
        (["--backend", ""], "registered are"),
        (["--device", ""], "got ''"),
        (["--size", "99999999999"], "--size: expected at most"),
        (["--size", "63"], "'--size': 63 is not in the range x>=64"),
        (["--size", "many"], "'--size': 'many'"),
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


def test_what_a_kernel_raises_is_one_line_that_names_backend_and_primitive():
    def fail(*arguments, out):
        raise ZeroDivisionError("a bug of theirs")

    with registry.registered(Backend("theirs", ("cpu",), 0, {"quantize_4bit": fail})):
        result = bench("--backend", "theirs")
    sentence = "Error: backend 'theirs': ZeroDivisionError: a bug of theirs"
    note = "; raised in quantize_4bit: backend 'theirs'" if sys.version_info >= (3, 11) else ""
    assert result.exit_code == 1 and result.output == f"{sentence}{note}\n"


def test_a_report_of_a_backend_that_cannot_tell_its_details_says_so():
    def fail():
        raise ZeroDivisionError("a bug of theirs")

    header = report.header(Backend("theirs", ("cpu",), 0, {}, details=fail), torch.device("cpu"))
    assert "ZeroDivisionError: a bug of theirs" in header["details"]["details"]


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 1000**2))
    check_size(1000, torch.device("cuda:0"))
    with pytest.raises(BadInput, match=r"--size: expected at most 1000 on cuda:0, .*, got 1001"):
        check_size(1001, torch.device("cuda:0"))


def test_conformance_times_every_instruction_set_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("bnb_core.conformance.perf.measure", lambda backend, device, size: [{"case": "none"}])
    path = tmp_path / "perf.json"
    result = CliRunner().invoke(
        program, ["conformance", "--backend", "cpu", "--perf", "--isa", "all", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    reports = json.loads(path.read_text())
    assert [r["isa"] for r in reports] == registry.backends()["cpu"].instruction_sets.available()

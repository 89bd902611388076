"""The suite is honest: what would prove nothing fails the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from throwaway import NAME, after, run, throwaway

from bnb_core import primitives, registry
from bnb_core.backend import InstructionSets
from bnb_core.checks import QUANT_TYPES
from bnb_core.cli import conformance as cli_conformance
from bnb_core.cli.commands import bnb_core as program
from bnb_core.conformance import oracle, runner
from bnb_core.conformance.case import Case, Failure
from bnb_core.conformance.suite import all_cases, covering, gemm_4bit, quantize, required_classes, threads
from bnb_core.conformance.values import DTYPES, dtype_name
from bnb_core.formats import FORMATS

ROOT = Path(__file__).parents[1]
CASE = next(case for case in all_cases() if case.primitive == "dequantize_blockwise")


def _message(results):
    (result,) = results
    assert result.failed
    return result.message


def test_every_promised_class_has_a_case():
    assert runner.coverage_gaps(all_cases(), required_classes()) == []


def test_a_primitive_without_cases_is_a_gap():
    cases = [case for case in all_cases() if case.primitive != "gemm_4bit"]
    assert "gemm_4bit: has no case" in runner.coverage_gaps(cases, required_classes())


def test_a_primitive_that_nobody_promised_to_cover_is_a_gap():
    required = {name: classes for name, classes in required_classes().items() if name != "gemm_4bit"}
    assert any(
        gap.startswith("gemm_4bit: the suite does not say") for gap in runner.coverage_gaps(all_cases(), required)
    )


@pytest.mark.parametrize(("trait", "value"), [("dtype", "bfloat16"), ("blocksize", "2048"), ("values", "nan")])
def test_a_class_without_a_case_is_a_gap(trait, value):
    cases = [case for case in all_cases() if case.traits.get(trait) != value]
    assert f"quantize_4bit: no case with {trait} {value}" in runner.coverage_gaps(cases, required_classes())


def test_no_case_is_an_error():
    with throwaway() as backend, pytest.raises(ValueError, match="nothing would be proved"):
        run(backend, [])


def test_a_case_that_another_backend_serves_fails():
    def by_reference(context):
        with registry.use_backend("reference"):
            CASE.run(context)

    with throwaway() as backend:
        message = _message(run(backend, [Case(CASE.primitive, "elsewhere", by_reference)]))
    assert "served by reference instead of throwaway" in message


def test_a_case_that_calls_nothing_fails():
    with throwaway() as backend:
        message = _message(run(backend, [Case("gemm_4bit", "idle", lambda context: None)]))
    assert "never called" in message


def _write_around(side):
    def spoil(arguments, out):
        if out.untyped_storage().nbytes() > out.nbytes:
            whole = torch.tensor([], dtype=torch.uint8).set_(out.untyped_storage())
            start = out.storage_offset() * out.dtype.itemsize
            whole[start - 1 if side == "before" else start + out.nbytes] = 0

    return spoil


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_write_outside_the_output_fails(side):
    with throwaway(after("dequantize_blockwise", _write_around(side))) as backend:
        assert f"bytes {side} it were overwritten" in _message(run(backend, [CASE]))


SPOILT = {
    "an input was changed": lambda arguments, out: arguments["absmax"].mul_(2),
    "gave different bits": lambda arguments, out: out.add_(torch.rand(())),
    "elements differ": lambda arguments, out: out.view(-1)[-1:].fill_(float("inf")),
}


@pytest.mark.parametrize("sentence", SPOILT)
def test_a_spoilt_result_fails(sentence):
    with throwaway(after("dequantize_blockwise", SPOILT[sentence])) as backend:
        assert sentence in _message(run(backend, [CASE]))


def test_a_changed_field_of_a_record_fails():
    case = next(case for case in all_cases() if case.primitive == "dequantize_4bit")
    with throwaway(after("dequantize_4bit", SPOILT["an input was changed"])) as backend:
        assert "an input was changed" in _message(run(backend, [case]))


@pytest.mark.parametrize(("name", "sentence"), [("p", "p: bytes after it"), ("g", "that is only read was changed")])
def test_a_step_that_writes_where_it_must_not_fails(name, sentence):
    def spoil(arguments, out):
        tensor = arguments[name]
        (tensor if name == "g" else tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel())).add_(1)

    case = next(case for case in all_cases() if case.primitive == "optimizer_update_32bit")
    with throwaway(after("optimizer_update_32bit", spoil)) as backend:
        assert sentence in _message(run(backend, [case]))


def test_the_oracle_knows_every_format_by_its_own_numbers():
    assert oracle.FORMATS.keys() == FORMATS.keys()
    for name, row in FORMATS.items():
        codebook = oracle.FORMATS[name].codebook
        np.testing.assert_array_equal(np.float32(row.codebook), codebook)
        assert int(np.abs(codebook).argmin()) == row.zero


@pytest.mark.parametrize(
    ("file", "primitives"),
    [(quantize, {"quantize_4bit", "dequantize_4bit"}), (gemm_4bit, {"gemm_4bit", "gemm_4bit_backward"})],
)
def test_another_format_has_its_cases(monkeypatch, file, primitives):
    monkeypatch.setattr(file, "QUANT_TYPES", (*QUANT_TYPES, "another"))
    assert {case.primitive for case in file.cases() if case.traits.get("quant_type") == "another"} == primitives


def _round_by_threads(arguments, out):
    if torch.get_num_threads() > 1:
        out.copy_(torch.nextafter(out, torch.tensor(float("inf"))))


@pytest.mark.parametrize("sums", ["torch's", "its own"])
def test_only_a_backend_that_leaves_its_sums_to_torch_may_round_them_by_the_number_of_threads(monkeypatch, sums):
    before = torch.get_num_threads()
    if sums == "its own":
        monkeypatch.setattr(threads, "IN_AN_ORDER_OF_THEIR_OWN", (NAME,))
    case = next(c for c in threads.cases() if c.primitive == "gemm_4bit" and c.traits["dtype"] == "float32")
    with throwaway(after("gemm_4bit", _round_by_threads)) as backend:
        (result,) = run(backend, [case])
    assert result.failed == (sums == "its own") and torch.get_num_threads() == before
    assert not result.failed or "with two threads, beside that with one" in result.message


def test_an_output_left_unwritten_fails():
    with throwaway({"dequantize_blockwise": lambda *arguments, out: None}) as backend:
        assert _message(run(backend, [CASE]))


def test_an_error_inside_a_kernel_fails_its_case_alone():
    def broken(*arguments, out):
        raise RuntimeError("no such instruction")

    other = next(case for case in all_cases() if case.primitive == "int8_linear_matmul")
    with throwaway({"dequantize_blockwise": broken}) as backend:
        first, second = run(backend, [CASE, other])
    assert first.failed and "no such instruction" in first.message and not second.failed


def test_an_expected_failure_passes_the_run_until_it_passes(tmp_path):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"dequantize_blockwise/*": "the device rounds down"}))
    with throwaway(after("dequantize_blockwise", SPOILT["elements differ"]), expected_failures=path) as backend:
        (result,) = run(backend, [CASE])
    assert result.status == "expected failure" and not result.failed
    with throwaway(expected_failures=path) as backend:
        assert "was expected to fail: the device rounds down" in _message(run(backend, [CASE]))


def test_an_instruction_set_that_changes_on_the_way_is_an_error():
    serving = ["wide"]
    choice = InstructionSets(lambda: ["wide", "narrow"], lambda: serving[0], lambda name: serving.__setitem__(0, name))
    with (
        throwaway(instruction_sets=choice) as backend,
        pytest.raises(RuntimeError, match="ended on wide"),
        runner.instruction_set(backend, "narrow"),
    ):
        choice.select("wide")


def test_a_failing_refusal_is_noticed(monkeypatch):
    """The error cases fail where bad arguments are accepted."""
    case = next(c for c in all_cases() if c.primitive == "quantize_4bit" and "blocksize 63" in c.name)
    with throwaway() as backend:
        context = runner.Context(backend.name, torch.device("cpu"))
        monkeypatch.setattr(primitives.quantize_4bit, "_checked", lambda arguments: ((), torch.device("cpu")))
        monkeypatch.setattr(primitives.quantize_4bit, "_plans", {})
        with pytest.raises(Failure):
            case.run(context)


def test_an_expected_failure_that_matches_no_case_is_dead(tmp_path):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({CASE.id: "known", "dequantize_blockwise/*": "known", "gemm_3bit/*": "gone"}))
    assert runner.ExpectedFailures(path).dead(all_cases()) == ["gemm_3bit/*"]


def _program(*arguments):
    return CliRunner().invoke(program, ["conformance", *arguments])


@pytest.fixture
def few_cases(monkeypatch):
    """Have the program run these cases, whatever is asked for."""
    return lambda *cases: monkeypatch.setattr(cli_conformance, "select_cases", lambda *asked: list(cases))


def _skip(context):
    raise runner.Skip("needs 1000 GiB")


def test_a_run_in_which_every_case_is_skipped_fails(few_cases):
    few_cases(Case("gemm_4bit", "huge", _skip))
    result = _program("--backend", "reference")
    assert result.exit_code == 1 and "0 passed" in result.output and "1 skipped" in result.output
    assert "nothing was proved" in result.output


def test_each_status_is_counted_by_itself(few_cases, tmp_path):
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"gemm_4bit/idle": "known"}))
    idle = Case("gemm_4bit", "idle", lambda context: None)
    few_cases(CASE, idle, Case("gemm_4bit", "huge", _skip))
    with throwaway(expected_failures=path) as backend:
        result = _program("--backend", backend.name, "--case", "a selection")
    assert result.exit_code == 0, result.output
    assert "1 passed, 0 failed, 1 failed as expected, 1 skipped" in result.output


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "live"])
def test_a_dead_expected_failure_fails_a_full_run(few_cases, tmp_path, dead):
    other = next(case for case in all_cases() if case.primitive == "gemm_4bit")
    path = tmp_path / "expected.json"
    path.write_text(json.dumps({"gemm_3bit/*" if dead else other.id: "known"}))
    few_cases(CASE)
    with throwaway(expected_failures=path) as backend:
        full = _program("--backend", backend.name)
        selected = _program("--backend", backend.name, "--primitive", CASE.primitive)
    assert full.exit_code == int(dead) and selected.exit_code == 0
    assert ("'gemm_3bit/*' matches no case" in full.output) == dead


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "No such file"), ("{", "cannot be read"), ("[]", "got a list"), ('{"api/*": 1}', "reason")],
)
def test_wrong_expected_failures_are_bad_input(tmp_path, content, sentence):
    path = tmp_path / "expected.json"
    if content is not None:
        path.write_text(content)
    with throwaway(expected_failures=path) as backend:
        result = _program("--backend", backend.name, "--primitive", CASE.primitive)
    _assert_bad_input(result, str(path), sentence)


def _assert_bad_input(result, *sentences):
    """One line and exit code 2, before any case has run."""
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert all(sentence in result.output for sentence in sentences), result.output


@pytest.fixture
def reports(tmp_path):
    path = tmp_path / "a.json"
    result = _program("--backend", "cpu", "--primitive", "dequantize_blockwise", "--json", str(path))
    assert result.exit_code == 0, result.output
    return path, tmp_path / "b.json"


def test_a_report_does_not_differ_from_itself(reports):
    result = _program("compare", str(reports[0]), str(reports[0]))
    assert result.exit_code == 0 and result.output.startswith("0 of ")


def test_a_report_that_differs_in_one_case_names_it(reports):
    first, second = reports
    content = json.loads(first.read_text())
    content["cases"][CASE.id]["digest"] = "0"
    second.write_text(json.dumps(content))
    result = _program("compare", str(first), str(second))
    assert result.exit_code == 1 and f"{CASE.id}: other bits" in result.output


def test_reports_with_different_seeds_are_not_compared(reports):
    first, second = reports
    second.write_text(json.dumps({**json.loads(first.read_text()), "seed": 1}))
    result = _program("compare", str(first), str(second))
    _assert_bad_input(result, "different seeds")


CASES = {"a": {"status": "ok", "digest": "0"}}
WRONG_REPORTS = {
    "not JSON": ("{", "cannot be read"),
    "not text": (b"\xff\xfe", "cannot be read"),
    "too deep": ("[" * 100_000, "cannot be read"),
    "several instruction sets": ([], "got a list"),
    "another format": ({"format": 0}, "of format 1, got 0"),
    "no seed": ({"format": 1, "cases": CASES}, "seed"),
    "no cases": ({"format": 1, "seed": 0}, "cases"),
    "no case": ({"format": 1, "seed": 0, "cases": {}}, "cases"),
    "a case that is a number": ({"format": 1, "seed": 0, "cases": {"a": 1}}, "cases: a"),
    "a case without digest": ({"format": 1, "seed": 0, "cases": {"a": {"status": "ok"}}}, "digest"),
}


@pytest.mark.parametrize("wrong", WRONG_REPORTS)
def test_a_wrong_report_is_bad_input(tmp_path, wrong):
    content, sentence = WRONG_REPORTS[wrong]
    right, path = tmp_path / "right.json", tmp_path / "wrong.json"
    right.write_text(json.dumps({"format": 1, "seed": 0, "cases": CASES}))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    _assert_bad_input(_program("compare", str(right), str(path)), str(path), sentence)


def test_a_report_that_cannot_be_written_is_refused_before_any_case_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "run", lambda *arguments: pytest.fail("a case ran"))
    for path in (tmp_path, tmp_path / "missing" / "a.json"):
        _assert_bad_input(_program("--backend", "reference", "--json", str(path)), f"--json: cannot write to {path}")


def test_bad_input_leaves_an_older_report_as_it_is_and_begins_no_new_one(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    for path in (old, new):
        _assert_bad_input(_program("--backend", "nowhere", "--json", str(path)), "nowhere")
    assert old.read_text() == "{}" and not new.exists()


def test_the_report_says_where_it_comes_from(reports):
    content = json.loads(reports[0].read_text())
    assert content["machine"]["torch"] == torch.__version__ and content["backend"] == "cpu" and content["isa"]
    assert content["support"]["dequantize_blockwise"]["float32"].startswith("ok ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--backend"),
        (["--backend", "nowhere"], "registered are"),
        (["--backend", "cpu", "--isa", "mmx"], "avx"),
        (["--backend", "reference", "--isa", "avx2"], "no instruction sets"),
        (["--backend", "cpu", "--primitive", "gemm_3bit"], "gemm_4bit"),
        (["--backend", "cpu", "--case", "nothing like it"], "no case matches"),
        (["--backend", "cpu", "--dtype", "float64"], "float16"),
        (["--backend", "gemm_4bit=cpu"], "registered are"),
        (["--backend", "cpu", "--device", "cuda"], "serves cpu"),
        (["--backend", "reference", "--device", "abacus"], "'abacus'"),
        (["--backend", "reference", "--device", "cpu:x"], "'cpu:x'"),
        (["--backend", "reference", "--device", "meta"], "a device that this machine has"),
        (["--backend", "reference", "--perf", "--case", "values*"], "--perf"),
        (["--backend", "reference", "--perf", "--cover", "pairs"], "--perf"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, sentence):
    _assert_bad_input(_program(*arguments), sentence)


def test_a_dtype_selects_its_cases_and_those_without_one():
    selected = cli_conformance.select_cases((), ("bfloat16",), "*", thorough=False)
    assert {case.traits.get("dtype") for case in selected} == {"bfloat16", "int8", None}
    both = cli_conformance.select_cases(("gemm_4bit",), ("float32", "bfloat16"), "*", thorough=False)
    left_out = [case for case in all_cases() if case.primitive == "gemm_4bit" and case not in both]
    assert left_out and {case.traits["dtype"] for case in left_out} == {"float16"}


@pytest.mark.parametrize("cover, size, share", [("classes", 1, 0.15), ("pairs", 2, 0.4)])
def test_a_covering_selection_has_all_classes_or_all_pairs_and_every_case_without_any(cover, size, share):
    def found(cases):
        return {(case.primitive, *some) for case in cases for some in combinations(sorted(case.traits.items()), size)}

    some = covering(all_cases(), cover)
    assert found(some) == found(all_cases())
    assert {case.id for case in all_cases() if not case.traits} <= {case.id for case in some}
    assert runner.coverage_gaps(some, required_classes()) == []
    assert len(some) < share * len(all_cases())


def test_a_case_that_is_named_for_a_dtype_has_it():
    """So that a run with --dtype leaves it out, and the table of a full one counts it there."""
    dtypes = {dtype_name(dtype) for dtype in DTYPES}
    without = [case for case in all_cases() if case.traits.keys().isdisjoint({"dtype", "quant_storage"})]
    wrong = {case.id for case in without if case.reaches_kernel and dtypes & set(case.name.split(","))}
    assert wrong == set()


def test_the_backend_template_passes_and_prints_its_table(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = ROOT / "examples" / "backend_template"
    subprocess.run([*install, "--target", str(tmp_path), str(source)], check=True, capture_output=True, timeout=300)
    code = "from bnb_core.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", code, "conformance", "--backend", "template", "--dtype", "float32"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "template on cpu" in result.stdout and re.search(r"dequantize_blockw\S* *│ ok \d+", result.stdout)

"""benchmarks/gpu.sh and gpu.py as far as they run without a GPU: what they report when something fails."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from gemm_4bit_choice import KERNELS, program

from bnb_core import primitives, registry

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = "bnb_core"


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark's modules, which have no package, with no peer installed and the CPU in the GPU's place."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    for peer in ("bitsandbytes", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, peer, None)
    modules = {name: import_module(name) for name in ("gpu", "gpu_cases", "measure", "peers", "report", "sweep")}
    monkeypatch.setattr(modules["gpu"], "DEVICE", "cpu")
    monkeypatch.setattr(modules["report"], "gpu_machine", lambda backend, rounds: {"date": "today", "rounds": rounds})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_device_name", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: "none")
    yield SimpleNamespace(**modules)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


def run(benchmark, monkeypatch, cases, *arguments):
    monkeypatch.setattr(benchmark.gpu, "all_cases", lambda: cases)
    return CliRunner().invoke(benchmark.gpu.command, ["--backend", "reference", "--quick", *map(str, arguments)])


def case(benchmark, name, *requirements, **peers):
    contenders = {OURS: lambda: None, **peers}
    measure = benchmark.measure
    work = measure.Work({key: measure.Contender(call) for key, call in contenders.items()}, requirements)
    work.contenders[OURS].kind = "ours"
    return measure.Case(name, lambda: work)


def refuse():
    raise RuntimeError("not here")


def test_a_requirement_that_could_not_be_measured_is_counted_as_such(benchmark, monkeypatch):
    met, missed, unmeasured = (
        benchmark.measure.Requirement(against, at_most)
        for against, at_most in ((None, 1000.0), (None, 0.0), ("bitsandbytes", 1.0))
    )
    cases = [case(benchmark, "one", met, missed), case(benchmark, "two", unmeasured)]
    result = run(benchmark, monkeypatch, cases)
    assert result.exit_code == 0
    assert "3 requirements: 1 missed, 1 not measured" in result.output


def test_the_rounds_reported_are_those_that_were_run(benchmark, monkeypatch, tmp_path):
    assert run(benchmark, monkeypatch, [case(benchmark, "one")], "--json", tmp_path / "o.json").exit_code == 0
    content = json.loads((tmp_path / "o.json").read_text())
    assert len(content["cases"][0]["seconds"][OURS]) == content["machine"]["rounds"] == 3


def test_a_case_that_fails_is_reported_and_costs_no_other(benchmark, monkeypatch, tmp_path):
    failing = benchmark.measure.Case("failing", refuse)
    cases = [case(benchmark, "first"), failing, case(benchmark, "last", bitsandbytes=refuse)]
    result = run(benchmark, monkeypatch, cases, "--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md")
    assert result.exit_code == 1 and "1 cases failed, 0 were not run" in result.output
    written = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [entry["name"] for entry in written] == ["first", "failing", "last"]
    remarks = [entry["remark"] for entry in written]
    assert remarks == ["", "failing fails: RuntimeError: not here", "bitsandbytes fails: RuntimeError: not here"]
    assert all(name in (tmp_path / "out.md").read_text() for name in ("first", *remarks[1:]))


def test_after_an_error_that_lasts_the_results_so_far_are_reported(benchmark, monkeypatch, tmp_path):
    cases = [case(benchmark, "first"), benchmark.measure.Case("fatal", refuse), case(benchmark, "never")]
    answers = iter([None, RuntimeError("an illegal memory access was encountered")])
    monkeypatch.setattr(benchmark.gpu, "_lasting_error", lambda: next(answers))
    result = run(benchmark, monkeypatch, cases, "--json", tmp_path / "out.json")
    assert result.exit_code == 1 and "1 cases failed, 1 were not run" in result.output
    written = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [entry["name"] for entry in written] == ["first", "fatal"]
    assert "the device answers no more: an illegal memory access" in written[1]["remark"]


def test_a_peer_that_cannot_be_made_is_left_out_with_the_reason(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark.peers, "bitsandbytes", object())
    made = benchmark.gpu_cases.peer(lambda theirs: theirs.missing)
    work = benchmark.measure.Work({OURS: benchmark.measure.Contender(lambda: None, "ours"), **made}, ())
    result = benchmark.measure.measure(benchmark.measure.Case("one", lambda: work), 1)
    assert list(result.seconds) == [OURS]
    assert result.remark.startswith("bitsandbytes fails: AttributeError: 'object' object has no attribute 'missing'")


def test_few_rows_must_beat_a_dense_product_up_to_64_of_them(benchmark, monkeypatch):
    contender = benchmark.measure.Contender(lambda: None)
    monkeypatch.setattr(benchmark.gpu_cases, "_linear", lambda *shape: ({OURS: contender}, 1.0))
    monkeypatch.setattr(benchmark.gpu_cases, "dense", lambda *shape: contender)
    held_to = {
        M: [requirement.against for requirement in benchmark.gpu_cases.few_rows(M, 8, 8).requirements]
        for M in (2, 64, 96, 128)
    }
    beside, dense = benchmark.gpu_cases.BITSANDBYTES, benchmark.gpu_cases.DENSE
    assert held_to == {2: [beside, dense], 64: [beside, dense], 96: [beside], 128: [beside]}


@pytest.fixture
def small_sweep(benchmark, monkeypatch):
    """Of the kernels of cuda-sim, in Hopper's place, with weights and numbers of rows that a simulator can do."""
    simulated = registry.backends()["cuda-sim"]
    if simulated.unavailable:
        pytest.skip(f"{simulated.name}: {simulated.unavailable}")
    module = "bnb_core.backends.sim._cuda_kernels"
    monkeypatch.setitem(benchmark.gpu.KERNEL_MODULES, "cuda-sim", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name, value in {"ROWS": (1, 16), "ROUNDS": 1, "TURN_SECONDS": 0}.items():
        monkeypatch.setattr(benchmark.sweep, name, value)
    monkeypatch.setattr(benchmark.gpu, "SHAPES", ((64, 256), (128, 512)))
    cases = benchmark.gpu_cases
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    monkeypatch.setattr(cases, "ROTATED_BYTES", 1)
    timed = benchmark.measure.Contender
    monkeypatch.setattr(cases, "graphed", lambda call, operands, kind: timed(lambda: call(*operands[0]), kind))

    def run(*arguments):
        return CliRunner().invoke(benchmark.gpu.command, ["--backend", "cuda-sim", *map(str, arguments)])

    yield run
    assert import_module(module).set_gemm_4bit_kernel(-1) == -1, "the sweep has left another kernel to serve"


def test_a_sweep_writes_the_fastest_kernels_as_the_table_that_is_compiled(benchmark, small_sweep, tmp_path):
    table, times = tmp_path / "table.h", tmp_path / "times.json"
    result = small_sweep("--sweep", table, "--json", times)
    assert result.exit_code == 0, result.output
    points = json.loads(times.read_text())["points"]
    assert [(point["M"], point["shape"]) for point in points] == [(M, [N, 4 * N]) for N in (64, 128) for M in (1, 16)]
    worth_timing = benchmark.sweep.is_worth_timing
    for point in points:
        assert set(point["seconds"]) == {name for name in KERNELS if worth_timing(name, point["M"]) and name != "wgmma"}
    choice = program(tmp_path, table.read_text())
    for point in points:
        N, K = point["shape"]
        assert choice(90, point["M"], N * K) == min(point["seconds"], key=point["seconds"].get)
    (tmp_path / "before").mkdir()
    before = program(tmp_path / "before", benchmark.sweep.TABLE.read_text())
    assert choice(80, 1, 1) == before(80, 1, 1) and choice(75, 2000, 1) == before(75, 2000, 1) == "dense"


def test_a_sweep_writes_nothing_where_a_kernel_is_wrong(small_sweep, monkeypatch, tmp_path):
    product = primitives.gemm_4bit
    monkeypatch.setattr(primitives, "gemm_4bit", lambda *operands: product(*operands).zero_())
    result = small_sweep("--sweep", tmp_path / "table.h")
    assert result.exit_code == 1 and "the kernel f32 with 1 rows of A is wrong: " in result.output
    assert not (tmp_path / "table.h").exists()


def test_a_sweep_that_takes_too_long_writes_nothing(benchmark, small_sweep, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark.sweep, "SECONDS", -1)
    result = small_sweep("--sweep", tmp_path / "table.h")
    assert result.exit_code == 1 and "-1 s were over before M=1 64x256; nothing was written" in result.output
    assert not (tmp_path / "table.h").exists()


def test_the_rows_of_a_table_join_what_has_the_same_kernel(benchmark):
    def point(M, N, fastest):
        return benchmark.sweep.Point(M, (N, 100), {fastest: 1.0, "f32": 2.0})

    points = [point(1, 10, "mma8"), point(1, 40, "mma8"), point(2, 10, "mma8"), point(2, 40, "mma8")]
    points += [point(4, 10, "mma8"), point(4, 40, "mma16")]
    assert benchmark.sweep.choices(90, points) == [
        "    {90, 2, kAnyNumber, Gemm4bitKernel::mma8},",
        "    {90, 4, 2000, Gemm4bitKernel::mma8},",
        "    {90, 4, kAnyNumber, Gemm4bitKernel::mma16},",
    ]


def test_what_a_graph_reads_lives_as_long_as_the_contender_that_replays_it(benchmark, monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stubs = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nullcontext,
        "graph": nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    closed_over, argument = torch.ones(3), torch.ones(3)
    alive = [weakref.ref(tensor) for tensor in (closed_over, argument)]
    contender = benchmark.gpu_cases.graphed(lambda each, other=closed_over: each + other, [(argument,)])
    del closed_over, argument
    contender = benchmark.measure.Contender(contender.call)  # as copy() makes another one of it
    gc.collect()
    assert all(ref() is not None for ref in alive)
    contender.call()
    del contender
    gc.collect()
    assert all(ref() is None for ref in alive)


def _script_in(checkout: Path) -> Path:
    """A copy of gpu.sh, which removes and makes build/gpu of the checkout it lies in."""
    script = checkout / "benchmarks" / "gpu.sh"
    script.parent.mkdir(parents=True)
    return Path(shutil.copy(BENCHMARKS / "gpu.sh", script))


FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *torch.version.hip*) echo cuda ;;
  -) exec {python} - ;;
  "-m pip install"*) mkdir -p build/gpu ;;
  *"conformance --backend {backend}") exit {conformance} ;;
  *gemm_4bit_kernels*) echo "f32 dense" ;;
  *all_cases*) echo "api gemm_4bit" ;;
  *"conformance --backend triton --primitive "*) echo "$*" >> {compiled}; exit 7 ;;
  *"conformance --backend cuda --primitive gemm_4bit") echo "$BNB_GEMM_4BIT_KERNEL" >> {kernels} ;;
  *conformance*) exit 9 ;;
  *benchmarks/gpu.py*) echo "$PWD: $*" > {output}; exit {benchmark} ;;
esac
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("asked", "backend"), [("", "cuda"), ("triton", "triton")])
@pytest.mark.parametrize(("conformance", "timing", "status"), [(0, 0, 0), (3, 0, 3), (0, 4, 4), (3, 4, 4)])
def test_the_script_times_where_it_was_called_whatever_the_suite_finds(
    tmp_path, conformance, timing, status, asked, backend
):
    script = _script_in(tmp_path / "checkout")
    python = tmp_path / "python"
    output, kernels, compiled = (tmp_path / name for name in ("timed", "kernels", "compiled"))
    python.write_text(
        FAKE_PYTHON.format(
            python=sys.executable,
            backend=backend,
            conformance=conformance,
            output=output,
            benchmark=timing,
            kernels=kernels,
            compiled=compiled,
        )
    )
    python.chmod(0o755)
    caller = tmp_path / "caller"
    caller.mkdir()
    command = ["bash", str(script), "--json", "out.json"]
    environment = {**os.environ, "PYTHON": str(python), "BNB_BACKEND": asked}
    done = subprocess.run(command, cwd=caller, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert output.read_text() == f"{caller}: {script.with_suffix('.py')} --backend {backend} --json out.json\n"
    assert kernels.exists() == (backend == "cuda")
    if kernels.exists():
        assert kernels.read_text() == "f32\ndense\n"
    if backend == "triton":
        command = "-m bnb_core conformance --backend triton --primitive {} --case *{}*"
        classes = [(name, dtype) for name in ("api", "gemm_4bit") for dtype in ("float32", "float16", "bfloat16")]
        assert sorted(compiled.read_text().splitlines()) == sorted(command.format(*each) for each in classes)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_says_in_one_line_what_building_needs(tmp_path):
    script = _script_in(tmp_path / "checkout")
    old = tmp_path / "packages" / "setuptools-76.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: setuptools\nVersion: 76.0\n")
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(old.parent)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'setuptools>=77'" in done.stderr

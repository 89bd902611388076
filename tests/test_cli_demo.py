"""`bnb-core demo`: what it writes, what it refuses, and that a seed fixes its results."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from click import ClickException
from click.testing import CliRunner
from rich.console import Console

from bnb_core.cli.commands import bnb_core as group
from bnb_core.cli.demo import data, pipeline, qlora, quantized, training
from bnb_core.cli.demo.command import command
from bnb_core.cli.demo.fresh_process import in_fresh_process
from bnb_core.cli.demo.model import Transformer
from bnb_core.cli.demo.settings import Settings
from bnb_core.cli.errors import BadInput

TINY = Settings(
    steps=3, context=16, batch_size=2, width=64, layers=1, heads=2, evaluation_windows=4, generated_tokens=8
)
TIMINGS = {"tokens_per_second", "seconds", "cpu_seconds", "memory_at_start", "peak_memory"}


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        (folder / f"chapter{index}.txt").write_text(f"The {index}th of many small words. " * 200)
    return folder


def demo(*arguments):
    return CliRunner().invoke(group, ["demo", *map(str, arguments)])


def without_timings(value):
    if isinstance(value, dict):
        return {key: without_timings(item) for key, item in value.items() if key not in TIMINGS}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def test_a_short_run_writes_the_whole_report(tmp_path, text_folder, monkeypatch):
    monkeypatch.setattr(
        "bnb_core.cli.demo.command.Settings", partial(Settings, evaluation_windows=16, generated_tokens=16)
    )
    result = demo("--steps", 5, "--data", text_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "metrics.json",
        "report.md",
        "training-loss.png",
        "fine-tuning-loss.png",
        "perplexity.png",
        "model-f32.safetensors",
        "model-nf4-double-quantized.safetensors",
    }
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["checkpoint_has_same_logits"]
    sizes = {row["method"]: row["share_of_bf16"] for row in metrics["quantized"]}
    assert list(sizes) == [quantized.FLOAT, *quantized.METHODS]
    assert sizes[quantized.FLOAT] == 2.0
    assert sizes[quantized.QLORA_BASE] < sizes["NF4"] < 0.30
    first, second = (run["optimizer_state_bytes"] for run in metrics["fine_tunings"].values())
    assert second <= 0.27 * first


def test_the_same_seed_gives_the_same_results_and_another_gives_others(tmp_path, text_folder):
    text = data.source_code(text_folder)

    def metrics(seed):
        pipeline.run(replace(TINY, seed=seed), text, text, tmp_path)
        return without_timings(json.loads((tmp_path / "metrics.json").read_text()))

    first = metrics(seed=1)
    assert metrics(seed=1) == first
    assert metrics(seed=2)["quantized"] != first["quantized"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--backend", "nonesuch"], "nonesuch"),
        (["--device", "nonesuch"], "nonesuch"),
        (["--backend", ""], "registered are"),
        (["--device", ""], "--device: expected"),
        (["--data", "nonesuch"], "nonesuch"),
        (["--data", ""], "'--data': expected a path, got ''"),
        (["--data", "a" * 300], "--data: cannot read aaa"),
        (["--out", os.devnull + "/folder"], os.devnull),
        (["--out", ""], "'--out': expected a path, got ''"),
        (["--seed", 2**64], "'--seed': 18446744073709551616 is not in the range"),
        (["--seed", -1], "'--seed': -1 is not in the range"),
        (["--steps", 0], "'--steps': 0 is not in the range"),
        (["--steps", 10**30], "'--steps': 1"),
    ],
)
def test_input_that_cannot_work_is_one_line_and_exit_code_2(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = demo(*arguments)
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert named in result.output
    assert not list(tmp_path.iterdir())


def test_a_folder_for_paged_memory_that_does_not_exist_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("BNB_PAGED_DIR", str(tmp_path / "missing"))
    result = demo("--out", tmp_path / "out")
    assert result.exit_code == 2 and result.output.count("\n") == 1 and not list(tmp_path.iterdir())
    assert f"{tmp_path / 'missing'} (No such file or directory" in result.output and "BNB_PAGED_DIR" in result.output


def test_the_largest_seed_is_one_that_torch_takes():
    (seed,) = (option for option in command.params if option.name == "seed")
    torch.Generator().manual_seed(seed.type.max)
    with pytest.raises((RuntimeError, ValueError)):  # which of them depends on torch's version
        torch.Generator().manual_seed(seed.type.max + 1)


def test_the_name_of_a_folder_is_printed_as_it_is(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "[" / "x]"
    folder.mkdir(parents=True)
    (folder / "only.txt").write_text("0123456789" * 1000)
    text = data.source_code(folder)

    def stop(*arguments):
        raise InterruptedError

    monkeypatch.setattr(pipeline, "train_model", stop)
    monkeypatch.setattr(pipeline, "console", Console(width=500))
    with pytest.raises(InterruptedError):
        pipeline.run(TINY, text, text, tmp_path)
    assert f"text files under {folder}: 9,000 bytes" in capsys.readouterr().out


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(bytes(10000))
    result = demo("--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no text" in result.output


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to another process")
def test_interrupting_ends_with_one_line_and_exit_code_130(tmp_path):
    command = [sys.executable, "-u", "-m", "bnb_core", "demo", "--out", str(tmp_path)]
    # A shell's background jobs, and so these tests in one, ignore the signal.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    process.stdout.readline()  # printed when the training starts
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.split() == ["interrupted"]


def test_a_fresh_process_reports_its_steps_and_its_result():
    steps = []
    assert in_fresh_process(processes.double, 21, on_step=steps.append) == 42 and steps == [1.5]


def test_what_the_system_refuses_a_fresh_process_is_raised_here():
    with pytest.raises(OSError, match="no room for state"):
        in_fresh_process(processes.refuse, on_step=print)


def test_a_fresh_process_that_ends_without_a_result_is_an_error_that_names_the_function():
    with pytest.raises(ClickException, match="end failed in its process"):
        in_fresh_process(processes.end, on_step=print)


PARENT = """
import subprocess, sys
from bnb_core.cli.demo.fresh_process import in_fresh_process
import processes

class Announced(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        print(self.pid, flush=True)

if sys.argv[1] == "at its start":
    subprocess.Popen = Announced
in_fresh_process(processes.sleep, on_step=lambda pid: print(pid, flush=True))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's list of processes")
@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("when", ["at its start", "at work"])
def test_the_process_of_a_killed_demo_ends_at_once(when, killed_by):
    """Also while it is still importing what it needs."""
    command = [sys.executable, "-c", PARENT, when]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.send_signal(killed_by)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10  # it sleeps for 60 s
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked how


def test_a_file_is_either_trained_on_or_held_out(text_folder):
    corpus = data.source_code(text_folder)
    assert corpus.files == 4
    assert len(corpus.held_out) * 3 == pytest.approx(len(corpus.train), rel=0.01)
    assert data.source_code(text_folder).held_out.equal(corpus.held_out)


def test_a_single_file_lends_its_last_tenth(tmp_path):
    (tmp_path / "only.txt").write_text("0123456789" * 1000)
    corpus = data.source_code(tmp_path)
    assert (len(corpus.train), len(corpus.held_out)) == (9000, 1000)


def test_documentation_is_text_without_the_code_around_it(monkeypatch, tmp_path):
    source = 'class A:\n    """What A is."""\n    x = 1\n' * 500
    (tmp_path / "module.py").write_text(source)
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = data.documentation()
    assert set(bytes(corpus.train.tolist()).decode().split("\n\n")[:-1]) == {"What A is."}


def test_a_machine_without_library_source_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(BadInput, match="no text"):
        data.documentation()


def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(256, (1, 9))
    cache = {}
    steps = [model(part, cache) for part in (tokens[:, :4], *tokens[:, 4:].split(1, dim=1))]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens))


def test_adapters_change_nothing_until_they_are_trained():
    torch.manual_seed(0)
    model = Transformer(TINY)
    tokens = torch.randint(256, (2, 8))
    before = model(tokens)
    adapters = qlora.attach_adapters(model, TINY)
    assert torch.equal(model(tokens), before)
    assert len(adapters) == 2 * 4
    assert all(parameter.requires_grad for parameter in adapters)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (9, 1.0), (10, 1.0), (100, 0.05)])
def test_learning_rate_rises_then_falls(step, share):
    assert training.learning_rate_share(step, 100) == pytest.approx(share)

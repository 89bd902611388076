"""`accelerate launch` of QLoRA with two processes gives the losses of one, by DDP and by FSDP2, and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from ecosystem import models, replicas

TESTS = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
LAUNCH += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "--use_fsdp", "--fsdp_version=2"]
LAUNCH += ["--fsdp_cpu_ram_efficient_loading=false"]  # Transformers 4 leaves quantized models on meta with it.
# With --cpu, Accelerate starts one process.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(models.CONFIGS["llama"]()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_one_process(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkpoint = tmp_path_factory.mktemp("one") / "checkpoint"
    return replicas.trained(Accelerator(cpu=True), str(llama), "uint8", str(checkpoint))


@pytest.fixture(scope="module")
def of_two_processes(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    results = tmp_path_factory.mktemp("two") / "results.json"
    result = subprocess.run(
        [*LAUNCH, str(Path(replicas.__file__)), str(llama), str(results)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize(
    ("name", "kind", "parts"),
    [("ddp", "MULTI_CPU", 1), ("fsdp2, uint8", "FSDP", 1), ("fsdp2, float32", "FSDP", 2)],
)
def test_two_processes_train_as_one_and_resume(
    name: str, kind: str, parts: int, of_one_process: dict[str, Any], of_two_processes: dict[str, dict[str, Any]]
):
    """Accelerate leaves 4-bit weights whole on each process unless their storage is one of floats."""
    one, two = of_one_process, of_two_processes[name]
    assert two["type"] == kind
    assert two["held"] * parts == one["held"]
    assert two["state"] == one["state"] == ["torch.float32", "torch.uint8"]
    for key in ("losses", "after"):
        assert two[key] == pytest.approx(one[key], abs=2e-3, rel=0)
    assert two["resumed"] == two["after"]

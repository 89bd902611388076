"""DeepSpeed's ZeRO, stages 2 and 3, on adapters over a 4-bit base: two processes give the losses of one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
)
FOLDER = Path(__file__).parent


def train_by_zero(results: str, stage: str) -> None:
    """What each process runs; rank 0 writes the losses and the dtypes of states."""
    import deepspeed
    import torch
    from quantized import adapted_model
    from training import optimizer_for

    deepspeed.init_distributed("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = adapted_model("4bit")
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 8 // ranks,
        "zero_optimization": {"stage": int(stage)},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = optimizer_for("AdamW8bit", trained, lr=1e-2, min_8bit_size=256)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(6):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
        loss = (engine(x) - x.roll(1, -1)).square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item() / ranks)
    if rank == 0:
        dtypes = sorted({str(state["state1"].dtype) for state in wrapped.optimizer.state.values()})
        Path(results).write_text(json.dumps([losses, dtypes]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stage", ["2", "3"])
def test_losses_under_zero_are_those_of_one_process(stage: str, tmp_path: Path):
    from quantized import adapted_model
    from training import optimizer_for, train

    model = adapted_model("4bit")
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = train(model, optimizer_for("AdamW8bit", trained, lr=1e-2, min_8bit_size=256), steps=6)
    results = tmp_path / "results.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launch, __file__, str(results), stage],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert result.returncode == 0, result.stderr
    losses, dtypes = json.loads(results.read_text())
    assert losses == pytest.approx(expected, abs=2e-3, rel=0)
    assert dtypes == ["torch.uint8"]


if __name__ == "__main__":
    train_by_zero(*sys.argv[1:])

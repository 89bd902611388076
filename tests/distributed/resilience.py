"""A long run of several ranks, killed in the middle of a checkpoint and resumed on another number of them.

``python tests/distributed/resilience.py --ranks 8 --resume-ranks 4 --steps 200`` prints both loss curves' ends and how
far the resumed one is from the undisturbed one; it fails where they part. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from quantized import adapted_model
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from training import optimizer_for, train

ROWS = 24
SLOW_WRITE = 0.2
"""Seconds that a rank waits before it writes its part of a checkpoint, so that a kill falls in the middle."""


class SlowWriter(dcp.FileSystemWriter):
    def write_data(self, *arguments: Any) -> Any:
        Path(self.path, "begun").touch()
        time.sleep(SLOW_WRITE * (1 + torch.distributed.get_rank()))
        return super().write_data(*arguments)


def complete(folder: Path) -> list[int]:
    """The steps of the checkpoints that were written to their end: their metadata come last."""
    return sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))


def run_rank(rank: int, ranks: int, folder: str, steps: int, every: int, resume: bool, store: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model = adapted_model("4bit", layers=2)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = optimizer_for("AdamW8bit", [p for p in model.parameters() if p.requires_grad], min_8bit_size=256)
    checkpoints, first = Path(folder) / "checkpoints", 0
    if resume:
        first = complete(checkpoints)[-1]
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=str(checkpoints / str(first)))
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for step in range(first, steps):
        loss = train(model, optimizer, steps=1, first=step, rows=ROWS)[0]
        if rank == 0:
            with (Path(folder) / "losses.jsonl").open("a") as file:
                file.write(json.dumps([step, loss]) + "\n")
        if every and (step + 1) % every == 0:
            state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
            dcp.save(state, storage_writer=SlowWriter(str(checkpoints / str(step + 1))))
    torch.distributed.destroy_process_group()


def started(ranks: int, folder: Path, steps: int, every: int, resume: bool) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    store = str(folder / f"store-{time.monotonic_ns()}")
    arguments = (ranks, str(folder), steps, every, resume, store)
    processes = [context.Process(target=run_rank, args=(rank, *arguments), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[Any]) -> None:
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"a rank ended with {process.exitcode}")


def killed_in_a_checkpoint(ranks: int, folder: Path, steps: int, every: int, at: int, seed: int) -> int:
    """Run until the checkpoint of step ``at`` has begun, then kill -9 a random rank and end the others.

    Returns:
        the rank.
    """
    processes = started(ranks, folder, steps, every, resume=False)
    victim = random.Random(seed).randrange(ranks)
    begun = folder / "checkpoints" / str(at) / "begun"
    while not begun.exists():
        if not any(process.is_alive() for process in processes):
            raise RuntimeError("the run ended before its checkpoint")
        time.sleep(0.01)
    os.kill(processes[victim].pid, signal.SIGKILL)
    time.sleep(SLOW_WRITE)
    for process in processes:
        process.kill()
        process.join()
    return victim


def losses_of(folder: Path) -> dict[int, float]:
    """The last loss of each step: steps after the checkpoint are taken again."""
    return dict(json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines())


def experiment(folder: Path, ranks: int, resume_ranks: int, steps: int, every: int, seed: int = 0) -> dict[str, Any]:
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    for each in (undisturbed, disturbed):
        each.mkdir()
    finish(started(ranks, undisturbed, steps, 0, resume=False))
    at = steps // 2 // every * every
    victim = killed_in_a_checkpoint(ranks, disturbed, steps, every, at, seed)
    kept = complete(disturbed / "checkpoints")
    finish(started(resume_ranks, disturbed, steps, 0, resume=True))
    expected, found = losses_of(undisturbed), losses_of(disturbed)
    return {
        "killed rank": victim,
        "checkpoint that was being written": at,
        "checkpoint that was loaded": kept[-1],
        "steps": [len(expected), len(found)],
        "first and last loss, undisturbed": [expected[0], expected[steps - 1]],
        "last loss, resumed": found[steps - 1],
        "largest difference": max(abs(expected[step] - found[step]) for step in expected),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--resume-ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--bound", type=float, default=2e-3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        result = experiment(folder, arguments.ranks, arguments.resume_ranks, arguments.steps, arguments.every)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    return int(result["largest difference"] > arguments.bound)


if __name__ == "__main__":
    sys.exit(main())

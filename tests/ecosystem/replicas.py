"""What each process of test_accelerate_replicas.py runs: adapters on a 4-bit base, prepared by Accelerate."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator
from torch import nn

import bnb_core
from bnb_core.nn import LinearNF4

WIDTH, STEPS = 64, 6


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = LinearNF4(WIDTH, WIDTH).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Linear(8, WIDTH, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)


def losses(accelerator: Accelerator) -> list[float]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Adapted(), nn.GELU(), Adapted()).to("cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb_core.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=256)
    model, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for step in range(STEPS):
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        x = x.chunk(accelerator.num_processes)[accelerator.process_index]
        loss = (model(x) - x.roll(1, -1)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(accelerator.reduce(loss.detach(), "mean").item())
    return found


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    result = {"type": accelerator.distributed_type.value, "losses": losses(accelerator)}
    if accelerator.is_main_process:
        with open(sys.argv[1], "w") as file:
            json.dump(result, file)
    accelerator.end_training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

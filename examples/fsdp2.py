"""QLoRA over several processes: FSDP2 shards 4-bit layers, and any number of processes resumes from a checkpoint.

``torchrun --nproc-per-node 4 examples/fsdp2.py --checkpoint run`` trains; started again, with as many processes or
another number, it goes on where it was. On GPUs each process takes one; without, gloo runs it on the CPU.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import bnb_core as bnb

WIDTH, LAYERS, RANK = 256, 4, 8


class Adapted(nn.Module):
    """A frozen 4-bit layer with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = bnb.nn.LinearNF4(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.base(x) + self.up(self.down(x)))


def shard(model: nn.Module) -> None:
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)


def sharded_model(device: torch.device) -> nn.Module:
    """Rank 0 has the weights, here made by itself; the others start with none."""
    with torch.device("meta"):
        model = nn.Sequential(*(Adapted() for _ in range(LAYERS)))
    state_dict = None
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        state_dict = nn.Sequential(*(Adapted() for _ in range(LAYERS))).to("cpu").state_dict()
    bnb.nn.load_from_rank_0(model, state_dict, shard, device)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, required=True, help="A folder; another run goes on from there.")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)

    model = sharded_model(device)
    optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3, min_8bit_size=1024)
    first = 0
    if (arguments.checkpoint / ".metadata").exists():
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer, "step": 0}
        dcp.load(state, checkpoint_id=str(arguments.checkpoint))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        first = state["step"]
    generator = torch.Generator().manual_seed(first)
    for step in range(first, first + arguments.steps):
        x = torch.randn(32, WIDTH, generator=generator).chunk(dist.get_world_size())[dist.get_rank()].to(device)
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer, "step": first + arguments.steps}
    dcp.save(state, checkpoint_id=str(arguments.checkpoint))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

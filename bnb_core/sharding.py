"""DTensors, of which a process holds a part: what optimizers and layers ask of them.

torch.distributed.tensor is never imported for a tensor that is none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sharded_type() -> Any:
    """DTensor, for isinstance; the empty tuple as long as nobody has loaded it, and no tensor can be one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def is_sharded(tensor: object) -> bool:
    return isinstance(tensor, sharded_type())


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor, in the same memory; the tensor itself where nothing is sharded."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def part_of(values: Any, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """What this process is to hold of a tensor: of a DTensor, or of a plain one that is the same on each process."""
    from torch.distributed.tensor import DTensor, Replicate

    if is_sharded(values):
        if tuple(values.placements) == tuple(placements) and values.device_mesh == mesh:
            return values.to_local()
        values = values.full_tensor()
    replicated = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=placements).to_local()


def sum_over_shards(values: Tensor, tensor: Any) -> Tensor:
    """Add up, in place, what each process has found in its part of a DTensor."""
    for dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            torch.distributed.all_reduce(values, group=tensor.device_mesh.get_group(dim))
    return values

"""Parameters that are DTensors, as FSDP2 and tensor parallelism have them: each process steps its own shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnb_core.checks import F32_MAX
from bnb_core.primitive import Primitive
from bnb_core.records import OptimizerStep, map_tensors
from bnb_core.sharding import is_sharded, local_part, sum_over_shards

_DECOUPLED = ("adam", "lamb", "ademamix", "lion")
"""Rules whose weight decay is multiplied by the learning rate, not by the bound of the update."""


def local_gradient(p: Any) -> Tensor:
    """The gradient of :func:`local_part`, summed up over processes where that is due."""
    if not is_sharded(p):
        return p.grad
    grad = p.grad.detach()
    if grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    return grad.to_local()


def check_sharded(p: Any) -> None:
    """Check a parameter that has a gradient, if one of the two is a DTensor.

    Raises:
        ValueError: only one of the two is, or the parameter is a sum over processes, none of which has its values.
    """
    if is_sharded(p) != is_sharded(p.grad):
        raise ValueError(
            f"grad: expected a {type(p.data).__name__}, as its parameter is one, got a {type(p.grad).__name__}"
        )
    if is_sharded(p) and any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"params: expected DTensors with placements Shard or Replicate, got {p.placements}")


def with_bound(update: Primitive, step: OptimizerStep, p: Any, record: Any, unorm_vec: Tensor) -> OptimizerStep:
    """The step of a shard whose update is bounded by ``max_unorm`` and the norms of the whole parameter.

    The kernels take norms of what they are given. So a trial step on copies, with a learning rate of 0, finds the norm
    of this shard's update; that of all is summed up over the processes and goes into the learning rate.

    Args:
        update: what updates the parameter; record: its state.
        unorm_vec: f32[1], receives the norm of the whole update.
    """
    part = local_part(p)
    trial, state = map_tensors(Tensor.clone, (part, record))
    update(step._replace(lr=0.0), local_gradient(p), trial, state, unorm_vec)
    finite = part.float().nan_to_num(0.0, 0.0, 0.0)
    norms = torch.stack([torch.linalg.vector_norm(finite, dtype=torch.float64), unorm_vec[0].double()])
    of_parameter, of_update = sum_over_shards(norms.square(), p).sqrt().tolist()
    unorm_vec.fill_(of_update)
    bound = 1.0 if of_update == 0 else min(1.0, step.max_unorm * of_parameter / of_update)
    weight_decay = step.weight_decay
    if step.optimizer_name in _DECOUPLED and bound > 0:
        weight_decay = min(weight_decay / bound, F32_MAX)
    return step._replace(lr=step.lr * bound, weight_decay=weight_decay, max_unorm=0.0)

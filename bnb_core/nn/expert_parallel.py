"""Whole experts on each process, to which tokens are sent and from which their results come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bnb_core.nn.experts import GroupedLinear4bit, RoutedExperts
from bnb_core.nn.offload import OffloadedLinear4bit
from bnb_core.nn.quantized_weight import not_quantized


class ExpertRanks(NamedTuple):
    """The processes of a mesh, each with as many experts, in the order of their ranks."""

    mesh: Any

    def of_rows(self, rows: Tensor, offsets: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What their experts make of this process's rows; each process calls it, also one without rows.

        Args:
            rows: [T, K], those of expert 0 first.
            offsets: i32[experts + 1], ascending from 0 to T.
            compute: what this process's experts make of rows, by offsets of theirs.

        Returns:
            [T, N], differentiable in the rows.
        """
        from torch.distributed.nn.functional import all_to_all_single

        group, ranks = self.mesh.get_group(), self.mesh.size()
        sent = offsets.diff().view(ranks, -1)
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        to_each, from_each = sent.sum(dim=1).tolist(), received.sum(dim=1).tolist()
        arrived = rows.new_empty(sum(from_each), rows.shape[1])
        arrived = all_to_all_single(arrived, rows.contiguous(), from_each, to_each, group)
        own = sent.shape[1]
        experts = torch.arange(own, device=rows.device).repeat(ranks).repeat_interleave(received.view(-1))
        order = experts.argsort(stable=True)
        own_offsets = nn.functional.pad(received.sum(dim=0).cumsum(dim=0), (1, 0)).to(torch.int32)
        computed = compute(arrived[order], own_offsets)
        to_return = torch.empty_like(computed).index_copy(0, order, computed)
        returned = rows.new_empty(rows.shape[0], computed.shape[1], dtype=computed.dtype)
        return all_to_all_single(returned, to_return, to_each, from_each, group)


def parallelize_experts(module: nn.Module, mesh: Any) -> nn.Module:
    """Leave each process its part of the quantized experts of a module, whole ones, in place.

    From then on a forward sends each token to the processes of its experts and their results back (all_to_all), and a
    backward the gradients. Each process routes tokens of its own, and calls every forward and backward, with any number
    of tokens, also none. Process r of R has experts r * E / R to (r + 1) * E / R: as ``weight`` a DTensor of their
    codes, with f32 scales, as ``bias`` one of theirs, and ``groups`` of a projection counts them. Gradients of biases,
    and of adapters that are made for these groups, are sums over the tokens of all processes: what averages gradients
    over this mesh, such as DDP, must leave them out. A router is on each process, and the caller's to reduce.

    ``state_dict()`` has all experts, and is called on all processes; load before.

    Args:
        module: one with :class:`~bnb_core.nn.Experts4bit` or with routed experts as
            :func:`bnb_core.quantize_model` makes them, or such experts themselves; quantized, the same on each process.
        mesh: a DeviceMesh of one dimension, which may be one of several: ``mesh["experts"]``.

    Returns:
        The module.

    Raises:
        ValueError: no such experts, their number is no multiple of the processes', another mesh, or experts that have
            adapters, are in files or are cut already; no module has changed then.
        RuntimeError: experts that are not quantized yet.
    """
    if mesh.ndim != 1:
        raise ValueError(f'mesh: expected one dimension, got {mesh.ndim}; give one of them, such as mesh["experts"]')
    found = {name: part for name, part in module.named_modules() if isinstance(part, RoutedExperts)}
    if not found:
        raise ValueError("module: expected quantized experts that tokens are routed to, such as Experts4bit, got none")
    projections = [layer for name, experts in found.items() for layer in _projections(name, experts, mesh.size())]
    for layer in projections:
        layer.cut_groups(mesh)
    for experts in found.values():
        experts.ranks = ExpertRanks(mesh)
    return module


def _projections(name: str, experts: RoutedExperts, ranks: int) -> list[GroupedLinear4bit]:
    """Those of a module that can be cut."""
    named = f"module: {name}" if name else "module"
    if experts.ranks is not None:
        raise ValueError(f"{named}: its experts are on several processes already; expected whole ones")
    if experts.num_experts % ranks:
        raise ValueError(
            f"{named}: {experts.num_experts} experts over {ranks} processes: expected a multiple of {ranks}; use a "
            "number of processes that divides them, or fully_shard, which cuts within experts"
        )
    holders = [experts, *(child for child in experts.children() if isinstance(child, nn.ModuleDict))]
    direct = [child for holder in holders for child in holder.children() if isinstance(child, GroupedLinear4bit)]
    every = [part for part in experts.modules() if isinstance(part, (GroupedLinear4bit, OffloadedLinear4bit))]
    if not direct or len(direct) != len(every):
        kinds = sorted({type(child).__name__ for child in experts.children()})
        raise ValueError(
            f"{named}: expected projections GroupedLinear4bit, got {', '.join(kinds)}; add adapters afterwards, and "
            "leave experts in memory"
        )
    for layer in direct:
        if layer.weight.quant_state is None:
            raise RuntimeError(not_quantized(layer.weight))
    return direct

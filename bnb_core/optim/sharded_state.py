"""The saved state of parameters that are DTensors: DTensors, too, sharded as the parameter is.

The live state is plain tensors in the shape of the process's shard, and 8-bit blocks are counted from the shard's first
element, in row-major order. A saved state knows no shards, so that torch.distributed.checkpoint can cut it for another
number of processes: codes stand in the parameter's shape, and beside each run of a row's elements is its scale
(:func:`_run_length`). Loaded, a block of one scale has the bits it had; one that was put together of several blocks is
dequantized and quantized once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnb_core.checkpoint_entries import described
from bnb_core.optim.per_element import joined_blocks
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, OPTIMIZERS, block_count
from bnb_core.sharding import is_sharded, local_part, part_of

LONGEST_RUN = 64
"""It divides the block, and what tensor parallelism leaves of most rows; scales take a 16th of the bytes of codes."""


def saved_in_runs(state: Mapping[str, Any], optimizer_name: str, p: Any) -> dict[str, Any]:
    """The live state of a DTensor as it is saved, flat."""
    result = dict(state.items())
    part, run = local_part(p), _run_length(p)
    for number, stack in _states(optimizer_name):
        state_key, scales_key = f"state{number}", f"absmax{number}"
        if state_key not in state:
            continue
        result[state_key] = _sharded(state[state_key].detach(), (*stack, *p.shape), p)
        if scales_key in state:
            scales = _spread(state[scales_key].detach(), stack, part, run)
            result[scales_key] = _sharded(scales, (*stack, *_shape_in_runs(p.shape, run)), p)
    return result


def in_local_blocks(name: str, state: Mapping[str, Any], optimizer_name: str, p: Any) -> dict[str, Any]:
    """The part of a saved state that this process holds, in blocks: what undoes :func:`saved_in_runs`.

    A state of plain tensors, whose blocks may be those of one process, is cut. One that is neither is returned as it
    is, for checks to say what is wrong with it.

    Args:
        name: what errors call the state.

    Raises:
        ValueError: an entry whose shape is not that of the whole parameter's.
    """
    result = dict(state)
    part = local_part(p)
    for number, stack in _states(optimizer_name):
        state_key, scales_key, code_key = f"state{number}", f"absmax{number}", f"qmap{number}"
        values, scales, code = (state.get(key) for key in (state_key, scales_key, code_key))
        if not isinstance(values, Tensor):
            continue
        whole = (*stack, *p.shape)
        if tuple(values.shape) != whole:
            raise ValueError(f"{name}[{state_key!r}]: expected shape {whole}, got {described(values)}")
        result[state_key] = _part_of(values, p)
        if not isinstance(scales, Tensor) or not isinstance(code, Tensor) or code.shape != (256,):
            continue
        run = _saved_run(scales, stack, p)
        if run is None and tuple(scales.shape) == (*stack, block_count(p.numel(), OPTIMIZER_BLOCKSIZE)):
            run = _run_length(p)
            scales = _spread(scales, stack, p, run)
        if run is None or values.dtype != torch.uint8 or scales.dtype != torch.float32:
            raise ValueError(f"{name}[{scales_key!r}]: expected scales of {whole}, got {described(scales)}")
        finest = math.gcd(run, _run_length(p))
        scales = _part_of(scales.repeat_interleave(run // finest, dim=-1), p).reshape(*stack, -1)
        codes = result[state_key].reshape(*stack, -1)
        divides = number == 2 or OPTIMIZERS[optimizer_name].divides_by_state1
        rows = zip(*(tensor.reshape(max(1, *stack, 1), -1) for tensor in (codes, scales)), strict=True)
        joined = [
            joined_blocks(row, of_row.repeat_interleave(finest), code.to(row.device), divides) for row, of_row in rows
        ]
        result[state_key] = torch.stack([row for row, _ in joined]).view(*stack, *part.shape)
        result[scales_key] = torch.stack([absmax for _, absmax in joined]).view(*stack, -1)
    return result


def is_in_runs(state: Mapping[str, Any], optimizer_name: str, p: Tensor) -> bool:
    """Whether a saved state has scales by runs, as only that of sharded parameters has."""
    stack = _states(optimizer_name)[0][1]
    scales = state.get("absmax1")
    blocks = (*stack, block_count(p.numel(), OPTIMIZER_BLOCKSIZE))
    return (
        isinstance(scales, Tensor)
        and tuple(scales.shape) != blocks
        and _saved_run(scales, stack, p) is not None
        and isinstance(state.get("state1"), Tensor)
        and state["state1"].dtype == torch.uint8
    )


def _states(optimizer_name: str) -> list[tuple[int, tuple[int, ...]]]:
    """The number of each state and what stands before the parameter's shape in its own."""
    traits = OPTIMIZERS[optimizer_name]
    return [(number, (2,) if traits.stacked and number == 1 else ()) for number in range(1, traits.states + 1)]


def _run_length(p: Any) -> int:
    """Elements that share a scale in a saved state: those of a row that no border of blocks or of shards separates.

    It depends on the shape alone, not on the number of processes, but where they cut rows elsewhere than at such runs:
    there each element has a scale.
    """
    run = _longest_run(p)
    if is_sharded(p):
        length = p.shape[-1] if p.dim() else 1
        for placement, processes in zip(p.placements, p.device_mesh.shape, strict=True):
            if placement.is_shard(p.dim() - 1):
                length = -(-length // processes)
                if length % run:
                    return 1
    return run


def _longest_run(p: Tensor) -> int:
    return math.gcd(p.shape[-1], LONGEST_RUN) if p.dim() > 1 else 1


def _saved_run(scales: Tensor, stack: tuple[int, ...], p: Tensor) -> int | None:
    """The run length that scales were saved with; None if they are not in runs."""
    for run in (_longest_run(p), 1):
        if tuple(scales.shape) == (*stack, *_shape_in_runs(p.shape, run)):
            return run
    return None


def _shape_in_runs(shape: tuple[int, ...], run: int) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // run) if shape else ()


def _spread(absmax: Tensor, stack: tuple[int, ...], part: Tensor, run: int) -> Tensor:
    """The scale of each run, from those of blocks."""
    spread = absmax.repeat_interleave(OPTIMIZER_BLOCKSIZE // run, dim=-1)[..., : part.numel() // run]
    return spread.reshape(*stack, *_shape_in_runs(part.shape, run))


def _placements(p: Any, stacked: int) -> list[Any]:
    """Those of the parameter, for a tensor that has ``stacked`` dimensions before its own."""

    def moved(placement: Any) -> Any:
        if not stacked or not hasattr(placement, "dim"):
            return placement
        split = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
        return type(placement)(placement.dim + stacked, **split)

    return [moved(placement) for placement in p.placements]


def _sharded(values: Tensor, shape: tuple[int, ...], p: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    placements = _placements(p, len(shape) - p.dim())
    return DTensor.from_local(
        values, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _part_of(values: Any, p: Any) -> Tensor:
    """What this process holds of a tensor that is sharded like ``p``, or yet to be."""
    if not is_sharded(p):
        return values.full_tensor() if is_sharded(values) else values
    return part_of(values, p.device_mesh, _placements(p, values.dim() - p.dim()))

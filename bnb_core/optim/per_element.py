"""Optimizer state in the form that torch's FSDP1 can gather and cut again: each tensor has its parameter's shape.

FSDP1 joins and cuts f32 state by the parameter's elements, wants the same entries of all that it joins, and takes of
anything else only what is equal on every rank. So codes are f32, too, the scale of its block stands beside each of
them (and -1 beside an element of 32-bit state), rows that are stacked are entries of their own, and the codebook is the
standard one. A block whose elements come from one block again has the same bits; one that was put together of several
is quantized anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bnb_core import functional
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, OPTIMIZERS

Codebook = Callable[[str, torch.device], Tensor]
"""That of a state, by its name, on a device."""
_UNSCALED = -1.0
_COPIES = (
    "expected entries that differ, got copies of one, as torch's FSDP1 gathers of original parameters on a CPU if it "
    "offloads to the CPU; save by FSDP.optim_state_dict with FullOptimStateDictConfig(offload_to_cpu=False)"
)


def per_element(state: Mapping[str, Any], optimizer_name: str, p: Tensor, with_scales: bool) -> dict[str, Any]:
    """The state of a parameter, in this form; the norm of its last update, which no step reads, is left out.

    Args:
        with_scales: whether other parameters of the optimizer may have 8-bit state.
    """
    result = {"step": state["step"]}
    for key, names in _names(optimizer_name).items():
        if key not in state:
            continue
        rows = state[key].detach().float().reshape(len(names), p.numel())
        result |= {name: row.view(p.shape) for name, row in zip(names, rows, strict=True)}
        if with_scales:
            absmax = state.get(f"absmax{key[-1]}")
            if absmax is None:
                scales = torch.full_like(rows, _UNSCALED)
            else:
                spread = absmax.detach().view(len(names), -1).repeat_interleave(OPTIMIZER_BLOCKSIZE, dim=1)
                scales = spread[:, : p.numel()]
            result |= {_scales_of(name): row.view(p.shape) for name, row in zip(names, scales, strict=True)}
    return result


def expected_per_element(
    state: Mapping[str, Any], optimizer_name: str, p: Tensor
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
    """Dtype and shape of each tensor of a state in this form; None for one in the usual form."""
    names = [name for rows in _names(optimizer_name).values() for name in rows]
    first = state.get(names[0])
    # In the usual form only codes, which are u8, have scales.
    has_scales = isinstance(first, Tensor) and first.dtype == torch.float32 and _scales_of(names[0]) in state
    if not has_scales and not (OPTIMIZERS[optimizer_name].stacked and names[0] in state):
        return None
    keys = [*names, *map(_scales_of, names)] if has_scales else names
    return dict.fromkeys(keys, (torch.float32, tuple(p.shape)))


def check_gathered(name: str, state: Mapping[str, Any]) -> None:
    """Check the state of a parameter that FSDP1 manages for what torch does to it on CPUs.

    Args:
        name: what errors call the state.

    Raises:
        ValueError: all of its tensors are the same, and not zero.
    """
    first, *others = [value for value in state.values() if isinstance(value, Tensor)] or [torch.zeros(0)]
    if others and bool(first.any()) and all(torch.equal(first, other) for other in others):
        raise ValueError(f"{name}: {_COPIES}")


def in_blocks(state: Mapping[str, Any], optimizer_name: str, p: Tensor, codebook: Codebook) -> dict[str, Any]:
    """Undo :func:`per_element`: 8-bit state where any element has a scale.

    Raises:
        ValueError: a code that is no whole number from 0 to 255.
    """
    result: dict[str, Any] = {"step": state["step"]}
    for key, names in _names(optimizer_name).items():
        rows = torch.stack([state[name].reshape(-1) for name in names])
        shape = p.shape if names == [key] else (len(names), *p.shape)
        scales = [state[_scales_of(name)].reshape(-1) for name in names if _scales_of(name) in state]
        if any(bool((s != _UNSCALED).any()) for s in scales):
            qmap = codebook(key, rows.device)
            divides = key == "state2" or OPTIMIZERS[optimizer_name].divides_by_state1
            joined = [joined_blocks(codes, s, qmap, divides) for codes, s in zip(rows, scales, strict=True)]
            rows, absmax = (torch.stack(parts) for parts in zip(*joined, strict=True))
            result[f"qmap{key[-1]}"] = qmap
            result[f"absmax{key[-1]}"] = absmax if len(names) > 1 else absmax[0]
        result[key] = rows.view(shape)
    return result


def joined_blocks(codes: Tensor, scales: Tensor, qmap: Tensor, divides: bool) -> tuple[Tensor, Tensor]:
    """Of one row: its codes u8[n] in blocks of one scale each, and those scales f32[blocks].

    An element with a scale of zero is zero: FSDP1 fills up a shard with such. A block whose elements come from several
    is dequantized and quantized.

    Args:
        codes: u8[n], or f32[n] that hold codes beside scales and values elsewhere.
        scales: f32[n], of each element.
        divides: whether updates are divided by this state, so that what is positive stays so (docs/SPEC.md section 5).

    Raises:
        ValueError: a code that is no whole number from 0 to 255.
    """
    unscaled = scales == _UNSCALED
    if not bool((unscaled | ((codes >= 0) & (codes <= 255) & (codes == codes.floor()))).all()):
        raise ValueError("state: expected codes, whole numbers from 0 to 255, beside scales")
    q = torch.where(unscaled, 0, codes).to(torch.uint8)
    values = torch.where(unscaled, codes, qmap[q.long()] * scales)
    q, scales, values = (_blocks_of(tensor) for tensor in (q, scales, values))
    absmax = scales.amax(dim=1)
    zero = qmap.abs().argmin().to(torch.uint8)
    q = torch.where((scales == 0) & (absmax != 0)[:, None], zero, q)
    mixed = ((scales != absmax[:, None]) & (scales != 0)).any(dim=1) | (absmax == _UNSCALED)
    if bool(mixed.any()):
        of_mixed = values[mixed]
        requantized, state = functional.quantize_blockwise(of_mixed, code=qmap, blocksize=OPTIMIZER_BLOCKSIZE)
        if divides:
            requantized = torch.where((of_mixed > 0) & (requantized == zero), zero + 1, requantized)
        q[mixed], absmax[mixed] = requantized, state.absmax
    return q.view(-1)[: codes.numel()], absmax


def _blocks_of(row: Tensor) -> Tensor:
    return pad(row, (0, -row.numel() % OPTIMIZER_BLOCKSIZE)).view(-1, OPTIMIZER_BLOCKSIZE)


def _names(optimizer_name: str) -> dict[str, list[str]]:
    """The entries that each state becomes: one, or one for each of its stacked rows."""
    traits = OPTIMIZERS[optimizer_name]
    keys = [f"state{number}" for number in range(1, traits.states + 1)]
    return {key: [f"{key}_0", f"{key}_1"] if traits.stacked and key == "state1" else [key] for key in keys}


def _scales_of(name: str) -> str:
    return name.replace("state", "absmax")

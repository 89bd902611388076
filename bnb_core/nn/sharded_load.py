"""Loading a model that one process reads and all have a part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.nn.quantized_weight import QuantizedWeightMixin
from bnb_core.sharding import is_sharded, local_part, part_of


def load_from_rank_0(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None,
    shard: Callable[[nn.Module], Any] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a model from a state dict that rank 0 has, without the whole of it anywhere else.

    Rank 0 sends one tensor after the other, and each process keeps its part, so that a mapping that reads a file entry
    by entry needs no more memory than the largest one. Scales of quantized weights stay whole on each process.

    Args:
        model: made in the same way on each rank, quantized layers included; on meta, or sharded already. It takes the
            place of ``set_model_state_dict`` with ``broadcast_from_rank0``, which sends no scales.
        state_dict: on rank 0; None on the others.
        shard: called with the model on meta, to shard it; :func:`torch.distributed.fsdp.fully_shard` of each layer,
            say. It is called when quantized weights have the shape of their codes. None for a model that is sharded.
        device: where the parts of a model on meta go.

    Raises:
        ValueError, RuntimeError: what ``load_state_dict`` would raise, on every rank.
    """
    rank_0 = torch.distributed.get_rank() == 0
    shapes = _of_rank_0({key: (value.shape, value.dtype) for key, value in state_dict.items()} if state_dict else None)
    parts = {key for name, module in model.named_modules() for key in _part_keys(name, module, shapes)}
    small = _of_rank_0({key: state_dict[key].cpu() for key in parts} if rank_0 and state_dict is not None else None)
    if shard is not None:
        on_meta = {
            key: small[key] if key in parts else torch.empty(shape, dtype=dtype, device="meta")
            for key, (shape, dtype) in shapes.items()
        }
        model.load_state_dict(on_meta, assign=True)
        shard(model)
        model.to_empty(device=device)
    # Asked for its keys, FSDP2 shards again what a forward has gathered.
    own_keys = list(model.state_dict()) if shard is None else []
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    own_parts: dict[str, tuple[Any, dict[str, Tensor]]] = {
        name: (module, {key: small[key] for key in _part_keys(name, module, small)})
        for name, module in model.named_modules()
    }
    if shard is None:
        own = {key: tensors[key] for key in own_keys if key in tensors}
        _check_sharded(own, {key: value for key, value in shapes.items() if key not in parts}, own_parts)
    setters = [
        module._part_setter(f"{name}." if name else "", module.weight, own)
        for name, (module, own) in own_parts.items()
        if own
    ]
    for key in shapes:
        if key not in parts:
            _fill(tensors[key], state_dict[key] if rank_0 and state_dict is not None else None, shapes[key])
    for set_parts in setters:
        set_parts()


def _check_sharded(
    tensors: Mapping[str, Tensor],
    given: Mapping[str, tuple[torch.Size, torch.dtype]],
    own_parts: Mapping[str, tuple[nn.Module, Mapping[str, Tensor]]],
) -> None:
    """Whether these tensors of a sharded model can take what is given, with the scales of each quantized module."""
    missing = [key for key in tensors if key not in given]
    unexpected = [key for key in given if key not in tensors]
    if missing or unexpected:
        lists = f"missing keys: {', '.join(missing) or 'none'}; unexpected keys: {', '.join(unexpected) or 'none'}"
        raise ValueError(f"state_dict: {lists}")
    for key, (shape, dtype) in given.items():
        own = tensors[key]
        if (own.shape, own.dtype) != (shape, dtype):
            expected = f"{own.dtype} of shape {tuple(own.shape)}"
            raise ValueError(f"{key}: expected {expected}, got {dtype} of shape {tuple(shape)}")
    for name, (module, of_module) in own_parts.items():
        key = f"{name}.weight" if name else "weight"
        if getattr(module, "_cut", None) is not None:
            raise ValueError(f"{key}: this layer has been cut over processes; load the state dict before that")
        if isinstance(module, QuantizedWeightMixin) and module._has_parts() and not of_module:
            raise ValueError(f"{key}: has codes without their scales; give the entries of both")


def _part_keys(name: str, module: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    prefix = f"{name}." if name else ""
    return module._part_keys(prefix, state_dict) if isinstance(module, QuantizedWeightMixin) else []


def _of_rank_0(value: Any) -> Any:
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


@torch.no_grad()
def _fill(target: Tensor, value: Tensor | None, shape_and_dtype: tuple[torch.Size, torch.dtype]) -> None:
    """Bytes throughout: a copy of floats may change the NaNs among codes."""
    part = local_part(target)
    device = target.device
    if value is None:
        shape, dtype = shape_and_dtype
        value = torch.empty(shape, dtype=dtype, device=device)
    sent = value.detach().to(device).contiguous().reshape(-1).view(torch.uint8)
    torch.distributed.broadcast(sent, src=0)
    whole: Any = sent.view(target.dtype).view(target.shape)
    own: Any = target
    if is_sharded(target):
        whole = part_of(whole, own.device_mesh, own.placements)
    part.reshape(-1).view(torch.uint8).copy_(whole.contiguous().reshape(-1).view(torch.uint8))

"""A capturable optimizer's step as torch.compile sees it: a call of an operator for each parameter.

What depends on the host's values alone is computed while it is compiled, by :func:`init_group`, which the compiler does
not look into: the checks, the making of states, the settings. They are constants of what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.optim.sharded import check_sharded, local_gradient
from bnb_core.primitive import Primitive
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep
from bnb_core.sharding import is_sharded, local_part


@torch.no_grad()
def compiled_step(optimizer: Any, closure: Callable[[], Any] | None) -> Any:
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for gindex, group in enumerate(optimizer.param_groups):
        places = tuple([place for place, p in enumerate(group["params"]) if p.grad is not None])
        params: list[Tensor] = []
        tensors: list[Tensor] = []
        constants: list[Any] = []
        settings: list[Any] = []
        version = optimizer._init_group(gindex, places, params, tensors, constants, settings)
        # Nothing can have changed yet, but what is compared here, the compiler looks at in later calls.
        changed = [name for name, value in settings if group[name] != value]
        if changed or optimizer.mng.version != version:
            raise RuntimeError("a setting changed while the step was compiled; compile the step again after a change")
        for p, (names, step, shares_lr) in zip(params, constants, strict=True):
            state = dict(zip(names, tensors, strict=False))
            tensors = tensors[len(names) :]
            lr = group["lr"] if shares_lr else state.pop("lr", None)
            _update(OptimizerStep(*step), p, state, lr)
    return loss


def init_group(
    optimizer: Any,
    gindex: int,
    places: tuple[int, ...],
    params: list[Tensor],
    tensors: list[Tensor],
    constants: list[Any],
    settings: list[Any],
) -> int:
    """Check a group of parameters, and make the state of those in these places.

    Args:
        params: receives the parameters.
        tensors: receives all tensors of their states, one after the other, and a learning rate that is not the group's.
        constants: receives for each parameter their names and an OptimizerStep without tensors, as tuples, and whether
            it has its group's learning rate.
        settings: receives names and values of the group's settings, those that are no tensors.

    Returns:
        the version of the overrides that hold.
    """
    group = optimizer.param_groups[gindex]
    optimizer.check_overrides()
    optimizer.check_group(group)
    settings.extend((name, value) for name, value in group.items() if name != "params" and not _is_tensor(value))
    indices = [(group, group["params"][place], gindex, place) for place in places]
    for _, p, _, _ in indices:
        if is_sharded(p):
            check_sharded(p)
    optimizer.check_bounds(indices)
    optimizer.prepare(indices)
    for _, p, _, place in indices:
        config, state = optimizer.get_config(gindex, place, group), optimizer.state[p]
        optimizer.make_room(p, state, config)
        found = {name: value for name, value in state.items() if _is_tensor(value)}
        shares_lr = config["lr"] is group["lr"]
        if not shares_lr and _is_tensor(config["lr"]):
            found["lr"] = config["lr"]
        params.append(p)
        tensors.extend(found.values())
        step = optimizer.settings_of(config, 1, p.device)._replace(lr_tensor=None)
        constants.append((tuple(found), tuple(step), shares_lr))
    return optimizer.mng.version


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _update(step: OptimizerStep, p: Tensor, state: dict[str, Any], lr: float | Tensor | None) -> None:
    """Step a parameter; ``step`` has no tensors yet."""
    # Something must read the result: torch's compiler drops other methods, even those that work in place.
    count = state["step"].add_(1.0)
    if isinstance(lr, Tensor):
        step = step._replace(lr_tensor=lr.detach().to(p.device, torch.float64))
    grad, p = (local_gradient(p), local_part(p)) if is_sharded(p) else (p.grad, p)
    if "state1" not in state:  # as in _update_stateless, each step is the first
        count = count.clamp(max=1.0)
        state["state1"] = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    update, record = primitive_and_record(state)
    update(step._replace(step_tensor=count), grad, p, record, state.get("unorm_vec"))


def primitive_and_record(state: Mapping[str, Any]) -> tuple[Primitive, OptimizerState8bit | OptimizerState32bit]:
    """What updates a parameter with this state, and the state as it is taken; lists of tensors for several."""
    state1, state2 = state["state1"], state.get("state2")
    if "qmap1" not in state:
        return primitives.optimizer_update_32bit, OptimizerState32bit(state1, state2)
    qmaps, absmaxes = (state["qmap1"], state.get("qmap2")), (state["absmax1"], state.get("absmax2"))
    return primitives.optimizer_update_8bit_blockwise, OptimizerState8bit(state1, state2, *qmaps, *absmaxes)

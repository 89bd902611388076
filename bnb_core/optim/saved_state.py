"""Saving and loading the state of an optimizer, and pickling it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnb_core.optim.checkpoint import STATE_KEYS, ParameterState, checked_groups, checked_state, flat, grouped
from bnb_core.optim.flat_parameters import is_flattened
from bnb_core.optim.per_element import check_gathered, expected_per_element, in_blocks, per_element
from bnb_core.optim.sharded_state import in_local_blocks, is_in_runs, saved_in_runs
from bnb_core.optim.state_buffers import StateBuffers
from bnb_core.sharding import is_sharded, local_part


class SavedState(StateBuffers):
    """The part of an optimizer that its state dict goes through."""

    optimizer_name: str
    args: Any
    capturable: bool
    _overrides: dict[int, dict[str, Any]]

    def check_group(self, group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def check_overrides(self) -> None:
        raise NotImplementedError

    def counted(self, step: int, p: Tensor) -> int | Tensor:
        raise NotImplementedError

    def _forget_preparation(self) -> None:
        raise NotImplementedError

    @staticmethod
    def _unprepared() -> dict[str, Any]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As for every torch optimizer, the quantized tensors of a parameter grouped under one key.

        They stand in a dict under ``"__bnb_optimizer_quant_state__"``. The state of DTensors, as FSDP2 has them, is
        DTensors (:mod:`bnb_core.optim.sharded_state`). The state of parameters that FSDP1 manages has the parameter's
        shape in every tensor instead, with a scale per element, so that FSDP1 can gather and cut it. The count of a
        parameter's steps is an int, with ``capturable``, too, which waits for the device.

        Raises:
            ValueError: FSDP1 manages a parameter whose state has codebooks of its own.
        """
        state_dict = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        state_dict["state"] = {key: self._saved(params[key], state) for key, state in state_dict["state"].items()}
        return state_dict

    def _saved(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(state.get("step"), Tensor):
            state = {**dict(state.items()), "step": int(state["step"].item())}
        if is_sharded(p):
            return grouped(saved_in_runs(state, self.optimizer_name, p))
        if not is_flattened(p) or not state:
            return grouped(state)
        for key in STATE_KEYS:
            qmap = state.get(f"qmap{key[-1]}")
            if qmap is not None and not torch.equal(qmap, self._qmap(key, qmap.device)):
                raise ValueError(f"qmap{key[-1]}: FSDP1 can save state in the standard codebook only")
        settings = [vars(self.args), *self.param_groups, *self._overrides.values()]
        with_scales = any(config.get("optim_bits") == 8 for config in settings)
        return per_element(state, self.optimizer_name, p, with_scales)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Resume from :meth:`state_dict`, or from that of bitsandbytes, grouped or flat.

        Everything is checked first: after an error the optimizer is what it was. The state keeps the form it was saved
        in, 8-bit or 32-bit, and shares no memory with ``state_dict``. State of DTensors is read for any placements, and
        plain tensors, the same in each process, are cut for them.

        Args:
            move_to_device: bring the state to the parameters' devices now; otherwise the next step does.

        Raises:
            ValueError: a missing, unknown or malformed entry; the message names its key.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        for key, kind in (("param_groups", list), ("state", Mapping)):
            if not isinstance(state_dict.get(key), kind):
                raise ValueError(f"{key}: expected a {kind.__name__.lower()}, got {type(state_dict.get(key)).__name__}")
        groups = checked_groups(state_dict["param_groups"], self.param_groups, self.defaults)
        for group in groups:
            self.check_group(group)
        copied = self._copied if move_to_device else _cloned
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(ParameterState)
        for p, saved in self._checked_states(state_dict, groups).items():
            tensors = {k: copied(p, k, value) for k, value in saved.items() if isinstance(value, Tensor)}
            state[p] = ParameterState({**saved, **tensors, "step": self.counted(saved["step"], p)})
        # In one go, so that an interrupt finds the optimizer before or after.
        self.__dict__.update(state=state, param_groups=groups, **self._unprepared())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_states(
        self, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
    ) -> dict[Tensor, dict[str, Any]]:
        """The saved state by our parameter, which stands in its group where the saved one stood in its."""
        owners = {
            saved: (p, group)
            for saved_group, group in zip(state_dict["param_groups"], groups, strict=True)
            for saved, p in zip(saved_group["params"], group["params"], strict=True)
        }
        self.check_overrides()
        states = {}
        for index, saved in state_dict["state"].items():
            if index not in owners:
                raise ValueError(
                    f"state[{index!r}]: no parameter group has this parameter"
                    "; expected the state of the parameters in param_groups"
                )
            p, group = owners[index]
            stateless = not self.keeps_state({**group, **self._overrides.get(id(p), {})})
            name, part = f"state[{index!r}]", local_part(p)
            saved = flat(name, saved)
            if is_sharded(p) or is_in_runs(saved, self.optimizer_name, p):
                saved = in_local_blocks(name, saved, self.optimizer_name, p)
            state = checked_state(name, saved, self.optimizer_name, part, stateless)
            if is_flattened(p):
                check_gathered(name, state)
            if expected_per_element(state, self.optimizer_name, part) is not None:
                state = in_blocks(state, self.optimizer_name, part, self._qmap)
            if state:
                states[p] = state
        return states

    def keeps_state(self, config: Mapping[str, Any]) -> bool:
        """Whether the rule needs a state under these settings."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("optimizer_name", "args", "is_paged", "capturable")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_preparation()
        for values in self.state.values():
            # A copied tensor is in ordinary memory, whatever its attributes say; detaching drops those.
            values.update({key: values[key].detach() for key in STATE_KEYS if key in values})


def _cloned(p: Tensor, key: str, value: Tensor) -> Tensor:
    return value.detach().clone()

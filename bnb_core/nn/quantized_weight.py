"""What modules with a quantized weight share: they are read from a state dict as a whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.checkpoint_entries import checked_entry, dense_entry, described
from bnb_core.checks import FLOAT_DTYPES
from bnb_core.nn.quantized_parameter import DetachedCodes, QuantizedParameter, in_any_mode
from bnb_core.sharding import is_sharded, local_part, part_of

NOT_QUANTIZED = "the weight is not quantized yet: move the layer to a device, such as .to('cpu')"


def not_quantized(weight: Tensor) -> str:
    """Why a layer cannot compute with this weight, and what helps."""
    if isinstance(weight, QuantizedParameter):
        return NOT_QUANTIZED
    return (
        f"the weight is a plain {type(weight).__name__} of {weight.dtype}, shape {tuple(weight.shape)}, such as one "
        "tied to another layer's: tie layers after they are quantized, or leave this one unquantized"
    )


def weight_and_bias(layer: nn.Module) -> tuple[Any, Any]:
    """A layer's two parameters, or what is in their places, without nn.Module's search for attributes in Python."""
    parameters = layer._parameters
    if "weight" in parameters and "bias" in parameters:
        # Not by get: DeepSpeed's ZeRO-3 fetches what is asked for so.
        return parameters["weight"], parameters["bias"]
    return layer.weight, layer.bias


class CheckpointError(ValueError, RuntimeError):
    """A state dict that a module cannot be loaded from; torch's own ``load_state_dict`` raises RuntimeError for one."""


class QuantizedWeightMixin(nn.Module):
    """A module whose ``weight`` is quantized: a state dict holds it as codes with their parts, or as values."""

    weight: Any
    _only_checks: bool = False
    """Whether this is a copy of a module that is loaded to find what is malformed (nn/checked_load.py)."""

    def _weight_shape(self) -> tuple[int, ...]:
        """Of the weight's values."""
        raise NotImplementedError

    def _part_keys(self, prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
        """The keys of a state dict that belong to the weight, beside its own."""
        raise NotImplementedError

    def _holds_codes(self, weight: Tensor, part_keys: list[str]) -> bool:
        """Whether the weight of a state dict is given by codes rather than by values."""
        raise NotImplementedError

    def _weight_of_codes(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> nn.Parameter:
        """A weight from codes; ValueError names the key of what does not fit."""
        raise NotImplementedError

    def _weight_of_values(self, values: Tensor) -> nn.Parameter:
        """A weight that is yet to be quantized, otherwise like the present one."""
        raise NotImplementedError

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _set_weight(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch does; a DTensor in the place of codes is the wish of ``parallelize_module`` to cut the weight so."""
        if name == "weight" and is_sharded(param) and isinstance(self._parameters.get(name), QuantizedParameter):
            param = self._cut_weight(param)
        super().register_parameter(name, param)

    def _cut_weight(self, wished: Any) -> nn.Parameter:
        """This process's part of the weight, as a DTensor; the layer keeps the scales that belong to it."""
        raise ValueError(
            f"weight: {type(self).__name__} cannot be cut by parallelize_module, leave it out of the plan; Linear4bit "
            "and Linear8bitLt with has_fp16_weights=False can"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As torch does, for a weight of a class of its own, which torch neither makes nor swaps.

        The parameter stays the same object, but onto and off meta, or where torch is told to overwrite parameters. One
        that was made in inference mode is replaced when it is quantized, to serve training later.
        """
        weight = self._parameters.get("weight")
        if not isinstance(weight, QuantizedParameter):
            return super()._apply(fn, recurse)
        of_inference = weight.is_inference()
        gradient = None if weight.grad is None else fn(weight.grad)
        moved = fn(weight)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters["weight"] = weight
        if moved.is_meta != weight.is_meta or torch.__future__.get_overwrite_module_params_on_conversion():
            self._set_weight(moved if isinstance(moved, type(weight)) else weight._like(moved))
        elif of_inference and not moved.is_inference():
            self._set_weight(in_any_mode(weight._like)(moved.data))
        elif moved is not weight:
            weight.data = moved.data
        self.weight.grad = gradient
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if isinstance(weight, DetachedCodes):
            destination[f"{prefix}weight"] = weight.plain()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Read the weight and check everything, then change the module.

        Raises:
            CheckpointError: an entry of this module is malformed, named by its key; the module is as it was.
        """
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            if is_sharded(self.weight):
                set_weight, handled = self._read_into_shards(prefix, state_dict, assign)
            else:
                set_weight, handled = self._read_weight(prefix, state_dict, assign)
            rest = {key: value for key, value in state_dict.items() if key not in handled}
            for name, tensor in self._parameters.items():
                if tensor is not None and name != "weight" and prefix + name in rest:
                    on_meta = assign or tensor.is_meta
                    checked_entry(prefix + name, rest[prefix + name], FLOAT_DTYPES, tuple(tensor.shape), on_meta)
        except ValueError as error:
            raise CheckpointError(*error.args) from error
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in handled]
        if set_weight is not None and not self._only_checks:
            set_weight()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch does; but a strict load that lacks a key, or has one too many, is refused before anything changes.

        Raises:
            CheckpointError: as above, or an entry is malformed.
        """
        # A hook may give the keys other names.
        if strict and isinstance(state_dict, Mapping) and not self._load_state_dict_pre_hooks:
            own = {name for name, value in (*self._parameters.items(), *self._buffers.items()) if value is not None}
            own -= self._non_persistent_buffers_set
            known = {*own, *self._part_keys("", state_dict), "_extra_state"}
            missing = [name for name in own if name not in state_dict]
            unexpected = [key for key in state_dict if key not in known and key.partition(".")[0] not in self._modules]
            if missing or unexpected:
                raise CheckpointError(
                    f"{type(self).__name__}: missing keys: {', '.join(missing) or 'none'}; "
                    f"unexpected keys: {', '.join(map(str, unexpected)) or 'none'}"
                )
        return super().load_state_dict(state_dict, strict, assign)

    def _read_weight(
        self, prefix: str, state_dict: Mapping[str, Any], assign: bool
    ) -> tuple[Callable[[], None] | None, set[str]]:
        """What sets the weight, and the keys that it stands for; None and no keys where torch may copy the values."""
        key, part_keys = f"{prefix}weight", self._part_keys(prefix, state_dict)
        if key not in state_dict:
            if part_keys:
                raise ValueError(
                    f"{key}: missing, though the state dict has {part_keys[0]}; expected the codes beside their parts"
                )
            return None, set()
        value = dense_entry(key, state_dict[key], on_meta=assign or self.weight.is_meta)
        if self._holds_codes(value, part_keys):
            parts = {part_key: dense_entry(part_key, state_dict[part_key]) for part_key in part_keys}
            return partial(self._set_weight, self._weight_of_codes(prefix, value, parts)), {key, *part_keys}
        checked_entry(key, value, FLOAT_DTYPES, self._weight_shape(), on_meta=True)
        if self._is_quantized():
            moved = self._weight_of_values(value.clone()).to(self._device_for(value))
            return partial(self._set_weight, moved), {key}  # type: ignore[arg-type]
        return (partial(self._set_weight, self._weight_of_values(value)), {key}) if assign else (None, set())

    def _read_into_shards(
        self, prefix: str, state_dict: Mapping[str, Any], assign: bool
    ) -> tuple[Callable[[], None] | None, set[str]]:
        """The same for a weight that is a DTensor: its codes are cut as they are, its scales are on each process."""
        key, part_keys = f"{prefix}weight", self._part_keys(prefix, state_dict)
        own, value = self.weight, state_dict.get(key)
        if not self._has_parts() or (value is None and not part_keys):
            return None, set()
        if getattr(self, "_cut", None) is not None:
            raise ValueError(f"{key}: this layer has been cut over processes; load the state dict before that")
        if not isinstance(value, Tensor) or value.dtype != own.dtype or value.shape != own.shape:
            given = "nothing" if value is None else described(value)
            raise ValueError(f"{key}: expected codes {own.dtype} of shape {tuple(own.shape)} to shard, got {given}")
        if not part_keys:
            raise ValueError(
                f"{key}: has codes without their scales, such as set_model_state_dict sends with broadcast_from_rank0; "
                "call bnb_core.nn.load_from_rank_0(model, state_dict), which takes None on other ranks, or load on each"
            )
        set_parts = self._part_setter(prefix, value, {name: dense_entry(name, state_dict[name]) for name in part_keys})

        def copy() -> None:
            if not assign:
                part = part_of(value.detach(), own.device_mesh, own.placements)
                local_part(own).view(torch.uint8).copy_(part.contiguous().view(torch.uint8))
            set_parts()

        return copy, set(part_keys) if assign else {key, *part_keys}

    def _has_parts(self) -> bool:
        """Whether a weight that has been sharded is one of codes."""
        raise NotImplementedError

    def _part_setter(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Callable[[], None]:
        """What sets the scales that belong to sharded codes; ValueError names the key of what does not fit."""
        raise NotImplementedError

    def _device_for(self, value: Tensor) -> torch.device:
        return value.device if self.weight.is_meta else self.weight.device

"""Settings that apply to single parameters, such as 32-bit state for an embedding."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bnb_core.optim.hyperparameters import HYPERPARAMETERS, check_hyperparameters


@dataclass
class _Override:
    """``owner`` is the parameter, or with ``param_name`` the module that has it under that name."""

    owner: weakref.ref[Any]
    param_name: str | None
    config: dict[str, Any] = field(default_factory=dict)

    def parameter(self) -> Tensor | None:
        owner = self.owner()
        return owner if owner is None or self.param_name is None else getattr(owner, self.param_name, None)


class GlobalOptimManager:
    """The overrides of every optimizer in the process; there is one, from :meth:`get_instance`.

    An override belongs to a parameter (by identity) or to a module's parameter of a given name (whichever tensor that
    is when the optimizer steps, so the module may be moved or quantized meanwhile). It holds from the next step on,
    whether it was made before or after the optimizer; what a state is kept in is decided when the state is first
    made. Where two override the same key the later one wins. Nothing is kept alive by an override.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: there is one in a process, call GlobalOptimManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every override."""
        self._overrides: dict[tuple[int, str | None], _Override] = {}
        self.version = getattr(self, "version", 0) + 1

    @property
    def module_weight_config_triple(self) -> list[tuple[nn.Module, str, dict[str, Any]]]:
        """Module, name of its parameter and settings of each override by a module that is alive, the latest last.

        Transformers' tests read it.
        """
        named = (
            (o.owner(), o.param_name, dict(o.config)) for o in self._overrides.values() if o.param_name is not None
        )
        return [(module, name, config) for module, name, config in named if module is not None]

    def register_parameters(self, params: Iterable[Tensor] | Iterable[Mapping[str, Any]]) -> None:
        """Announce parameters or parameter groups. Overrides hold with or without it.

        Raises:
            TypeError: something else than tensors or groups with a "params" entry.
        """
        for entry in params:
            members = entry["params"] if isinstance(entry, Mapping) else entry
            for param in [members] if isinstance(members, Tensor) else members:
                _check_parameter("params", param)

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """Override settings for parameters, one by ``key`` and ``value`` or several by ``key_value_dict``.

        Raises:
            TypeError: ``parameters`` holds something else than tensors.
            ValueError: neither ``key`` nor ``key_value_dict``, or a key that cannot be overridden.
        """
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        config = dict(key_value_dict or {})
        if key is not None:
            config[key] = value
        _check_config("key" if key_value_dict is None else "key_value_dict", config)
        for parameter in parameters:
            _check_parameter("parameters", parameter)
        for parameter in parameters:
            self._register(parameter, None, config)

    def register_module_override(self, module: nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """Override settings for the parameter that ``module`` has under ``param_name`` when an optimizer steps.

        Raises:
            ValueError: the module has no such attribute, or a key cannot be overridden.
        """
        if not hasattr(module, param_name):
            raise ValueError(
                f"param_name: {type(module).__name__} has no parameter {param_name!r}"
                f", expected one of {', '.join(name for name, _ in module.named_parameters()) or 'none'}"
            )
        _check_config("config", config)
        self._register(module, param_name, config)

    def _register(self, owner: Any, param_name: str | None, config: Mapping[str, Any]) -> None:
        key = (id(owner), param_name)
        # Taken out and put in again, so that the latest registration is the last one.
        override = self._overrides.pop(key, None)
        if override is None or override.owner() is not owner:
            override = _Override(weakref.ref(owner), param_name)
        override.config.update(config)
        self._overrides[key] = override
        self.version += 1

    def resolve(self) -> dict[int, dict[str, Any]]:
        """The settings of every overridden parameter alive, by its ``id``."""
        configs: dict[int, dict[str, Any]] = {}
        for key, override in list(self._overrides.items()):
            parameter = override.parameter()
            if parameter is not None:
                configs.setdefault(id(parameter), {}).update(override.config)
            elif override.owner() is None:
                del self._overrides[key]
        return configs


def _check_parameter(name: str, parameter: object) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name}: expected tensors, got {type(parameter).__name__}")


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    if not config:
        raise ValueError(f"{name}: expected at least one setting, got none")
    unknown = [key for key in config if key not in HYPERPARAMETERS]
    if unknown:
        raise ValueError(f"{name}: cannot override {', '.join(unknown)}; accepted are {', '.join(HYPERPARAMETERS)}")
    check_hyperparameters(config)

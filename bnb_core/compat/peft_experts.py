"""LoRA of PEFT on experts in 4 bits: ``target_modules=["gate_up_proj", "down_proj"]``. Imports PEFT.

``target_parameters``, which names the experts of a model of full precision, means the same ones here, where they are
layers.
"""

from __future__ import annotations

import copy
import math
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from bnb_core.autograd.grouped_low_rank import grouped_low_rank
from bnb_core.nn.experts import GroupedLinear4bit

_LoraLayer: Any = import_module("peft.tuners.lora.layer").LoraLayer
_LoraModule: Any = type("_LoraModule", (nn.Module, _LoraLayer), {})
_tuners: Any = import_module("peft.tuners.tuners_utils")


def teach(module: ModuleType) -> None:
    """Have PEFT's choice of a layer for 4 bits, which it looks up when it makes one, choose the one below.

    And have ``target_parameters`` find it.
    """
    choose: Any = vars(module).get("dispatch_bnb_4bit")
    if choose is None or hasattr(choose, "__wrapped__"):
        return
    inject = getattr(_tuners.BaseTuner, "_inject_parameters", None)  # PEFT before 0.17 has none
    if inject is not None:
        _tuners.BaseTuner._inject_parameters = _with_experts(inject)

    @wraps(choose)
    def choose_with_experts(target: Any, adapter_name: str, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(base, GroupedLinear4bit) and kwargs.get("parameter_name") is None:
            return GroupedLora(target, adapter_name, **kwargs)
        return choose(target, adapter_name, **kwargs)

    vars(module)["dispatch_bnb_4bit"] = choose_with_experts


def _with_experts(inject: Any) -> Any:
    @wraps(inject)
    def inject_with_experts(
        tuner: Any, peft_config: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> list[str]:
        wanted = sorted(peft_config.target_parameters)
        layers = {name: [n for n in _grouped_layers(model) if _means(name, n)] for name in wanted}
        found = [layer for each in layers.values() for layer in each]
        for layer in found:
            parent, _, own_name = layer.rpartition(".")
            owner = model.get_submodule(parent)
            target = getattr(owner, own_name)
            tuner._create_and_replace(peft_config, adapter_name, target, own_name, owner, current_key=layer)
        others = [name for name, each in layers.items() if not each]
        if not others:
            return found
        rest = copy.copy(peft_config)
        rest.target_parameters = others
        return [*found, *inject(tuner, rest, model, adapter_name, *args, **kwargs)]

    return inject_with_experts


def _grouped_layers(model: nn.Module) -> list[str]:
    """The names of all layers of experts, with and without an adapter."""
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, GroupedLora)
        or (isinstance(module, GroupedLinear4bit) and not name.endswith(".base_layer"))
    ]


def _means(target: str, layer: str) -> bool:
    """Whether PEFT's rule for names of parameters, the end or the whole, has the target mean the layer's weight."""
    target = target.removesuffix(".weight")
    return layer == target or layer.endswith(f".{target}")


class GroupedLora(_LoraModule):
    """An adapter for each expert, in the layout that PEFT has for fused experts.

    ``lora_A`` is [experts * r, in], expert by expert; ``lora_B`` is [out, r * experts], an expert's rows being every
    so-many-th. A forward adds ``scaling * (x @ A[e]^T) @ B[e]^T``, and no weight of an expert is dequantized for the
    backward.

    Raises:
        ValueError: an option of LoraConfig that this layer does not have.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        _LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if r <= 0:
            raise ValueError(f"r: expected a positive int, got {r}")
        for option in ("use_dora", "lora_bias", "fan_in_fan_out"):
            if getattr(config, option, False):
                raise ValueError(
                    f"{option}: experts in 4 bits do not have it"
                    "; leave it out, or leave the experts out of target_modules"
                )
        if config.init_lora_weights not in (True, False, "gaussian"):
            given = config.init_lora_weights
            raise ValueError(f"init_lora_weights: expected True, False or 'gaussian' for experts, got {given!r}")
        groups = self.get_base_layer().groups
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout.update(nn.ModuleDict({adapter_name: dropout}))
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * groups, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * groups, self.out_features, bias=False)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """[experts, r, in] and [experts, out, r]."""
        groups, r = self.get_base_layer().groups, self.r[adapter]
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return A.view(groups, r, -1), B.view(-1, r, groups).permute(2, 0, 1)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, offsets)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                A, B = self._factors(adapter)
                rows = self.lora_dropout[adapter](self._cast_input_dtype(x, A.dtype))
                result = result + (self.scaling[adapter] * grouped_low_rank(rows, A, B, offsets)).to(result.dtype)
        return result

    def _change(self, adapter: str, sign: float) -> None:
        layer = self.get_base_layer()
        A, B = self._factors(adapter)

        def of_expert(e: int) -> Tensor:
            change = sign * self.scaling[adapter] * (B[e].float() @ A[e].float())
            return change.t() if layer.transposed else change

        layer.add_(of_expert)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into the weights, which are quantized anew, one expert's at a time."""
        for adapter in _tuners.check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                if safe_merge and not all(bool(factor.isfinite().all()) for factor in self._factors(adapter)):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken; "
                        "expected finite factors"
                    )
                self._change(adapter, 1.0)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Out of the weights again, to a quantization."""
        while self.merged_adapters:
            self._change(self.merged_adapters.pop(), -1.0)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weights of all experts, in their shape."""
        A, B = self._factors(adapter)
        change = self.scaling[adapter] * (B @ A)
        return change.transpose(1, 2) if self.get_base_layer().transposed else change

"""Transformers' 4-bit quantizer, taught fused experts: from_pretrained quantizes them as it does linear layers.

Transformers replaces linear layers only. What is added here are further steps of its own class, so that checkpoints
with one tensor for each expert are merged by its own converters first, one layer's at a time. Its modules are imported
by nothing here: they are changed once they are imported by others, and only while ``bitsandbytes`` is bnb_core.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from bnb_core.nn.embedding import Embedding4bit
from bnb_core.nn.experts import GroupedLinear4bit
from bnb_core.nn.fused_experts import dense_experts, quantized_experts
from bnb_core.nn.params4bit import Params4bit

MODULE = "transformers.quantizers.quantizer_bnb_4bit"
_QUANTIZER = "Bnb4BitHfQuantizer"


def teach(module: ModuleType) -> None:
    """Add the steps below to the quantizer's; that of Transformers 4, whose experts are linear layers, stays."""
    quantizer = getattr(module, _QUANTIZER, None)
    if quantizer is None or not hasattr(quantizer, "update_weight_conversions") or hasattr(quantizer, "_knows_experts"):
        return
    quantizer._knows_experts = True
    for name, step in _STEPS.items():
        setattr(quantizer, name, _extended(getattr(quantizer, name), step))


def _extended(method: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return step(self, method, *args, **kwargs)

    return call


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that Transformers knows nothing of."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (GroupedLinear4bit, Embedding4bit)))


def _preprocess(self: Any, method: Any, model: Any, *args: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
    self._has_fused_experts = any(re.search(r"experts\.\w+\.weight\.", key) for key in _keys(checkpoint_files))
    return method(self, model, *args, checkpoint_files=checkpoint_files, **kwargs)


def _keys(files: Sequence[str] | None) -> Iterator[str]:
    from safetensors import safe_open

    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                yield from opened.keys()


def _convert_modules(self: Any, method: Any, model: Any) -> None:
    """Transformers expects Llama 4's experts as linear layers in quantized checkpoints; those saved here are fused."""
    if not self._has_fused_experts:
        method(self, model)


def _replace_experts(self: Any, method: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    method(self, model, *args, **kwargs)
    should_convert_module = import_module("transformers.quantizers.quantizers_utils").should_convert_module

    config = self.quantization_config
    for name, module in list(model.named_modules()):
        if not name or not should_convert_module(name, self.modules_to_not_convert):
            continue
        experts = quantized_experts(
            module,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        if experts is not None:
            model.set_submodule(name, experts.requires_grad_(False))


def _needs_quantization(self: Any, method: Any, model: Any, param_name: str, **kwargs: Any) -> bool:
    path, _, name = param_name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, (GroupedLinear4bit, Embedding4bit)):
        return name == "weight"
    return bool(method(self, model, param_name, **kwargs))


def _quantize_operation(self: Any, method: Any) -> Any:
    return _Quantize(self, method(self))


class _Quantize:
    """Quantizes what arrives: weights of the layers here itself, others by Transformers' own operation."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: Any, of_others: Any = None) -> None:
        self.hf_quantizer, self.of_others = hf_quantizer, of_others

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for name, value in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, (GroupedLinear4bit, Embedding4bit)):
                converted[name] = _quantized(layer, _one(value))
            else:
                converted |= self.of_others.convert({name: value}, model=model, **kwargs)
        return converted


def _one(value: Tensor | list[Tensor]) -> Tensor:
    return value[0] if isinstance(value, list) else value


def _quantized(layer: Any, values: Tensor) -> Params4bit:
    """ValueError, as Transformers reports it, for a weight of another size."""
    shape = layer._weight_shape()
    if values.shape[0] > shape[0] and values.shape[1:] == shape[1:]:
        values = values[: shape[0]]  # LongCat's last experts have weights that nothing reads
    layer._is_hf_initialized = True
    attributes = {**layer.weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": layer}
    return Params4bit(values.reshape(shape), **attributes).to(values.device)  # type: ignore[return-value]


class _ToExperts:
    """The last operation of a converter that makes a parameter of experts.

    Transformers quantizes what it brings, but in checkpoints of quantized models: there it is done here. The real
    bitsandbytes leaves experts as they are in those.
    """

    supports_many_to_many = True

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer if hf_quantizer.pre_quantized else None

    def convert(
        self,
        input_dict: dict[str, Any],
        target_patterns: Sequence[str] = (),
        full_layer_name: str = "",
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        values = dict(input_dict)
        if len(values) == 1:
            values = {target_patterns[0]: _one(next(iter(values.values())))}
        if self.hf_quantizer is None or not full_layer_name.endswith(".weight"):
            return values
        prefix = next(full_layer_name.partition(ending)[0] for ending in values if ending in full_layer_name)
        layers = {ending: model.get_submodule((prefix + ending).rpartition(".")[0]) for ending in values}
        return {ending: _quantized(layers[ending], _one(value)) for ending, value in values.items()}


def _new_names(model: Any) -> dict[str, str]:
    """What were parameters of modules are those of layers in them: ``gate_up_proj.weight``, ``gate_up_proj.bias``."""
    names = {}
    for name, layer in _layers(model):
        if type(layer) is GroupedLinear4bit:
            names[name] = f"{name}.weight"
            if layer.bias is not None:
                names[f"{name}_bias"] = f"{name}.bias"
    return names


def _update_conversions(self: Any, method: Any, weight_conversions: list[Any], model: Any) -> list[Any]:
    """The converters that make parameters of experts, under their new names, and one for each that none makes."""
    names = _new_names(model)
    if names:
        weight_conversions = [_to_new_name(self, conversion, names) for conversion in weight_conversions]
        weight_conversions += _of_fused(self, names)
    return list(method(self, weight_conversions, model))


def _to_new_name(quantizer: Any, conversion: Any, names: dict[str, str]) -> Any:
    if not hasattr(conversion, "operations"):
        return conversion
    targets = [_renamed(target, names) for target in conversion._original_target_patterns]
    if None in targets:
        return conversion
    # A source that is the parameter's own name must not match the new one.
    sources = [
        source if source.endswith(".weight") else f"{source}$" for source in conversion._original_source_patterns
    ]
    return conversion.copy(sources, targets, operations=[*conversion.operations, _ToExperts(quantizer)])


def _renamed(target: str, names: dict[str, str]) -> str | None:
    """The new ending for a converter's target, if that is the ending of a parameter with a new name."""
    ending = re.compile(re.escape(target.removeprefix("^")).replace(r"\\1", ".*") + "$")
    new = next((new for old, new in names.items() if ending.search(old)), None)
    if new is None:
        return None
    return f"{target}.weight" if new.endswith(".weight") else f"{target.removesuffix('_bias')}.bias"


def _of_fused(quantizer: Any, names: dict[str, str]) -> list[Any]:
    """A converter for each ending of two names, such as experts.gate_up_proj."""
    converter = import_module("transformers.core_model_loading").WeightConverter
    endings = {".".join(old.split(".")[-2:]): ".".join(new.split(".")[-3:]) for old, new in names.items()}
    return [converter([f"{old}$"], [new], [_ToExperts(quantizer)]) for old, new in endings.items()]


def _after_loading(self: Any, method: Any, model: Any, **kwargs: Any) -> Any:
    """A quantized model is saved as it is: what merged experts, or made quantized weights, is not to be reversed."""
    for _, layer in _layers(model):
        weight = layer.weight
        if isinstance(weight, Params4bit):
            weight.module, layer.quant_state = layer, weight.quant_state
    model._weight_conversions = [c for c in model._weight_conversions if not _makes_quantized(c)]
    return method(self, model, **kwargs)


def _makes_quantized(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", ())
    return any(isinstance(op, _ToExperts) or getattr(op, "hf_quantizer", None) for op in operations)


def _dequantize(self: Any, method: Any, model: Any, dtype: Any = None) -> Any:
    for name, module in list(model.named_modules()):
        experts = dense_experts(module, dtype)
        if experts is not None:
            model.set_submodule(name, experts)
    return method(self, model, dtype=dtype)


_STEPS: dict[str, Callable[..., Any]] = {
    "preprocess_model": _preprocess,
    "_convert_model_for_quantization": _convert_modules,
    "_process_model_before_weight_loading": _replace_experts,
    "param_needs_quantization": _needs_quantization,
    "get_quantize_ops": _quantize_operation,
    "update_weight_conversions": _update_conversions,
    "_process_model_after_weight_loading": _after_loading,
    "_dequantize": _dequantize,
}
"""By the name of the method that each of them calls, and adds to."""

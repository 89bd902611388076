"""The ways the demo quantizes a model, and what the quantized weights really occupy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn

import bnb_core as bnb

from .settings import Settings

NOT_QUANTIZED = ("lm_head",)
FLOAT = "f32"
QLORA_BASE = "NF4, double quant"

MakeLinear = Callable[..., nn.Module]

METHODS: dict[str, MakeLinear] = {
    "LLM.int8()": partial(bnb.nn.Linear8bitLt, has_fp16_weights=False, threshold=6.0),
    "NF4": partial(bnb.nn.Linear4bit, quant_type="nf4", compress_statistics=False),
    QLORA_BASE: partial(bnb.nn.Linear4bit, quant_type="nf4", compress_statistics=True),
    "FP4": partial(bnb.nn.Linear4bit, quant_type="fp4", compress_statistics=False),
}
"""Name to what makes a layer from `(in_features, out_features, bias)`."""


def quantize(model: nn.Module, method: str, settings: Settings) -> nn.Module:
    """A quantized copy of `model`; the layers quantize their weights when they are moved to the device."""
    model = copy.deepcopy(model)
    bnb.utils.replace_linear(model, METHODS[method], skip_modules=NOT_QUANTIZED, copy_weights=True)
    return model.to(settings.device).eval()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are, or would be, quantized, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in NOT_QUANTIZED
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights of the linear layers occupy, scales and code tables included.

    A tensor that several layers share counts once.
    """
    tensors = (tensor for layer in linear_layers(model).values() for tensor in weight_tensors(layer))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def bf16_weight_bytes(model: nn.Module) -> int:
    """Bytes of the float weights of the same layers once converted to bfloat16."""
    return sum(layer.weight.bfloat16().nbytes for layer in linear_layers(model).values())


def weight_tensors(layer: nn.Linear) -> Iterator[Tensor]:
    """Every tensor that holds a part of the weight; scales are attributes of it or of the layer's state."""
    yield layer.weight.data
    yield from tensors_in(layer.weight)
    yield from tensors_in(getattr(layer, "state", None))


def tensors_in(owner: object) -> Iterator[Tensor]:
    """The tensors among an object's attributes, those of its quantization state included."""
    for value in getattr(owner, "__dict__", {}).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, bnb.functional.QuantState):
            yield from tensors_in(value)

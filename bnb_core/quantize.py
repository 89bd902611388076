"""Quantize a whole model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bnb_core.checks import (
    QUANT_STORAGES,
    QUANT_TYPES,
    check_blocksize,
    check_choice,
    check_dtype_argument,
    check_flag,
)
from bnb_core.functional.blockwise import DEFAULT_BLOCKSIZE_4BIT
from bnb_core.nn.experts import GroupedLinear4bit
from bnb_core.nn.fused_experts import quantized_experts, unknown_experts
from bnb_core.nn.linear4bit import Linear4bit
from bnb_core.nn.linear8bit import Linear8bitLt
from bnb_core.nn.parametrize import replace_parameter_4bit

METHODS = (*reversed(QUANT_TYPES), "int8")


@dataclass(frozen=True)
class QuantizationConfig:
    """How :func:`quantize_model` quantizes.

    Args:
        method: ``nf4`` or ``fp4`` (4 bits, QLoRA) or ``int8`` (LLM.int8()).
        double_quantization: with 4 bits, quantize the scales as well.
        blocksize: with 4 bits, elements per block: 32 to 4096, a power of two.
        compute_dtype: with 4 bits, what inputs are converted to; None takes it from the first input.
        quant_storage: with 4 bits, the dtype that the packed bytes are viewed as.
        threshold: with int8, the magnitude from which on an input column is an outlier.
        skip_modules: names of linear layers and of experts that stay as they are.
    """

    method: str = "nf4"
    double_quantization: bool = True
    blocksize: int = DEFAULT_BLOCKSIZE_4BIT
    compute_dtype: torch.dtype | None = None
    quant_storage: torch.dtype = torch.uint8
    threshold: float = 6.0
    skip_modules: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_flag("double_quantization", self.double_quantization)
        check_blocksize(self.blocksize)
        check_dtype_argument("quant_storage", self.quant_storage, QUANT_STORAGES)


def quantize_model(model: nn.Module, config: QuantizationConfig | None = None) -> nn.Module:
    """Replace every linear layer of ``model`` by a quantized one with the same weight, in place, and freeze it.

    With 4 bits so are the experts of a mixture: those that Transformers and models written like its own fuse into
    parameters of three dimensions become :class:`~bnb_core.nn.Experts4bit`; others of three dimensions, in a module
    that says how many experts it has, are dequantized when they are read (nn/parametrize.py).

    Each new layer is quantized on the device on which the old one was; one on meta stays there, to be loaded.

    Args:
        model: any module; an nn.Linear itself has no place in which it could be replaced.
        config: None for NF4 with double quantization.

    Returns:
        The model.

    Warns:
        UserWarning: the model has parameters of three dimensions that stay as they are, such as fused experts with
            int8; the warning names them and their bytes.

    Raises:
        TypeError: the config is no :class:`QuantizationConfig`.
        ValueError: the model is itself a linear layer.
    """
    config = QuantizationConfig() if config is None else config
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"config: expected a QuantizationConfig, got {type(config).__name__}")
    if type(model) is nn.Linear:
        raise ValueError("model: expected a module that holds the linear layers, got an nn.Linear itself")
    layer: partial[Any]
    options: dict[str, Any] = {}
    if config.method == "int8":
        layer = partial(Linear8bitLt, has_fp16_weights=False, threshold=config.threshold, device="meta")
    else:
        options = {
            "compute_dtype": config.compute_dtype,
            "compress_statistics": config.double_quantization,
            "quant_type": config.method,
            "quant_storage": config.quant_storage,
        }
        layer = partial(Linear4bit, **options, device="meta")
    # Experts whose size the usual block does not divide have smaller ones.
    blocksize = {} if config.blocksize == DEFAULT_BLOCKSIZE_4BIT else {"blocksize": config.blocksize}
    replacements: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is None or name in config.skip_modules:
                continue
            if child not in replacements:
                if type(child) is nn.Linear:
                    replacements[child] = _quantized(child, layer, config)
                else:
                    replacements[child] = quantized_experts(child, **options, **blocksize) if options else None
            replacement = replacements[child]
            if replacement is not None:
                setattr(parent, name, replacement)
            elif options:
                _quantize_unknown_experts(child, config)
    _warn_of_stacked_weights(model)
    return model.requires_grad_(False)


def _quantize_unknown_experts(module: nn.Module, config: QuantizationConfig) -> None:
    """Those that no module here takes the place of are dequantized when they are read."""
    for name in unknown_experts(module):
        if not getattr(module, name).is_meta:
            replace_parameter_4bit(module, name, config.double_quantization, config.method, config.blocksize)


def _warn_of_stacked_weights(model: nn.Module) -> None:
    stacked = {
        f"{prefix}.{name}".lstrip("."): parameter.nbytes
        for prefix, module in model.named_modules()
        if not isinstance(module, (nn.modules.conv._ConvNd, GroupedLinear4bit))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    }
    if stacked:
        names = ", ".join(f"{name} ({size:,} bytes)" for name, size in stacked.items())
        warnings.warn(
            f"quantize_model leaves {sum(stacked.values()):,} bytes of parameters with three dimensions as they are: "
            f"{names}. bnb_core.nn.parametrize.replace_parameter_4bit quantizes them",
            stacklevel=3,
        )


def _quantized(linear: nn.Linear, layer: partial[Any], config: QuantizationConfig) -> nn.Module:
    """A quantized layer with the weight and the very bias of ``linear``."""
    module = layer(linear.in_features, linear.out_features, linear.bias is not None)
    weight = module.weight
    attributes = {**weight.__dict__, "blocksize": config.blocksize, "requires_grad": False}
    module.weight = type(weight)(linear.weight.data, **attributes).to(linear.weight.device)
    if isinstance(module, Linear4bit):
        module.quant_state = module.weight.quant_state
    module.bias = linear.bias
    return module.train(linear.training)

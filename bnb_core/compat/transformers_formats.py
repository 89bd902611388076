"""Every 4-bit format and block size in Transformers' registry of quantizers, as ``bnb_core``. Imports Transformers.

Its own BitsAndBytesConfig knows two formats, and one block size.
"""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bnb_core.checkpoints.config_json import METHOD, own_config
from bnb_core.checks import QUANT_TYPES, check_choice
from bnb_core.nn.experts import GroupedLinear4bit
from bnb_core.nn.linear4bit import Linear4bit
from bnb_core.nn.params4bit import Params4bit
from bnb_core.quant_state import DTYPES, PACKED_KEY, TENSOR_KEYS
from bnb_core.quantize import QuantizationConfig

_BitsAndBytesConfig: Any = import_module("transformers.utils.quantization_config").BitsAndBytesConfig
_Quantizer: Any = import_module("transformers.quantizers.quantizer_bnb_4bit").Bnb4BitHfQuantizer


class BnbCoreConfig(_BitsAndBytesConfig):
    """What ``quantization_config`` of ``from_pretrained`` may be, and what config.json holds of it.

    Args:
        format: the name of a 4-bit format.
        blocksize, double_quantization, compute_dtype, quant_storage: as of
            :class:`~bnb_core.QuantizationConfig`; dtypes may be names, such as ``"bfloat16"``.
        skip_modules: names of layers that stay as they are; None leaves output heads.

    Raises:
        ValueError: an unknown format, block size or dtype, by the argument's name.
    """

    def __init__(
        self,
        format: str = "nf4",
        blocksize: int = 64,
        double_quantization: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        quant_storage: torch.dtype | str = "uint8",
        skip_modules: list[str] | None = None,
        **others: Any,
    ) -> None:
        check_choice("format", format, QUANT_TYPES)
        config = QuantizationConfig(
            format, double_quantization, blocksize, _dtype("compute_dtype", compute_dtype),
            _dtype("quant_storage", quant_storage) or torch.uint8,
        )  # fmt: skip
        super().__init__(
            load_in_4bit=True, llm_int8_skip_modules=skip_modules, bnb_4bit_quant_type=format,
            bnb_4bit_use_double_quant=double_quantization, bnb_4bit_quant_storage=config.quant_storage,
        )  # fmt: skip
        self.quant_method = METHOD
        self.blocksize = blocksize
        self.bnb_4bit_compute_dtype = config.compute_dtype

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as JSON has them."""
        config = QuantizationConfig(
            self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant, self.blocksize, self.bnb_4bit_compute_dtype,
            self.bnb_4bit_quant_storage,
        )  # fmt: skip
        return own_config(config, self.llm_int8_skip_modules)

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: config.json says all of it."""
        return self.to_dict()


def _dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    named = {**DTYPES, "uint8": torch.uint8}
    if isinstance(value, str):
        check_choice(name, value, tuple(named))
        return named[value]
    return value


class BnbCoreQuantizer(_Quantizer):
    """Transformers' 4-bit quantizer with any block size, and with the entries of every format."""

    serialized_names = {  # noqa: RUF012  as Transformers has it
        "weight": [
            "weight",
            *(f"weight.{key}" for key in TENSOR_KEYS),
            *(f"weight.{PACKED_KEY}{name}" for name in QUANT_TYPES),
        ]
    }

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        if not hasattr(_Quantizer, "update_weight_conversions"):
            # Transformers 4 asks by this name whether entries beside a weight are what they seem.
            quantization_config.quant_method = _BitsAndBytesConfig().quant_method

    def _process_model_before_weight_loading(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = super()._process_model_before_weight_loading(model, *args, **kwargs)
        blocksize = self.quantization_config.blocksize
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (Linear4bit, GroupedLinear4bit)) and isinstance(weight, Params4bit):
                whole = isinstance(module, Linear4bit) or math.prod(module._weight_shape()[1:]) % blocksize == 0
                weight.blocksize = blocksize if whole else weight.blocksize
        return result


def register(module: ModuleType) -> None:
    """Into ``transformers.quantizers.auto``, once."""
    if METHOD not in module.AUTO_QUANTIZER_MAPPING:
        module.register_quantization_config(METHOD)(BnbCoreConfig)
        module.register_quantizer(METHOD)(BnbCoreQuantizer)


def config_of(config: QuantizationConfig) -> BnbCoreConfig:
    """See :func:`bnb_core.transformers_config`."""
    skipped = None if config.skip_modules == QuantizationConfig.skip_modules else list(config.skip_modules)
    return BnbCoreConfig(
        config.method, config.blocksize, config.double_quantization, config.compute_dtype, config.quant_storage, skipped
    )

"""The quantization_config of config.json, by which Transformers loads a quantized folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bnb_core.quantize import QuantizationConfig

METHOD = "bnb_core"
"""The quant_method of formats that Transformers' BitsAndBytesConfig does not know (compat/transformers_formats.py)."""
OF_BITSANDBYTES = ("nf4", "fp4", "int8")


def quantization_config(config: QuantizationConfig, skipped: Sequence[str]) -> dict[str, Any]:
    """With the names of the modules that stay as they are; one that other libraries read, too, where there is one.

    The block size of each weight stands in its quant state.
    """
    return (_bits_and_bytes_config if config.method in OF_BITSANDBYTES else own_config)(config, skipped)


def own_config(config: QuantizationConfig, skipped: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of the configuration that is registered with Transformers, as JSON has them."""
    return {
        "quant_method": METHOD,
        "format": config.method,
        "blocksize": config.blocksize,
        "double_quantization": config.double_quantization,
        "compute_dtype": dtype_name(config.compute_dtype),
        "quant_storage": dtype_name(config.quant_storage),
        "skip_modules": None if skipped is None else list(skipped),
    }


def _bits_and_bytes_config(config: QuantizationConfig, skipped: Sequence[str]) -> dict[str, Any]:
    """As Transformers' BitsAndBytesConfig writes itself, with the names of the modules that stay as they are."""
    is_4bit = config.method != "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": is_4bit,
        "_load_in_8bit": not is_4bit,
        "load_in_4bit": is_4bit,
        "load_in_8bit": not is_4bit,
        "bnb_4bit_compute_dtype": dtype_name(config.compute_dtype) if is_4bit else "float32",
        "bnb_4bit_quant_storage": dtype_name(config.quant_storage) if is_4bit else "uint8",
        "bnb_4bit_quant_type": config.method if is_4bit else "fp4",
        "bnb_4bit_use_double_quant": is_4bit and config.double_quantization,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": config.threshold,
    }


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Such as float32."""
    return None if dtype is None else str(dtype).removeprefix("torch.")

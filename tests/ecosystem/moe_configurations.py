"""The configurations of Transformers that have experts, and what those need that have none by default."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

_FEW = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 64, "compress_ratio": 4}
_QWEN4 = {f"indexer_{name}": value for name, value in _INDEXER.items()}

SETTINGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 4, "clip_qkv": 8.0}, "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["sparse"] * 32}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["sparse"] * 32},
    "diffusion_gemma": {"text_config": _FEW},
    "diffusion_gemma_text": _FEW,
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4": {"text_config": {"enable_moe_block": True, **_FEW}},
    "gemma4_text": {"enable_moe_block": True, **_FEW},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * 32},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 64}, "spatial_merge_size": 2}
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 64},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
}  # fmt: skip
"""By model type: without these, experts are off, or a model cannot be made from the defaults."""


def _modeling(configuration: type[Any]) -> ModuleType | None:
    """The module with the models of a configuration, if it speaks of experts."""
    name = configuration.__module__.replace("configuration_", "modeling_")
    path = Path(inspect.getfile(configuration)).with_name(f"{name.rpartition('.')[2]}.py")
    return import_module(name) if path.exists() and re.search("expert", path.read_text(), re.IGNORECASE) else None


def model_types() -> Iterator[str]:
    for model_type in CONFIG_MAPPING_NAMES:
        configuration = CONFIG_MAPPING[model_type]
        if model_type == configuration.model_type and model_classes(model_type):
            yield model_type


def model_classes(model_type: str) -> list[type[PreTrainedModel]]:
    """The models of a configuration, with a head first."""
    configuration = CONFIG_MAPPING[model_type]
    module = _modeling(configuration)
    found = [
        model
        for model in vars(module or object).values()
        if isinstance(model, type)
        and issubclass(model, PreTrainedModel)
        and model.__module__ == module.__name__
        and model.config_class is configuration
    ]
    return sorted(found, key=lambda model: (not re.search("For[A-Z]", model.__name__), "PreTrained" in model.__name__))


def make(model_type: str) -> PreTrainedModel:
    configuration = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    return model_classes(model_type)[0](configuration)

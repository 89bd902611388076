"""quantize_model goes through all configurations of Transformers with experts and leaves none of them in 16 bits."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from ecosystem import moe_configurations
from packaging.version import Version

import bnb_core
from bnb_core.nn import GroupedLinear4bit, Params4bit

if Version(transformers.__version__) < Version("5"):
    pytest.skip("before Transformers 5 experts are linear layers", allow_module_level=True)

MODEL_TYPES = list(moe_configurations.model_types())


def left_in_16_bits(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights of experts, by their names, and everything else of three dimensions but kernels of convolutions."""
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)}
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, Params4bit)
        and parameter.is_floating_point()
        and id(parameter) not in convolutions
        and (parameter.dim() == 3 or (parameter.dim() == 2 and re.search(r"experts?\.|(up|down)_embed\.", name)))
        and not name.endswith(NO_EXPERTS)
    }


# Biases are few; the others are of three dimensions and belong to no expert.
NO_EXPERTS = (
    ".bias", "position_embedding_table", "position_embeddings", "message_input.query", "downsample.query", "A_log",
)  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.filterwarnings("ignore:quantize_model leaves")
def test_no_expert_stays_in_16_bits(model_type):
    with torch.device("meta"):
        model = moe_configurations.make(model_type)
    before = left_in_16_bits(model)
    assert left_in_16_bits(bnb_core.quantize_model(model)) == {}
    fused = [name for name, shape in before.items() if len(shape) == 3]
    layers = [module for module in model.modules() if isinstance(module, GroupedLinear4bit)]
    assert len(layers) >= len(fused)


def test_the_families_that_people_use_are_among_them():
    families = {
        "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "qwen3_next", "qwen3_vl_moe", "olmoe", "deepseek_v2",
        "deepseek_v3", "gpt_oss", "llama4", "gemma4", "granitemoe", "granitemoehybrid", "jamba", "jetmoe", "dbrx",
        "phimoe", "glm4_moe", "ernie4_5_moe", "minimax_m2", "nemotron_h", "longcat_flash", "lfm2_moe",
    }  # fmt: skip
    assert families <= set(MODEL_TYPES)

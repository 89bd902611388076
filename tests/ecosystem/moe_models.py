"""Tiny models with experts, one for each way in which Transformers makes them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from bnb_core import functional
from bnb_core.nn import Params4bit

_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN = {**_SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}

CONFIGS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=8),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_QWEN),
    # Interleaved gates with limits, biases, transposed weights.
    "gpt_oss": lambda: transformers.GptOssConfig(**_SIZES, num_local_experts=8, num_experts_per_tok=2, head_dim=16),
    # Rows in the order of the experts.
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SIZES, num_local_experts=4, head_dim=16, intermediate_size_mlp=128, attention_chunk_size=64
    ),
    # No gate.
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **_SIZES, head_dim=16, layers_block_type=["attention", "moe"], n_routed_experts=8, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32, n_groups=1, num_experts_per_tok=2,
    ),
    # Experts that change nothing.
    "longcat_flash": lambda: transformers.LongcatFlashConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_layers=2, num_attention_heads=4, ffn_hidden_size=128,
        expert_ffn_hidden_size=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        head_dim=16, v_head_dim=16, n_routed_experts=4, zero_expert_num=4, moe_topk=4, max_position_embeddings=64,
    ),
    # One projection at a time, with the numbers of rows.
    "jetmoe": lambda: transformers.JetMoeConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        intermediate_size=128, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
    ),
    # Matrices with one expert below the other.
    "dbrx": lambda: transformers.DbrxConfig(
        vocab_size=128, d_model=64, n_heads=4, n_layers=2, max_seq_len=64,
        attn_config={"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 128, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    # Neurons as experts, in embeddings.
    "doge": lambda: transformers.DogeConfig(**_SIZES, is_moe=True, num_experts=64, num_experts_per_tok=4),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1)
    return model


def set_dequantized(dense: nn.Module, quantized: nn.Module) -> int:
    """Give a model of full precision the weights that a quantized one stands for; how many are those of experts."""
    of_experts = 0
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for name, module in quantized.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, Params4bit):
                values = functional.dequantize_4bit(weight, weight.quant_state)
                parameter = parameters[name] if name in parameters else parameters[f"{name}.weight"]
                if parameter.numel() != values.numel():  # those of LongCat's experts that are never read
                    parameter = parameter[: len(values)]
                parameter.copy_(values.view_as(parameter))
                of_experts += values.dim() == 3
    return of_experts

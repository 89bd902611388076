"""The tiny models, and the ways in which Transformers quantizes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BitsAndBytesConfig, PreTrainedModel

VOCABULARY = 128
PROMPT = torch.arange(1, 9).view(1, -1)
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 128, "num_key_value_heads": 2, "max_position_embeddings": 64}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "mixtral": lambda: transformers.MixtralConfig(**_LLAMA, num_local_experts=32),
    "opt": lambda: transformers.OPTConfig(
        **_SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=False,
    ),
}  # fmt: skip

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {**_NF4, "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double bf16": {**_NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16},
    "fp4 bf16 storage": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def model_class(name: str) -> type[Any]:
    return transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM


def make(name: str) -> PreTrainedModel:
    """A model that has learnt to count, so that greedy decoding has a clear answer that rounding does not change.

    A decoder goes on where its input ends; t5 always starts at one.
    """
    torch.manual_seed(0)
    model = model_class(name).from_config(CONFIGS[name]())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = (torch.randint(VOCABULARY, (16, 1)) + torch.arange(20)) % VOCABULARY
        labels = torch.arange(1, 21).expand_as(ids).contiguous() if name == "t5" else ids
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def load(name: str, folder: Path | str, quantization: str | None = None, **options: Any) -> PreTrainedModel:
    """From a folder, to be quantized; or, without a quantization, as the folder says."""
    if quantization is None:
        options = {"dtype": "auto", **options}
    else:
        config = BitsAndBytesConfig(**QUANTIZATIONS[quantization])
        options = {"quantization_config": config, "dtype": unquantized_dtype(config), **options}
    return model_class(name).from_pretrained(folder, **{"device_map": "cpu", **options})


def unquantized_dtype(config: BitsAndBytesConfig) -> torch.dtype:
    """That of the other parameters; it must be the packed ones' storage where that is a floating-point dtype."""
    return config.bnb_4bit_quant_storage if config.bnb_4bit_quant_storage.is_floating_point else torch.float32


def inputs(name: str) -> dict[str, torch.Tensor]:
    return {"input_ids": PROMPT, **({"decoder_input_ids": PROMPT} if name == "t5" else {})}


@torch.no_grad()
def logits(name: str, model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(name)).logits


def greedy(model: PreTrainedModel) -> list[int]:
    tokens = model.generate(input_ids=PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokens[0].tolist()

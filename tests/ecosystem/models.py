"""The tiny models, and the ways in which Transformers quantizes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from packaging.version import Version
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

# The real bitsandbytes leaves fused experts as they are; test_moe.py has what is done with them here.
SKIPPED = {"mixtral": ["lm_head", "experts"]} if Version(transformers.__version__) >= Version("5") else {}

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


def answer(name: str) -> list[int]:
    """What counting gives: a decoder goes on where its input ends, t5 begins with its first token."""
    return list(range(13)) if name == "t5" else list(range(1, 21))


def make(name: str) -> PreTrainedModel:
    """A model that has learnt to count, so that greedy decoding has a clear answer that rounding does not change.

    Training multiplies what CPUs round differently, so that no number of steps is enough on all of them. It goes on
    until the answer is clear: until each token leads by a quarter of the largest logit.
    """
    torch.manual_seed(0)
    model = model_class(name).from_config(CONFIGS[name]())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(50):
        model.train()
        for _ in range(20):
            ids = (torch.randint(VOCABULARY, (16, 1)) + torch.arange(20)) % VOCABULARY
            labels = torch.arange(1, 21).expand_as(ids).contiguous() if name == "t5" else ids
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        tokens, steps = generate(model.eval())
        if tokens == answer(name) and lead(steps).min() >= 0.25:
            return model
    raise AssertionError(f"{name} does not learn to count")


def load(name: str, folder: Path | str, quantization: str | None = None, **options: Any) -> PreTrainedModel:
    """From a folder, to be quantized; or, without a quantization, as the folder says."""
    if quantization is None:
        options = {"dtype": "auto", **options}
    else:
        config = BitsAndBytesConfig(**QUANTIZATIONS[quantization], llm_int8_skip_modules=SKIPPED.get(name))
        options = {"quantization_config": config, "dtype": unquantized_dtype(config), **options}
    return aligned(model_class(name).from_pretrained(folder, **{"device_map": "cpu", **options}))


def aligned(model: Any) -> Any:
    """Its plain parameters as torch allocates them, and not where they happen to lie in a file that is mapped.

    On some CPUs torch's products depend on that, and then two models with the same values are not equal to the bit.
    """
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter and not parameter.is_meta:
            parameter.data = parameter.data.clone()
    return model


def unquantized_dtype(config: BitsAndBytesConfig) -> torch.dtype:
    """That of the other parameters; it must be the packed ones' storage where that is a floating-point dtype."""
    return config.bnb_4bit_quant_storage if config.bnb_4bit_quant_storage.is_floating_point else torch.float32


def inputs(name: str) -> dict[str, torch.Tensor]:
    return {"input_ids": PROMPT, **({"decoder_input_ids": PROMPT} if name == "t5" else {})}


@torch.no_grad()
def logits(name: str, model: PreTrainedModel) -> torch.Tensor:
    return model(**inputs(name)).logits


def generate(model: PreTrainedModel, along: list[int] | None = None) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens, and the logits of each new one; or tokens that are given, and the logits on the way."""
    allowed = None if along is None else lambda _, before: [along[len(before)]]
    generated = model.generate(
        input_ids=PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        prefix_allowed_tokens_fn=allowed, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return generated.sequences[0].tolist(), torch.cat(generated.logits)


def greedy(model: PreTrainedModel) -> list[int]:
    return generate(model)[0]


def lead(logits: torch.Tensor) -> torch.Tensor:
    """How far the best of each row is before the next, in parts of the largest of all."""
    best, next_best = logits.topk(2).values.unbind(-1)
    return (best - next_best) / logits.abs().max()


def routers(model: Any) -> dict[str, torch.nn.Module]:
    """What says which experts of a Mixtral see a token."""
    return {name: module for name, module in model.named_modules() if name.endswith(".gate")}


def int8_layers(model: Any) -> dict[str, torch.nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear8bitLt)}


@contextlib.contextmanager
def calls_recorded(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """What each module is called with and what it gives, from call to call."""
    calls: dict[str, list[Any]] = {name: [] for name in modules}

    def record(name: str, module: torch.nn.Module, arguments: tuple[torch.Tensor], output: Any) -> None:
        calls[name].append((arguments[0], output))

    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules.items()]
    yield calls
    for hook in hooks:
        hook.remove()

"""Decode with a mixture of experts that is larger than the memory it may take: the shapes of Qwen3-30B-A3B.

    python examples/offloaded_experts.py FOLDER --gib 4 --tokens 4

The weights are random: 15 GiB of experts are written into FOLDER once. Needs Transformers 5.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import bnb_core
from bnb_core.functional import QuantState, create_dynamic_map

CONFIG = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144, "vocab_size": 151936,
    "decoder_sparse_step": 1, "norm_topk_prob": True, "tie_word_embeddings": False, "mlp_only_layers": [],
}  # fmt: skip


def random_entries(name: str, groups: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The entries of a stack of weights whose codes and scales are random bytes."""
    blocks = groups * rows * columns // 64
    nested = QuantState(torch.rand(blocks // 256) * 0.01, None, create_dynamic_map(), 256, dtype=torch.float32)
    nf4 = bnb_core.functional.get_4bit_type("nf4", device="cpu")
    state = QuantState(
        torch.randint(0, 256, (blocks,), dtype=torch.uint8), torch.Size((groups, rows, columns)), nf4, 64, "nf4",
        torch.bfloat16, torch.tensor(0.02), nested,
    )  # fmt: skip
    codes = torch.randint(0, 2**63 - 1, (groups * rows * columns // 16,)).view(torch.uint8).view(-1, 1)
    return {f"{name}.weight": codes, **{f"{name}.weight.{key}": v for key, v in state.as_dict(packed=True).items()}}


def write(folder: Path, layers: int) -> None:
    experts, hidden, inner = (CONFIG[key] for key in ("num_experts", "hidden_size", "moe_intermediate_size"))
    for layer in range(layers):
        file = folder / f"layer{layer:02}.safetensors"
        if not file.exists():
            name = f"model.layers.{layer}.mlp.experts"
            first = random_entries(f"{name}.gate_up_proj", experts, 2 * inner, hidden)
            save_file({**first, **random_entries(f"{name}.down_proj", experts, hidden, inner)}, file)


def make(layers: int) -> torch.nn.Module:
    """The model with its experts on meta, and random weights elsewhere, quantized one layer at a time."""
    config = transformers.Qwen3MoeConfig(**CONFIG, num_hidden_layers=layers, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if not module._parameters or "Experts" in type(module).__name__:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            fill = torch.nn.init.ones_ if parameter.dim() == 1 else torch.nn.init.xavier_uniform_
            values = torch.empty(parameter.shape, dtype=torch.bfloat16)
            setattr(module, name, torch.nn.Parameter(fill(values), requires_grad=False))
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    return bnb_core.quantize_model(model.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--gib", type=float, default=4.0, help="of experts that are kept in memory")
    parser.add_argument("--tokens", type=int, default=4)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    write(arguments.folder, arguments.layers)
    model = make(arguments.layers)
    cache = bnb_core.nn.offload_experts(model, arguments.folder, int(arguments.gib * 2**30))
    tokens, past = torch.tensor([[1, 2, 3, 4]]), None
    for _ in range(arguments.tokens):
        begin = time.perf_counter()
        with torch.no_grad():
            output = model(tokens, past_key_values=past, use_cache=True)
        past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        seconds, kept = time.perf_counter() - begin, cache.bytes / 2**30
        print(f"token {tokens.item()}: {seconds:.2f} s, peak resident memory {peak:.2f} GiB", flush=True)
        print(f"    {kept:.2f} GiB of experts kept, {cache.misses} read, {cache.hits} found", flush=True)
    size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors")) / 2**30
    print(f"experts in files: {size:.2f} GiB")


if __name__ == "__main__":
    main()

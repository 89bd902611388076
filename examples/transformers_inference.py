"""Transformers on a quantized folder: quantize it on the disk, load it, let it write.

Run it with `python examples/transformers_inference.py [FOLDER]`; it needs Transformers and Accelerate. Without a folder
it makes a small model, which has learnt nothing, and takes some seconds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import bnb_core

bnb_core.install_as_bitsandbytes()  # before Transformers is imported

from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402


def small_model(folder: Path) -> Path:
    """A Llama of random weights, as `save_pretrained` leaves it."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "small")
    return folder / "small"


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(sys.argv[1]) if len(sys.argv) > 1 else small_model(Path(temporary))
        result = bnb_core.quantize_checkpoint(source, Path(temporary) / "nf4")
        print(f"{result.bytes_before:,} bytes became {result.bytes_after:,}")

        model = AutoModelForCausalLM.from_pretrained(Path(temporary) / "nf4", device_map="auto")
        print(f"{type(model).__name__} on {model.device}: {model.get_memory_footprint():,} bytes in memory")
        prompt = torch.arange(1, 9, device=model.device).view(1, -1)
        with torch.no_grad():
            tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)
        print("tokens:", tokens[0, 8:].tolist())


if __name__ == "__main__":
    main()

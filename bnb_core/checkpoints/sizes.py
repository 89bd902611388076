"""What a checkpoint takes, layer by layer, and what it would take in other formats: from its headers alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from bnb_core.checkpoints.choice import choose, model_type_of
from bnb_core.checkpoints.folder import CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import NAMES, StoredTensor
from bnb_core.checkpoints.tasks import ENCODERS
from bnb_core.checkpoints.weights import StoredWeight, weights_of
from bnb_core.quantize import QuantizationConfig

BLOCK = re.compile(r"^(.*?\.\d+)\.")
"""A name up to its first number is one block of a model."""
DENSE = {"float32": 4, "bfloat16": 2}
FORMATS = {
    "int8": QuantizationConfig("int8"),
    "nf4": QuantizationConfig("nf4", double_quantization=False),
    "nf4, double quantization": QuantizationConfig("nf4"),
    "fp4": QuantizationConfig("fp4", double_quantization=False),
}
"""What a model may be quantized to; a format has a row."""


class Layer(NamedTuple):
    """Weights that belong together: a block of the model, or a module outside of them."""

    name: str
    parameters: int
    nbytes: int
    formats: dict[str, int]
    """Format to bytes."""


class Sizes(NamedTuple):
    """Of a checkpoint."""

    path: str
    files: int
    parameters: int
    nbytes: int
    formats: dict[str, int]
    """Format to bytes, the largest first."""
    layers: list[Layer]
    alternatives: dict[str, int]
    """Format to the bytes of the whole model with its linear layers in it, the rest as it is."""


def inspect_checkpoint(path: str | os.PathLike[str]) -> Sizes:
    """Formats and sizes of a folder of safetensors files or of one file; its data are not read.

    Raises:
        CheckpointFileError: malformed or truncated files.
        OSError: what cannot be read.
    """
    folder = open_checkpoint(Path(path))
    weights = weights_of(folder)
    layers: dict[str, list[StoredWeight]] = {}
    for weight in weights:
        match = BLOCK.match(weight.name)
        layers.setdefault(match[1] if match else weight.name.rpartition(".")[0] or weight.name, []).append(weight)
    return Sizes(
        str(path),
        len(folder.shards),
        sum(weight.numel for weight in weights),
        sum(weight.nbytes for weight in weights),
        _by_format(weights),
        [
            Layer(name, sum(w.numel for w in each), sum(w.nbytes for w in each), _by_format(each))
            for name, each in layers.items()
        ],
        _alternatives(folder, weights),
    )


def _by_format(weights: list[StoredWeight]) -> dict[str, int]:
    result: dict[str, int] = {}
    for weight in weights:
        result[weight.described] = result.get(weight.described, 0) + weight.nbytes
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def _alternatives(folder: CheckpointFolder, weights: list[StoredWeight]) -> dict[str, int]:
    linear = [weight for weight in weights if _is_linear(weight, model_type_of(folder.config))]
    rest = sum(weight.nbytes for weight in weights) - sum(weight.nbytes for weight in linear)
    result = {name: rest + sum(weight.numel * size for weight in linear) for name, size in DENSE.items()}
    for name, config in FORMATS.items():
        result[name] = rest + sum(_encoded_bytes(weight, config) for weight in linear)
    return result


def _is_linear(weight: StoredWeight, model_type: str | None) -> bool:
    """Whether it is quantized, or would be."""
    return weight.is_quantized or choose(weight.tensor, (), model_type).kept_because is None


def _encoded_bytes(weight: StoredWeight, config: QuantizationConfig) -> int:
    rows = max(weight.numel // weight.shape[-1], 1) if weight.numel else 0
    plain = StoredTensor(
        weight.name, NAMES[torch.bfloat16], (rows, weight.shape[-1]), weight.tensor.file, 0, 2 * weight.numel
    )
    task = ENCODERS[config.method](plain, False, config, max(plain.nbytes, 1), torch.device("cpu"))
    return sum(output.nbytes for output in task.outputs) + sum(task.texts.values())

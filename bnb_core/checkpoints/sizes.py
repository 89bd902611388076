"""What a checkpoint takes, layer by layer, and what it would take in other formats: from its headers alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from bnb_core.checkpoints.choice import choose, model_type_of
from bnb_core.checkpoints.experts import STORED_OTHERWISE, Experts, find_experts
from bnb_core.checkpoints.folder import CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import NAMES, StoredTensor
from bnb_core.checkpoints.tasks import ENCODERS, EXPERT_ENCODERS, Task
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
    """Format to the bytes of the whole model with its linear layers and experts in it, the rest as it is."""


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
    model_type = model_type_of(folder.config)
    experts = [each for each in find_experts(folder.tensors, model_type) if model_type not in STORED_OTHERWISE]
    parts = {part.name for each in experts for part in each.parts}
    linear = [w for w in weights if w.name not in parts and _is_linear(w, model_type)]
    numel = sum(w.numel for w in linear) + sum(each.numel for each in experts)
    rest = sum(w.nbytes for w in weights) - sum(w.nbytes for w in linear) - sum(each.nbytes for each in experts)
    result = {name: rest + numel * size for name, size in DENSE.items()}
    for name, config in FORMATS.items():
        of_experts = sum(_encoded_bytes(each.name, each.shape, config) for each in experts)
        result[name] = rest + sum(_encoded_bytes(w.name, w.shape, config) for w in linear) + of_experts
    return result


def _is_linear(weight: StoredWeight, model_type: str | None) -> bool:
    """Whether it is quantized, or would be."""
    return weight.is_quantized or choose(weight.tensor, (), model_type).kept_because is None


def _encoded_bytes(name: str, shape: Sequence[int], config: QuantizationConfig) -> int:
    numel = math.prod(shape)
    plain = StoredTensor(name, NAMES[torch.bfloat16], tuple(shape), Path(), 0, 2 * numel)
    piece, device = max(plain.nbytes, 1), torch.device("cpu")
    task: Task
    if len(shape) == 3:
        experts = Experts("", name, (plain,), tuple(shape))
        blocksize = experts.blocksize(config.blocksize)
        if blocksize is None or config.method not in EXPERT_ENCODERS:
            return plain.nbytes
        task = EXPERT_ENCODERS[config.method](experts, replace(config, blocksize=blocksize), piece, device)
    else:
        flat = plain._replace(shape=(numel // shape[-1] if numel else 0, shape[-1]))
        task = ENCODERS[config.method](flat, False, config, piece, device)
    return sum(output.nbytes for output in task.outputs) + sum(task.texts.values())

"""Dequantizes a checkpoint from file to file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bnb_core.checkpoints.choice import is_transposed, model_type_of
from bnb_core.checkpoints.convert import SYNC_BYTES, Progress, convert, piece_bytes
from bnb_core.checkpoints.experts import dense_names
from bnb_core.checkpoints.folder import QUANTIZATION, CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import CheckpointFileError
from bnb_core.checkpoints.quantizing import Result
from bnb_core.checkpoints.tasks import Decode, Renamed, Task, Transposed
from bnb_core.checkpoints.weights import StoredWeight, weights_of
from bnb_core.checks import FLOAT_DTYPES, as_device, check_dtype_argument
from bnb_core.quant_state import DTYPES


def dequantize_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sync_bytes: int = SYNC_BYTES,
) -> Result:
    """Undo :func:`quantize_checkpoint`, or what Transformers saved with bitsandbytes: each weight as plain values.

    Experts that were fused stay so, as parameters of three dimensions.

    Args:
        path, out, device, progress, sync_bytes: as there.
        dtype: of the weights that were quantized: f32, f16 or bf16. None for what they were before; where int8 weights
            do not tell, for the dtype of config.json, or f32.

    Returns:
        What was done.

    Raises:
        CheckpointFileError: malformed or truncated input, nothing in it that is quantized, an existing ``out``, too
            little room on the disk.
        OSError: what cannot be read or written.
    """
    if dtype is not None:
        check_dtype_argument("dtype", dtype, FLOAT_DTYPES)
    place = as_device("device", device)
    folder = open_checkpoint(Path(path))
    weights = weights_of(folder)
    quantized = [weight for weight in weights if weight.is_quantized]
    if not quantized:
        raise CheckpointFileError(
            f"{path}: holds no weight that bitsandbytes or bnb_core has quantized"
            "; give a folder that one of them has written"
        )
    names = _names_of_experts(quantized)
    piece, model_type = piece_bytes(folder), model_type_of(folder.config)
    tasks: dict[str, list[Task]] = {name: [] for name in folder.shards}
    for weight in weights:
        own = dtype or (_dtype_of(folder.config) if weight.format == "int8" else None)
        task = weight.decoded(own, piece, place)
        if isinstance(task, Decode) and is_transposed(weight.name, model_type):
            task = Transposed(task)
        elif weight.name in names:
            task = Renamed(task, names[weight.name])
        tasks[weight.tensor.file.name].append(task)
    config = folder.config
    if config is not None:
        config = {key: value for key, value in config.items() if key != QUANTIZATION}
    options = {"dequantize": None if dtype is None else str(dtype)}
    written = convert(folder, Path(out), _in_order(folder, tasks), config, options, progress or Progress(), sync_bytes)
    kept = Counter("not quantized" for weight in weights if not weight.is_quantized)
    before = sum(tensor.nbytes for tensor in folder.tensors.values())
    return Result(before, written, len(quantized), dict(kept), [])


def _names_of_experts(quantized: Sequence[StoredWeight]) -> dict[str, str]:
    """New names of the weights and biases of experts, as those of parameters of one module."""
    names: dict[str, str] = {}
    for weight in quantized:
        if len(weight.shape) == 3:
            name, bias = dense_names(weight.name)
            names |= {weight.name: name, f"{weight.name.removesuffix('weight')}bias": bias}
    return names


def _dtype_of(config: dict[str, Any] | None) -> torch.dtype:
    config = config or {}
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def _in_order(folder: CheckpointFolder, tasks: dict[str, list[Task]]) -> dict[str, list[Task]]:
    """Without the files that would be empty."""
    return {name: tasks[name] for name in folder.shards if tasks[name]}

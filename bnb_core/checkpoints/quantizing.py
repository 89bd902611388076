"""Quantizes a checkpoint from file to file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bnb_core.checkpoints.choice import Choice, choose, model_type_of, skipped_modules
from bnb_core.checkpoints.convert import SYNC_BYTES, Progress, convert, piece_bytes
from bnb_core.checkpoints.folder import QUANTIZATION, CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import DTYPES, CheckpointFileError
from bnb_core.checkpoints.tasks import ENCODERS, Copy, Task
from bnb_core.checks import as_device
from bnb_core.quantize import QuantizationConfig


class Result(NamedTuple):
    """What a conversion did."""

    bytes_before: int
    bytes_after: int
    quantized: int
    """How many tensors."""
    kept: dict[str, int]
    """Reason to how many."""
    remarks: list[str]
    """A sentence for each tensor that somebody may have expected to be quantized."""


def quantize_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QuantizationConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sync_bytes: int = SYNC_BYTES,
) -> Result:
    """Quantize the linear layers of a folder of safetensors files; Transformers loads the result.

    Memory is bounded by twice the largest tensor and 256 MiB, however large the model. Killed, it goes on where it was
    when it is called again, and gives the same bytes. Nothing is at ``out`` before all of it is.

    Args:
        path: a folder as Transformers saves one, of one file or of many; config.json and other files are taken along.
        out: the new folder; ``out.partial`` beside it while it is made.
        config: None for NF4 with double quantization. Its ``skip_modules`` are patterns of names that stay as they
            are, beside embeddings, output heads, norms and routers, which always do.
        device: what quantizes; the bits are the same on each.
        progress: what is told of the bytes read.
        sync_bytes: how many are written between moments from which a killed run is gone on with.

    Returns:
        What was done.

    Raises:
        CheckpointFileError: a ValueError: malformed, truncated or quantized input, an existing ``out``, too little
            room on the disk, a weight that is not finite.
        OSError: what cannot be read or written; what is done stays in ``out.partial``.
    """
    config = QuantizationConfig() if config is None else config
    place = as_device("device", device)
    folder = open_checkpoint(Path(path))
    _refuse_quantized(folder)
    choices = choices_for(folder, config)
    if not any(choice.kept_because is None for choice in choices.values()):
        raise CheckpointFileError(f"{path}: holds no weight of a linear layer that could be quantized")
    piece = piece_bytes(folder)
    tasks: dict[str, list[Task]] = {name: [] for name in folder.shards}
    for shard, header in folder.shards.items():
        for tensor in header.tensors:
            choice = choices[tensor.name]
            if choice.kept_because is None:
                tasks[shard].append(ENCODERS[config.method](tensor, choice.transposed, config, piece, place))
            else:
                tasks[shard].append(Copy(tensor, piece))
    new_config = {**(folder.config or {}), QUANTIZATION: transformers_config(folder, choices, config)}
    written = convert(folder, Path(out), tasks, new_config, _options(config), progress or Progress(), sync_bytes)
    kept = Counter(choice.kept_because for choice in choices.values() if choice.kept_because)
    remarks = [
        f"{name}: stays {folder.tensors[name].dtype} of shape {folder.tensors[name].shape}: {choice.kept_because}"
        for name, choice in choices.items()
        if choice.worth_a_word
    ]
    before = sum(tensor.nbytes for tensor in folder.tensors.values())
    return Result(before, written, len(choices) - kept.total(), dict(kept), remarks)


def choices_for(folder: CheckpointFolder, config: QuantizationConfig) -> dict[str, Choice]:
    """What becomes of each tensor."""
    model_type = model_type_of(folder.config)
    return {name: choose(tensor, config.skip_modules, model_type) for name, tensor in folder.tensors.items()}


def _refuse_quantized(folder: CheckpointFolder) -> None:
    found = folder.quantization
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointFileError(f"{folder.path}: is quantized already ({method}); dequantize it first")
    for tensor in folder.tensors.values():
        if ".quant_state." in tensor.name or tensor.name.endswith(".SCB"):
            raise CheckpointFileError(f"{tensor.file}: {tensor.name}: is quantized already; dequantize it first")


def transformers_config(
    folder: CheckpointFolder, choices: Mapping[str, Choice], config: QuantizationConfig
) -> dict[str, Any]:
    """The quantization_config for Transformers, which finds out itself what a weight's blocks are."""
    weights = [tensor for tensor in folder.tensors.values() if choices[tensor.name].kept_because is None]
    skipped = skipped_modules(choices, folder.tensors.values())
    compute_dtype = config.compute_dtype or DTYPES[weights[0].dtype]
    return bits_and_bytes_config(replace(config, compute_dtype=compute_dtype), skipped)


def bits_and_bytes_config(config: QuantizationConfig, skipped: list[str]) -> dict[str, Any]:
    """As Transformers' BitsAndBytesConfig writes itself, with the names of the modules that stay as they are."""
    is_4bit = config.method != "int8"
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": is_4bit,
        "_load_in_8bit": not is_4bit,
        "load_in_4bit": is_4bit,
        "load_in_8bit": not is_4bit,
        "bnb_4bit_compute_dtype": _name(config.compute_dtype) if is_4bit else "float32",
        "bnb_4bit_quant_storage": _name(config.quant_storage) if is_4bit else "uint8",
        "bnb_4bit_quant_type": config.method if is_4bit else "fp4",
        "bnb_4bit_use_double_quant": is_4bit and config.double_quantization,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": config.threshold,
    }


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _options(config: QuantizationConfig) -> dict[str, Any]:
    return {
        "method": config.method,
        "double_quantization": config.double_quantization,
        "blocksize": config.blocksize,
        "compute_dtype": _name(config.compute_dtype),
        "quant_storage": _name(config.quant_storage),
        "threshold": config.threshold,
        "skip_modules": list(config.skip_modules),
    }

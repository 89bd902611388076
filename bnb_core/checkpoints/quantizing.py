"""Quantizes a checkpoint from file to file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bnb_core.checkpoints.choice import Choice, choose, choose_experts, model_type_of, skipped_modules
from bnb_core.checkpoints.config_json import dtype_name, quantization_config
from bnb_core.checkpoints.convert import SYNC_BYTES, Progress, convert, piece_bytes
from bnb_core.checkpoints.experts import Experts, find_experts, is_of_one
from bnb_core.checkpoints.folder import QUANTIZATION, CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import DTYPES, CheckpointFileError, StoredTensor
from bnb_core.checkpoints.tasks import ENCODERS, EXPERT_ENCODERS, Copy, Renamed, Task
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
    fuse_experts: bool = True,
) -> Result:
    """Quantize the linear layers and experts of a folder of safetensors files; Transformers loads the result.

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
        fuse_experts: with 4 bits, the experts of a layer become one tensor for each projection, as Transformers 5 has
            them. False quantizes them one by one where the checkpoint has one tensor for each, for Transformers 4;
            fused ones stay as they are.

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
    experts = find_experts(folder.tensors, model_type_of(folder.config)) if fuse_experts else []
    choices = choices_for(folder, config, experts, fuse_experts)
    if not any(choice.kept_because is None for choice in choices.values()):
        raise CheckpointFileError(
            f"{path}: holds no weight of a linear layer that could be quantized"
            ", expected a matrix in f32, f16 or bf16 that --skip does not name"
        )
    tasks = _tasks(folder, choices, experts, config, place)
    new_config = {**(folder.config or {}), QUANTIZATION: transformers_config(folder, choices, config, experts)}
    options = {**_options(config), "fuse_experts": fuse_experts}
    written = convert(folder, Path(out), tasks, new_config, options, progress or Progress(), sync_bytes)
    kept = Counter(choice.kept_because for choice in choices.values() if choice.kept_because)
    remarks = [
        f"{name}: stays {folder.tensors[name].dtype} of shape {folder.tensors[name].shape}: {choice.kept_because}"
        for name, choice in choices.items()
        if choice.worth_a_word
    ]
    before = sum(tensor.nbytes for tensor in folder.tensors.values())
    return Result(before, written, len(choices) - kept.total(), dict(kept), remarks)


def choices_for(
    folder: CheckpointFolder, config: QuantizationConfig, experts: Sequence[Experts], fuse_experts: bool
) -> dict[str, Choice]:
    """What becomes of each tensor. Of experts that are fused, the first part has the word that is worth one."""
    model_type = model_type_of(folder.config)
    choices = {name: choose(tensor, config.skip_modules, model_type) for name, tensor in folder.tensors.items()}
    fused = {part.name for each in experts for part in each.parts}
    alone = [name for name, choice in choices.items() if choice.kept_because is None and is_of_one(name)]
    if fuse_experts:
        unfit = Choice("an expert of a layer whose experts do not fit together", worth_a_word=True)
        choices |= dict.fromkeys((name for name in alone if name not in fused), unfit)
    for each in experts:
        choice = choose_experts(each, config, model_type)
        choices |= dict.fromkeys((part.name for part in each.parts), choice._replace(worth_a_word=False))
        choices[each.parts[0].name] = choice
    return choices


def _tasks(
    folder: CheckpointFolder,
    choices: Mapping[str, Choice],
    experts: Sequence[Experts],
    config: QuantizationConfig,
    device: torch.device,
) -> dict[str, list[Task]]:
    """By file, without those that would be empty; experts are in the file of their first part."""
    piece = piece_bytes(folder)
    quantized = [each for each in experts if choices[each.parts[0].name].kept_because is None]
    first = {each.parts[0].name: each for each in quantized}
    parts = {part.name for each in quantized for part in each.parts}
    biases = {each.bias.name: each.bias_name for each in quantized if each.bias is not None}

    def task_of(tensor: StoredTensor) -> Task | None:
        if tensor.name in first:
            each = first[tensor.name]
            own = replace(config, blocksize=each.blocksize(config.blocksize) or config.blocksize)
            return EXPERT_ENCODERS[config.method](each, own, piece, device)
        if tensor.name in parts:
            return None
        if tensor.name in biases:
            return Renamed(Copy(tensor, piece), biases[tensor.name])
        choice = choices[tensor.name]
        if choice.kept_because is None:
            return ENCODERS[config.method](tensor, choice.transposed, config, piece, device)
        return Copy(tensor, piece)

    tasks = {
        shard: [task for task in map(task_of, header.tensors) if task is not None]
        for shard, header in folder.shards.items()
    }
    return {shard: each for shard, each in tasks.items() if each}


def _refuse_quantized(folder: CheckpointFolder) -> None:
    found = folder.quantization
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointFileError(f"{folder.path}: is quantized already ({method}); dequantize it first")
    for tensor in folder.tensors.values():
        if ".quant_state." in tensor.name or tensor.name.endswith(".SCB"):
            raise CheckpointFileError(f"{tensor.file}: {tensor.name}: is quantized already; dequantize it first")


def transformers_config(
    folder: CheckpointFolder,
    choices: Mapping[str, Choice],
    config: QuantizationConfig,
    experts: Sequence[Experts],
) -> dict[str, Any]:
    """The quantization_config for Transformers, which finds out itself what a weight's blocks are."""
    weights = [tensor for tensor in folder.tensors.values() if choices[tensor.name].kept_because is None]
    skipped = skipped_modules(choices, folder.tensors.values(), experts, model_type_of(folder.config))
    compute_dtype = config.compute_dtype or DTYPES[weights[0].dtype]
    return quantization_config(replace(config, compute_dtype=compute_dtype), skipped)


def _options(config: QuantizationConfig) -> dict[str, Any]:
    return {
        "method": config.method,
        "double_quantization": config.double_quantization,
        "blocksize": config.blocksize,
        "compute_dtype": dtype_name(config.compute_dtype),
        "quant_storage": dtype_name(config.quant_storage),
        "threshold": config.threshold,
        "skip_modules": list(config.skip_modules),
    }

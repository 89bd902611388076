"""Reads a quantized checkpoint beside the one that it was made from, and says how far each weight is off."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core.checkpoints.choice import is_transposed, model_type_of
from bnb_core.checkpoints.convert import Progress
from bnb_core.checkpoints.experts import Experts, find_experts
from bnb_core.checkpoints.folder import open_checkpoint
from bnb_core.checkpoints.headers import DTYPES, CheckpointFileError, StoredTensor
from bnb_core.checkpoints.pipeline import SpanReader
from bnb_core.checkpoints.tasks import spans_of, whole_blocks
from bnb_core.checkpoints.weights import StoredWeight, weights_of

PIECE = 2 * 2**20
"""Bytes of codes that are compared at once."""


class Errors(NamedTuple):
    """Of one quantized weight, against the values that it was made from."""

    name: str
    format: str
    numel: int
    largest: float
    """The largest absolute error."""
    rms: float
    """The root of the mean squared error."""
    sqnr: float
    """Signal to quantization noise, 10 log10(sum of squares / sum of squared errors), in dB."""


def verify_checkpoint(
    path: str | os.PathLike[str], original: str | os.PathLike[str], progress: Progress | None = None
) -> list[Errors]:
    """Compare a quantized folder with its original, in the memory of a few pieces.

    Args:
        path: the quantized one.
        original: what it was made from.
        progress: what is told of the bytes read.

    Returns:
        The errors of each quantized weight, those with the lowest SQNR first.

    Raises:
        CheckpointFileError: a file is malformed, a tensor is missing, surplus or of another shape, or one that is not
            quantized differs from the original's.
    """
    progress = progress or Progress()
    before, after = open_checkpoint(Path(original)), open_checkpoint(Path(path))
    model_type = model_type_of(before.config)
    tensors, weights = before.tensors, weights_of(after)
    fused = {weight.name for weight in weights if weight.is_quantized and len(weight.shape) == 3}
    experts = {each.name: each for each in find_experts(tensors, model_type) if each.name in fused}
    for each in experts.values():
        tensors = {**tensors, **({} if each.bias is None else {each.bias_name: each.bias})}
        for tensor in (*each.parts, *(() if each.bias is None else (each.bias,))):
            del tensors[tensor.name]
    names, expected = {weight.name for weight in weights}, tensors.keys() | experts.keys()
    if names != expected:
        name = min(expected - names or names - expected)
        raise CheckpointFileError(f"{path}: {name}: {'missing' if name in expected else 'not in the original'}")
    progress.total(sum(tensor.nbytes for tensor in before.tensors.values()))
    results = []
    with SpanReader() as reader:
        for weight in weights:
            if weight.name in experts:
                results.append(_errors_of_experts(weight, experts[weight.name], reader))
                progress.advance(experts[weight.name].nbytes)
                continue
            tensor = tensors[weight.name]
            if weight.is_quantized:
                results.append(_errors_of_matrix(weight, tensor, is_transposed(weight.name, model_type), reader))
            else:
                _check_same(weight, tensor, reader)
            progress.advance(tensor.nbytes)
    return sorted(results, key=lambda each: each.sqnr)


def _errors_of_matrix(weight: StoredWeight, tensor: StoredTensor, transposed: bool, reader: SpanReader) -> Errors:
    shape = tensor.shape[::-1] if transposed else tensor.shape
    return _errors(weight, shape, _values(tensor, transposed, reader), reader)


def _errors_of_experts(weight: StoredWeight, experts: Experts, reader: SpanReader) -> Errors:
    values = (piece for part in experts.parts for piece in _values(part, False, reader))
    return _errors(weight, experts.shape, values, reader)


def _errors(weight: StoredWeight, shape: Sequence[int], original: Iterator[Tensor], reader: SpanReader) -> Errors:
    if tuple(weight.shape) != tuple(shape):
        raise CheckpointFileError(f"{weight.tensor.file}: {weight.name}: of shape {weight.shape}, expected {shape}")
    task = weight.decoded(torch.float32, PIECE, torch.device("cpu"))
    decoded = (piece for _, piece in task.run(reader.read(span) for span in task.spans))
    largest, noise, signal = 0.0, 0.0, 0.0
    for values, result in _side_by_side(original, decoded):
        difference = values.double() - result.double()
        if difference.numel():
            largest = max(largest, difference.abs().max().item())
        noise += difference.square().sum().item()
        signal += values.double().square().sum().item()
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return Errors(weight.name, weight.described, weight.numel, largest, math.sqrt(noise / max(weight.numel, 1)), sqnr)


def _values(tensor: StoredTensor, transposed: bool, reader: SpanReader) -> Iterator[Tensor]:
    dtype = DTYPES[tensor.dtype]
    if transposed:
        (whole,) = spans_of(tensor, tensor.nbytes)
        yield from reader.read(whole).view(dtype).view(tensor.shape).T.contiguous().view(-1).split(PIECE)
        return
    for span in spans_of(tensor, whole_blocks(tensor, PIECE)):
        yield reader.read(span).view(dtype)


def _side_by_side(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of two streams of as many elements, cut where either is."""
    a = b = torch.empty(0)
    while True:
        a = a if a.numel() else next(first, a).reshape(-1)
        b = b if b.numel() else next(second, b).reshape(-1)
        count = min(a.numel(), b.numel())
        if not count:
            return
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]


def _check_same(weight: StoredWeight, tensor: StoredTensor, reader: SpanReader) -> None:
    stored = weight.tensor
    if (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        raise CheckpointFileError(
            f"{stored.file}: {stored.name}: {stored.dtype} of shape {stored.shape}, expected {tensor.dtype} of shape "
            f"{tensor.shape} as in the original"
        )
    for ours, theirs in zip(spans_of(stored, PIECE), spans_of(tensor, PIECE), strict=True):
        if not torch.equal(reader.read(ours), reader.read(theirs)):
            raise CheckpointFileError(
                f"{stored.file}: {stored.name}: differs from the original, but is not quantized"
                "; expected the same bytes, so quantize the original again"
            )


def report(errors: list[Errors]) -> list[dict[str, Any]]:
    """As JSON has it: an infinite SQNR is None."""
    return [{**each._asdict(), "sqnr": each.sqnr if math.isfinite(each.sqnr) else None} for each in errors]

"""Experts that stay in files: those that a batch needs are read, and kept on the device for a number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bnb_core import functional
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.checks import check_float
from bnb_core.nn.device_copies import will_need
from bnb_core.nn.expert_cache import ExpertCache
from bnb_core.nn.experts import GroupedLinear4bit
from bnb_core.quant_state import QuantState


@dataclass
class _Codes:
    """The packed codes of a layer's groups, in a file."""

    name: str
    file: Path
    groups: int
    bytes_of_group: int
    used: list[int] = field(default_factory=list)
    """The groups that had rows in the latest batch, those with the most rows first."""

    def keys(self, groups: Iterable[int]) -> list[tuple[str, int]]:
        return [(self.name, e) for e in groups]

    def belong_with(self, other: _Codes) -> bool:
        """Whether both are of one experts module, whose projections all see the same rows."""
        return self.name.rsplit(".", 2)[0] == other.name.rsplit(".", 2)[0]

    def read(
        self, keys: list[tuple[str, int]], copy: Callable[[Tensor], Tensor], guessed: bool = False
    ) -> Iterable[Tensor]:
        """A file is mapped while it is read, no longer. The system hears of all keys at first, if none is a guess."""
        try:
            with safe_open(self.file, framework="pt") as opened:
                codes = opened.get_slice(self.name)
                rows = codes.get_shape()[0] // self.groups
                parts = [codes[e * rows : (e + 1) * rows] for _, e in keys]
                if not guessed:
                    for part in parts:
                        will_need(part)
                for part in parts:
                    if guessed:
                        will_need(part)
                    yield copy(part)
        except (OSError, SafetensorError) as error:
            raise OSError(f"{self.name}: cannot be read from {self.file}: {error}") from error


class OffloadedLinear4bit(nn.Module):
    """A :class:`~bnb_core.nn.GroupedLinear4bit` whose weights are read from safetensors files when rows need them.

    The result is the same to the bit. Its forward reads on the host which groups have rows. While a product of it is
    computed, a thread reads what the layer of :meth:`read_ahead_for` is expected to need: the same groups, where it is
    another projection of the same experts; otherwise the groups that it used for its previous batch.

    Args:
        source: the layer whose place it takes; its weight may be on meta.
        name: of the layer in the files.
        files: by key, the file that holds it.
        cache: of all layers.

    Raises:
        ValueError: an entry is missing, or does not fit the layer, by its key.
    """

    def __init__(self, source: GroupedLinear4bit, name: str, files: dict[str, Path], cache: ExpertCache) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = source.groups, source.in_features, source.out_features
        self.transposed, self.compute_dtype, self.bias = source.transposed, source.compute_dtype, source.bias
        key = f"{name}.weight"
        if key not in files:
            raise ValueError(f"{key}: no file has it; give the folder with the weights of this model")
        self._codes = _Codes(key, files[key], self.groups, self.in_features * self.out_features // 2)
        self._following: _Codes | None = None
        self._cache = cache
        state = _read_state(key, files)
        if tuple(state.shape) != source._weight_shape():  # type: ignore[arg-type]
            raise ValueError(f"{name}.weight: expected shape {source._weight_shape()}, got {tuple(state.shape)}")  # type: ignore[arg-type]
        self._state = _splittable(state, self.groups)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As of GroupedLinear4bit.

        Raises:
            OSError: codes cannot be read, by their key.
        """
        check_float("x", x)
        borders = offsets.tolist()
        used = [e for e in range(self.groups) if borders[e] != borders[e + 1]]
        if not used:
            return x.new_zeros(x.shape[0], self.out_features)
        self._codes.used = sorted(used, key=lambda e: borders[e] - borders[e + 1])
        at_once = max(1, self._cache.limit // self._codes.bytes_of_group)
        parts = [
            self._product(x[borders[some[0]] : borders[some[-1] + 1]], some, borders)
            for some in (used[i : i + at_once] for i in range(0, len(used), at_once))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_ahead_for(self, other: OffloadedLinear4bit) -> None:
        """Say which layer is called after this one."""
        self._following = other._codes

    def _read_ahead(self, needed: list[int]) -> None:
        """What the next layer is expected to need, beside these groups of this one."""
        following, used = self._following, self._codes.used
        if following is None:
            return
        guessed = not following.belong_with(self._codes)
        keys = following.keys(sorted(following.used[: len(used)] if guessed else used))
        read = partial(following.read, guessed=guessed)
        self._cache.read_ahead(keys, following.bytes_of_group, read, self._codes.keys(needed))

    def _product(self, x: Tensor, groups: list[int], borders: list[int]) -> Tensor:
        kept = self._cache.get(self._codes.keys(groups), self._codes.read)
        if groups[-1] == max(self._codes.used):
            self._read_ahead(groups)
        packed = torch.cat(kept)
        offsets = [borders[e] - borders[groups[0]] for e in groups] + [borders[groups[-1] + 1] - borders[groups[0]]]
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias[groups].to(dtype)
        result = grouped_linear_4bit(
            x.to(dtype), packed, self._state_of(groups, x.device),
            torch.tensor(offsets, dtype=torch.int32, device=x.device), bias, self.transposed,
        )  # fmt: skip
        return result.to(x.dtype)

    def _state_of(self, groups: list[int], device: torch.device) -> QuantState:
        """The state of these groups' weights side by side."""
        state = self._state
        absmax = _rows(state.absmax, self.groups, groups)
        state2, offset = None, None
        if state.nested:
            nested: Any = state.state2
            of_scales = _rows(nested.absmax, self.groups, groups)
            state2 = QuantState(of_scales, None, nested.code, nested.blocksize, dtype=nested.dtype)
            offset = state.offset
        shape = torch.Size((len(groups), *tuple(state.shape)[1:]))  # type: ignore[arg-type]
        return QuantState(absmax, shape, state.code, state.blocksize, state.quant_type, state.dtype, offset, state2).to(
            device
        )

    def extra_repr(self) -> str:
        return f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}"


def _read_state(key: str, files: dict[str, Path]) -> QuantState:
    """The quant state of a weight, of what stands beside it."""
    parts = {}
    for name, file in files.items():
        if name.startswith(f"{key}."):
            with safe_open(file, framework="pt") as opened:
                parts[name] = opened.get_tensor(name).clone()
    try:
        return QuantState.from_dict(parts, "cpu")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _splittable(state: QuantState, groups: int) -> QuantState:
    """Decoded scales where a block of double-quantized ones reaches into two groups."""
    nested: Any = state.state2
    if nested is None or state.absmax.numel() // groups % nested.blocksize == 0:
        return state
    absmax = functional.dequantize_absmax(state)
    return QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)


def _rows(values: Tensor, rows: int, some: list[int]) -> Tensor:
    return values.view(rows, -1)[some].reshape(-1)


def offload_experts(
    model: nn.Module, path: Path | str, limit: int, device: torch.device | str = "cpu", read_ahead: bool = True
) -> ExpertCache:
    """Leave the experts of a quantized model in files, in place.

    Args:
        model: as :func:`bnb_core.quantize_model` or ``from_pretrained`` makes it; it may be on meta.
        path: a safetensors file with the experts' entries, by their names in the model, or a folder of such.
        limit: how many bytes of experts are kept on the device, for all layers together.
        device: where the rest of the model is.
        read_ahead: while a layer computes, a thread reads what the next one is expected to need, within the limit. It
            wants a core of its own; False where other programs or the products themselves keep all of them busy.

    Returns:
        The cache, which counts.

    Raises:
        ValueError: no experts, no such file, or an entry that is missing or malformed.
    """
    files = _files_by_key(Path(path))
    cache = ExpertCache(limit, device)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, GroupedLinear4bit) and name]
    if not layers:
        raise ValueError("model: expected one with quantized experts, got none")
    offloaded = [(name, OffloadedLinear4bit(layer, name, files, cache)) for name, layer in layers]
    for (_, layer), (_, following) in pairwise([*offloaded, offloaded[0]] if read_ahead else []):
        layer.read_ahead_for(following)
    for name, layer in offloaded:
        model.set_submodule(name, layer)
    return cache


def _files_by_key(path: Path) -> dict[str, Path]:
    found = {}
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths or not all(file.exists() for file in paths):
        raise ValueError(f"path: no safetensors file at {path}; give such a file, or a folder with some")
    for file in paths:
        with safe_open(file, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found

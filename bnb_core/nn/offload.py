"""Experts that stay in files: those that a batch needs are read, and kept on the device for a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bnb_core import functional
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.checks import check_float
from bnb_core.nn.experts import GroupedLinear4bit
from bnb_core.quant_state import QuantState


class ExpertCache:
    """Weights of experts on a device, up to a number of bytes; those used longest ago leave first.

    Args:
        limit: bytes.
        device: where the products are computed.

    ``bytes`` says how many it holds, ``hits`` and ``misses`` how often an expert was there or had to be read.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"limit: expected a positive number of bytes, got {limit!r}")
        self.limit, self.device = limit, torch.device(device)
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Any, tuple[Tensor, ...]] = OrderedDict()

    def get(self, keys: Sequence[Any], read: Callable[[list[Any]], Iterable[tuple[Tensor, ...]]]) -> list[Any]:
        """What belongs to these keys; those that are not there are read in one call.

        They are all given, even where they are more than the limit; then not all of them are kept.
        """
        missing = [key for key in keys if key not in self._kept]
        self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
        found = {key: self._kept[key] for key in keys if key in self._kept}
        for key in found:
            self._kept.move_to_end(key)
        if missing:
            for key, tensors in zip(missing, read(missing), strict=True):
                found[key] = tensors
                self._keep(key, tensors)
        return [found[key] for key in keys]

    def _keep(self, key: Any, tensors: tuple[Tensor, ...]) -> None:
        size = _size(tensors)
        while self._kept and self.bytes + size > self.limit:
            _, left = self._kept.popitem(last=False)
            self.bytes -= _size(left)
        if size <= self.limit:
            self._kept[key] = tensors
            self.bytes += size


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class OffloadedLinear4bit(nn.Module):
    """A :class:`~bnb_core.nn.GroupedLinear4bit` whose weights are read from safetensors files when rows need them.

    The result is the same to the bit. Its forward reads on the host which groups have rows.

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
        self._name, self._cache = name, cache
        self._files = {key: file for key, file in files.items() if key.startswith(f"{name}.weight")}
        if f"{name}.weight" not in self._files:
            raise ValueError(f"{name}.weight: no file has it; give the folder with the weights of this model")
        state = self._read_state()
        if tuple(state.shape) != source._weight_shape():  # type: ignore[arg-type]
            raise ValueError(f"{name}.weight: expected shape {source._weight_shape()}, got {tuple(state.shape)}")  # type: ignore[arg-type]
        self._state = _splittable(state, self.groups)

    def _read_state(self) -> QuantState:
        key = f"{self._name}.weight"
        parts = {}
        for name, file in self._files.items():
            if name != key:
                with safe_open(file, framework="pt") as opened:
                    parts[name] = opened.get_tensor(name).clone()
        try:
            return QuantState.from_dict(parts, "cpu")
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def _read(self, keys: list[tuple[int, int]]) -> Iterable[tuple[Tensor, ...]]:
        """The packed codes of groups. A file is mapped while it is read, no longer."""
        key = f"{self._name}.weight"
        with ExitStack() as stack:
            codes = stack.enter_context(safe_open(self._files[key], framework="pt")).get_slice(key)
            rows = codes.get_shape()[0] // self.groups
            for _, e in keys:
                yield (codes[e * rows : (e + 1) * rows].to(self._cache.device, copy=True),)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As of GroupedLinear4bit."""
        check_float("x", x)
        borders = offsets.tolist()
        used = [e for e in range(self.groups) if borders[e] != borders[e + 1]]
        if not used:
            return x.new_zeros(x.shape[0], self.out_features)
        at_once = max(1, self._cache.limit // self._bytes_of_group())
        parts = [
            self._product(x[borders[some[0]] : borders[some[-1] + 1]], some, borders)
            for some in (used[i : i + at_once] for i in range(0, len(used), at_once))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bytes_of_group(self) -> int:
        return self.in_features * self.out_features // 2

    def _product(self, x: Tensor, groups: list[int], borders: list[int]) -> Tensor:
        kept = self._cache.get([(id(self), e) for e in groups], self._read)
        packed = torch.cat([codes for (codes,) in kept])
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


def _splittable(state: QuantState, groups: int) -> QuantState:
    """Decoded scales where a block of double-quantized ones reaches into two groups."""
    nested: Any = state.state2
    if nested is None or state.absmax.numel() // groups % nested.blocksize == 0:
        return state
    absmax = functional.dequantize_absmax(state)
    return QuantState(absmax, state.shape, state.code, state.blocksize, state.quant_type, state.dtype)


def _rows(values: Tensor, rows: int, some: list[int]) -> Tensor:
    return values.view(rows, -1)[some].reshape(-1)


def offload_experts(model: nn.Module, path: Path | str, limit: int, device: torch.device | str = "cpu") -> ExpertCache:
    """Leave the experts of a quantized model in files, in place.

    Args:
        model: as :func:`bnb_core.quantize_model` or ``from_pretrained`` makes it; it may be on meta.
        path: a safetensors file with the experts' entries, by their names in the model, or a folder of such.
        limit: how many bytes of experts are kept on the device, for all layers together.
        device: where the rest of the model is.

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

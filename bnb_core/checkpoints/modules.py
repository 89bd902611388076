"""A module with quantized layers as a folder, and back."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bnb_core.checkpoints.config_json import quantization_config
from bnb_core.checkpoints.folder import CONFIG, INDEX, QUANTIZATION, WEIGHTS, CheckpointFolder, open_checkpoint
from bnb_core.checkpoints.headers import DTYPES as STORED_DTYPES
from bnb_core.checkpoints.headers import NAMES, CheckpointFileError
from bnb_core.checkpoints.partial import partial_folder
from bnb_core.checkpoints.weights import StoredWeight, weights_of
from bnb_core.checks import QUANT_STORAGES, as_device, check_whole
from bnb_core.nn import Embedding4bit, Embedding8bit, GroupedLinear4bit, Linear4bit, Linear8bitLt, load_state_dict
from bnb_core.nn.fused_experts import quantized_experts
from bnb_core.nn.parametrize import replace_parameter_4bit_prequantized
from bnb_core.quant_state import DTYPES
from bnb_core.quantize import QuantizationConfig
from bnb_core.version import __version__

MOST_SHARD_BYTES = 5 * 10**9


def save_quantized(model: nn.Module, path: str | os.PathLike[str], max_shard_bytes: int = MOST_SHARD_BYTES) -> None:
    """Save any module, its quantized layers as they are, as a folder of safetensors files with a config.json.

    :func:`load_quantized` reads it. Of a Transformers model Transformers reads it, too.

    Args:
        model: with quantized layers or without; tensors that modules share are written once.
        path: the new folder; nothing is there before all of it is.
        max_shard_bytes: how large a file may get, unless one tensor is larger.

    Raises:
        CheckpointFileError: a ValueError: ``path`` exists.
        TypeError, ValueError: no module, or a tensor on meta, which has no data.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_whole("max_shard_bytes", max_shard_bytes, minimum=1)
    state = _unshared(model.state_dict())
    shards = list(_shards(state, max_shard_bytes))
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    with partial_folder(Path(path)) as partial:
        partial.begin({"bnb_core": __version__, "save_quantized": True})
        shutil.rmtree(partial.checkpoint)
        partial.checkpoint.mkdir()
        for name, keys in zip(names, shards, strict=True):
            tensors = {key: state[key].detach().cpu().contiguous() for key in keys}
            save_file(tensors, partial.checkpoint / name, {"format": "pt"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
                "weight_map": {key: name for name, keys in zip(names, shards, strict=True) for key in keys},
            }
            (partial.checkpoint / f"model{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
        (partial.checkpoint / CONFIG).write_text(json.dumps(_config_of(model), indent=2) + "\n")
        partial.finish()


def _unshared(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, each once; views of one memory count as different ones."""
    seen: set[tuple[Any, ...]] = set()
    result = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key}: expected a tensor in the state dict, got {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"{key}: is on the meta device and has no data; load or initialize it first")
        identity = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride())
        if value.numel() and identity in seen:
            continue
        seen.add((*identity,))
        result[key] = value.clone() if type(value) is not Tensor else value
    return result


def _shards(state: Mapping[str, Tensor], most: int) -> Iterator[list[str]]:
    keys: list[str] = []
    size = 0
    for key, tensor in state.items():
        if keys and size + tensor.nbytes > most:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    yield keys


def _config_of(model: nn.Module) -> dict[str, Any]:
    """What the model says of itself, as Transformers' do, and how its layers are quantized."""
    config: Any = getattr(model, "config", None)
    content = config.to_dict() if hasattr(config, "to_dict") else {}
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt)) and _is_codes(m)}
    if quantized:
        skipped = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        content[QUANTIZATION] = quantization_config(_config_of_layer(next(iter(quantized.values()))), skipped)
    return json.loads(json.dumps(content, default=str))


def _is_codes(layer: nn.Module) -> bool:
    return layer._is_quantized()  # type: ignore[operator]


def _config_of_layer(layer: Linear4bit | Linear8bitLt) -> QuantizationConfig:
    if isinstance(layer, Linear8bitLt):
        return QuantizationConfig("int8", threshold=layer.state.threshold)
    weight: Any = layer.weight
    state, compute_dtype = weight.quant_state, layer.compute_dtype
    assert not isinstance(compute_dtype, (Tensor, nn.Module))
    return QuantizationConfig(state.quant_type, state.nested, state.blocksize, compute_dtype, weight.dtype)


def load_quantized(
    path: str | os.PathLike[str], model: nn.Module | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a quantized folder, from :func:`save_quantized`, ``bnb-core quantize`` or Transformers.

    Args:
        path: the folder, or one safetensors file.
        model: a module as it is before it is quantized; it may be on meta, where it takes no memory. Its linear layers
            and embeddings become quantized ones where the folder holds codes, in place. None for a folder of
            Transformers, whose config.json says which class it is; Transformers then loads it.
        device: where the weights go.

    Returns:
        The model.

    Raises:
        CheckpointFileError: a ValueError: malformed files, no such layer in the model, no config.json for None.
        ValueError, RuntimeError: entries that the model does not have, or the reverse; buffers that are left on meta.
        ImportError: None is given for the model, and Transformers is not installed.
    """
    place = as_device("device", device)
    folder = open_checkpoint(Path(path))
    if model is None:
        return _from_transformers(folder, place)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module or None, got {type(model).__name__}")
    quantization = folder.quantization or {}
    state = {key: value for name in folder.shards for key, value in load_file(folder.path / name).items()}
    others = {}
    weights = weights_of(folder)
    _replace_experts(model, weights)
    for weight in weights:
        if weight.is_quantized and not _replace_layer(model, weight, quantization):
            others[weight.name] = {part.name: state.pop(part.name) for part in weight.parts}
            _make_room(model, weight)
    tied = _tie(model, state)
    load_state_dict(model, state, strict=True, assign=True)
    for name, first in tied.items():
        _set_parameter(model, name, model.get_parameter(first))
    for name, parts in others.items():
        owner, _, parameter = name.rpartition(".")
        replace_parameter_4bit_prequantized(model.get_submodule(owner), parameter, parts, place)
    _check_off_meta(model)
    return model.to(place)


def _replace_layer(model: nn.Module, weight: StoredWeight, quantization: Mapping[str, Any]) -> bool:
    """Put a quantized layer in the place of a plain one; False where the weight is not such a layer's."""
    name, dot, last = weight.name.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise CheckpointFileError(
            f"{weight.tensor.file}: {weight.name}: the model has no module {name!r}"
            "; give the model that the folder was made of"
        ) from None
    if isinstance(layer, GroupedLinear4bit) and last == "weight":
        return True
    if last != "weight" or not dot or not isinstance(layer, (nn.Linear, nn.Embedding)):
        return False
    if not isinstance(layer, (Linear4bit, Linear8bitLt, Embedding4bit, Embedding8bit)):
        new = _quantized_layer(layer, weight, quantization).train(layer.training)
        if isinstance(layer, nn.Linear):
            new.bias = layer.bias
        model.set_submodule(name, new)
    return True


def _replace_experts(model: nn.Module, weights: Sequence[StoredWeight]) -> None:
    """Put quantized experts in the places of modules that have parameters of these names, on meta."""
    modules = dict(model.named_modules())
    for weight in weights:
        name = weight.name.removesuffix(".weight")
        owner = next((owner for owner in (name, name.rpartition(".")[0]) if owner in modules), None)
        if len(weight.shape) == 3 and weight.state is not None and owner is not None:
            nested = "nested_blocksize" in weight.state
            options = {"compress_statistics": nested, "quant_type": weight.format}
            experts = quantized_experts(modules[owner].to("meta"), **options)
            if experts is not None:
                model.set_submodule(owner, experts)
                modules = dict(model.named_modules())


def _quantized_layer(layer: nn.Linear | nn.Embedding, weight: StoredWeight, quantization: Mapping[str, Any]) -> Any:
    storage = next((dtype for dtype in QUANT_STORAGES if weight.tensor.dtype == NAMES[dtype]), torch.uint8)
    if isinstance(layer, nn.Embedding):
        size, dtype = (layer.num_embeddings, layer.embedding_dim), layer.weight.dtype
        if weight.format == "int8":
            return Embedding8bit(*size, device="meta", dtype=dtype)
        return Embedding4bit(*size, dtype, weight.format, storage, device="meta")
    options = (layer.in_features, layer.out_features, layer.bias is not None)
    if weight.format == "int8":
        threshold = float(quantization.get("llm_int8_threshold", 6.0))
        return Linear8bitLt(*options, has_fp16_weights=False, threshold=threshold, device="meta")
    nested = "nested_blocksize" in (weight.state or {})
    compute_dtype = DTYPES.get(str(quantization.get("bnb_4bit_compute_dtype", quantization.get("compute_dtype"))))
    return Linear4bit(*options, compute_dtype, nested, weight.format, storage, device="meta")


def _make_room(model: nn.Module, weight: StoredWeight) -> None:
    """A parameter of the shape of the packed codes, for what is no layer's weight, such as fused experts."""
    owner, _, name = weight.name.rpartition(".")
    module = model.get_submodule(owner)
    if weight.state is None or not isinstance(module._parameters.get(name), nn.Parameter):
        raise CheckpointFileError(
            f"{weight.tensor.file}: {weight.name}: the model has no parameter for these codes"
            "; give the model that the folder was made of"
        )
    empty = torch.empty(weight.tensor.shape, dtype=STORED_DTYPES[weight.tensor.dtype], device="meta")
    module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _tie(model: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """Fill in what the files hold once though modules share it; gives which parameter is which other one."""
    first: dict[nn.Parameter, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first and name not in state and first[parameter] in state:
            state[name] = state[first[parameter]]
            tied[name] = first[parameter]
        elif name in state:
            first.setdefault(parameter, name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in state and parameter in first:  # the one that is missing comes before the one that is there
            state[name] = state[first[parameter]]
            tied[name] = first[parameter]
    return tied


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def _check_off_meta(model: nn.Module) -> None:
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(
            f"model: {', '.join(left[:5])}: on meta, and not in the checkpoint; make the model on a device, such as cpu"
        )


def _from_transformers(folder: CheckpointFolder, device: torch.device) -> nn.Module:
    """As ``from_pretrained`` of the class that config.json names."""
    architectures = (folder.config or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointFileError(f"{folder.path}: its config.json names no architecture; give the model")
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("load_quantized without a model needs Transformers: pip install transformers accelerate")
    from bnb_core.compat import install_as_bitsandbytes

    if importlib.util.find_spec("bitsandbytes") is None:
        install_as_bitsandbytes()
    import transformers

    found = getattr(transformers, str(architectures[0]), None)
    if found is None:
        raise CheckpointFileError(
            f"{folder.path}: Transformers {transformers.__version__} has no {architectures[0]}"
            "; update it, or give the model"
        )
    return found.from_pretrained(folder.path, dtype="auto", device_map={"": device})

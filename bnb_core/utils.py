"""Helpers around models: replacing layers, finding outliers."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.checks import check_dense, check_dimensions, check_flag, check_number, check_tensor, check_whole, shown
from bnb_core.serialization import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "OutlierTracer",
    "find_outlier_dims",
    "pack_dict_to_tensor",
    "replace_linear",
    "sync_gpu",
    "unpack_tensor_to_dict",
]

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    skip_modules: Collection[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replace every nn.Linear below ``model``, in place.

    Args:
        linear_replacement: called with in_features, out_features and whether there is a bias.
        skip_modules: names of layers (the last part of their path) that stay.
        copy_weights: the new layers take the old ones' weight and bias; otherwise they keep their own.
        post_processing_function: the name of a method of the replaced layer to call afterwards.

    Returns:
        The model.

    Raises:
        TypeError: an argument that is not as above, by its name.
    """
    _check_module("model", model)
    if not callable(linear_replacement):
        raise TypeError(f"linear_replacement: expected a class of layers, got {shown(linear_replacement)}")
    if isinstance(skip_modules, Tensor | bytes) or not isinstance(skip_modules, Collection):
        raise TypeError(f"skip_modules: expected names of layers, got {shown(skip_modules)}")
    check_flag("copy_weights", copy_weights)
    if not isinstance(post_processing_function, str | None):
        raise TypeError(f"post_processing_function: expected a name or None, got {shown(post_processing_function)}")
    for name, module in model.named_children():
        if isinstance(module, nn.Linear) and name not in skip_modules:
            replacement = linear_replacement(module.in_features, module.out_features, module.bias is not None)
            if copy_weights:
                with torch.no_grad():
                    replacement.weight.data = module.weight.data.clone()
                    if module.bias is not None:
                        replacement.bias.data = module.bias.data.clone()
            setattr(model, name, replacement)
            if post_processing_function is not None:
                method = getattr(module, post_processing_function, None)
                if method is not None:
                    method()
        else:
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
    return model


def _check_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {shown(value)}")


def _zscores(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std()


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """The dimensions of a weight whose values are unusually large (LLM.int8(), appendix D).

    Args:
        weight: [N, K].
        reduction_dim: the dimension that is reduced; the indices are into the other one.
        zscore: how many standard deviations above the mean the standard deviation of a dimension must lie.
        topk: return this many of the largest instead.
        rdm: return as many random dimensions as there are outliers, for comparison.

    Returns:
        i64, ascending unless ``topk`` is given.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_dense("weight", weight)
    check_dimensions("weight", weight, 2)
    if weight.is_meta or weight.is_complex():
        raise ValueError(f"weight: expected real values, got {weight.dtype} on {weight.device}")
    check_whole("reduction_dim", reduction_dim, minimum=-2, maximum=1)
    check_number("zscore", zscore)
    check_flag("rdm", rdm)
    spread = weight.float().std(dim=reduction_dim)
    if topk is not None:
        check_whole("topk", topk, maximum=spread.numel())
        return spread.topk(topk).indices
    outliers = (_zscores(spread) > zscore).nonzero().view(-1)
    if rdm:
        sample = sorted(random.sample(range(spread.numel()), outliers.numel()))
        return torch.tensor(sample, dtype=torch.int64, device=weight.device)
    return outliers


class OutlierTracer:
    """Finds the outlier dimensions of each linear layer's input, from the weights of the layers that feed it.

    ``OutlierTracer.get_instance().initialize(model)`` adds hooks; after one forward, :meth:`get_outliers` answers.
    """

    _instance: OutlierTracer | None = None

    def __init__(self) -> None:
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        self.hooks: list[Any] = []
        self.last_w: Tensor | None = None

    @classmethod
    def get_instance(cls) -> OutlierTracer:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def is_initialized(self) -> bool:
        return bool(self.hooks)

    @property
    def initialized(self) -> bool:
        return self.is_initialized()

    @property
    def hvalues(self) -> list[int]:
        """What :meth:`get_hvalue` gives for those weights whose layers have been traced, in their order."""
        return list(self.hvalue2outlier_idx)

    @property
    def outliers(self) -> list[Tensor]:
        """The outlier dimensions of their inputs, in the same order."""
        return list(self.hvalue2outlier_idx.values())

    def initialize(self, model: nn.Module) -> None:
        """Watch the forward of every nn.Linear of the model."""
        _check_module("model", model)
        self.remove()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                self.hooks.append(module.register_forward_pre_hook(self.trace))

    def remove(self) -> None:
        """Take the hooks away and forget what was found."""
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.hvalue2outlier_idx, self.last_w = [], {}, None

    def get_hvalue(self, weight: Tensor) -> int:
        """What stands for a weight: the address of its data."""
        check_dense("weight", weight)
        return weight.data_ptr()

    def trace(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook before the forward of a layer: the one before it tells where its input has outliers."""
        weight: Any = module.weight
        if self.last_w is not None and self.last_w.shape[0] == weight.shape[1]:
            self.hvalue2outlier_idx[self.get_hvalue(weight)] = find_outlier_dims(self.last_w, reduction_dim=1)
        self.last_w = weight.data

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier dimensions of the input of the layer with this weight, i64; None if none were traced.

        Raises:
            RuntimeError: :meth:`initialize` has not been called.
        """
        if not self.is_initialized():
            raise RuntimeError("OutlierTracer watches no model yet: call initialize(model) first")
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


def sync_gpu(t: Tensor) -> None:
    """Wait until the device of the tensor ``t`` has done what was asked of it; CPU and meta always have."""
    check_tensor("t", t)
    if t.device.type not in ("cpu", "meta"):
        torch.get_device_module(t.device).synchronize(t.device)

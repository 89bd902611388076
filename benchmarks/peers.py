"""Other people's implementations of the same work, by their public API; those that are not installed are absent."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from limits import ROTATED_BYTES
from measure import Contender, rotating

BITSANDBYTES = "bitsandbytes"
TORCHAO = "torchao, compiled"
TORCH = "torch"


def _import(name: str) -> ModuleType | None:
    """A peer's module without its greetings, or None."""
    for noisy in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ImportError):
        return import_module(name)
    return None


bitsandbytes = _import("bitsandbytes")
_torchao = _import("torchao.quantization")


def linear_4bit(N: int, K: int, x: torch.Tensor, quant_type: str, nested: bool, rotated: bool) -> dict[str, Contender]:
    """bitsandbytes' layer, in evaluation mode, where it repacks the weight for its CPU kernel."""
    if bitsandbytes is None:
        return {}
    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, compute_dtype=x.dtype, compress_statistics=nested, quant_type=quant_type
    )
    layer = layer.to("cpu").eval()
    with torch.no_grad():
        layer(x)
    copies = ROTATED_BYTES // (N * K // 2) + 1 if rotated else 1
    layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
    return {BITSANDBYTES: Contender(rotating(lambda each: each(x), layers))}


def linear_int8(N: int, K: int, x: torch.Tensor, threshold: float) -> dict[str, Contender]:
    """bitsandbytes' LLM.int8() layer, and torchao's dynamic int8 one through torch.compile (threshold 0 only)."""
    found = {}
    if bitsandbytes is not None:
        layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
        found[BITSANDBYTES] = Contender(lambda: layer(x))
    if _torchao is not None and threshold == 0:
        module = torch.nn.Linear(K, N).to(x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _torchao.quantize_(module, _torchao.Int8DynamicActivationInt8WeightConfig())
        compiled = torch.compile(module)
        found[TORCHAO] = Contender(lambda: compiled(x))
    return found


def function(name: str, *arguments: Any, **keywords: Any) -> dict[str, Contender]:
    """A function of bitsandbytes.functional."""
    if bitsandbytes is None:
        return {}
    called = getattr(bitsandbytes.functional, name)
    return {BITSANDBYTES: Contender(lambda: called(*arguments, **keywords))}


def optimizer(name: str, keywords: dict[str, Any], make: Callable[[], torch.nn.Parameter]) -> dict[str, Contender]:
    """A step of an optimizer of bitsandbytes.optim on a parameter of its own."""
    if bitsandbytes is None:
        return {}
    return {BITSANDBYTES: Contender(step_of(getattr(bitsandbytes.optim, name), keywords, make()))}


def step_of(cls: Any, keywords: dict[str, Any], parameter: torch.nn.Parameter) -> Callable[[], Any]:
    return cls([parameter], lr=1e-4, **keywords).step


def versions(names: Sequence[str] = ("bitsandbytes", "torchao", "torch")) -> dict[str, str]:
    """What is installed of them."""
    from bnb_core.cli.info import version_of

    return {name: version_of(name) for name in names}

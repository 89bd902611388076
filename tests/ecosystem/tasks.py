"""What is done alike with bnb_core, in the tests' process, and with the real bitsandbytes, in the peer's.

Every task takes and gives what JSON holds; tensors go through files.
"""

from __future__ import annotations

from typing import Any

import torch
from ecosystem import models


def version() -> str:
    import bitsandbytes

    return bitsandbytes.__version__


def compare_with_bnb_core() -> dict[str, Any]:
    """What bnb_core says and computes in the process of the real one, both under their own names."""
    import bitsandbytes

    import bnb_core

    try:
        bnb_core.install_as_bitsandbytes()
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    ours, our_state = bnb_core.functional.quantize_4bit(weight, quant_type="nf4")
    values = bitsandbytes.functional.dequantize_4bit(theirs, state)
    same = torch.equal(ours, theirs) and torch.equal(bnb_core.functional.dequantize_4bit(ours, our_state), values)
    return {"version": bitsandbytes.__version__, "refused": refused, "same": same}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Packed codes that are viewed as bf16 may be NaN, which equals nothing."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def quantize(name: str, source: str, quantization: str, target: str) -> None:
    """Save a model of full precision as a quantized one."""
    models.load(name, source, quantization).save_pretrained(target)


def run(name: str, source: str, result: str, quantization: str | None = None) -> list[int]:
    """What a model generates; the logits of its prompt and of each step, and where it decides, go into a file."""
    model = models.load(name, source, quantization)
    with models.calls_recorded({**models.routers(model), **models.int8_layers(model)}) as calls:
        logits = models.logits(name, model)
        tokens, steps = models.generate(model)
    torch.save({"logits": logits, "steps": steps, "calls": calls}, result)
    return tokens


def save_module(module: str, target: str) -> None:
    """The state dict of a quantized module, its input and its output."""
    torch.manual_seed(0)
    layer = _MODULES[module]().to("cpu")
    x = _input_of(layer)
    torch.save({"state": layer.state_dict(), "input": x, "output": layer(x).detach()}, target)


def load_module(module: str, source: str, target: str) -> None:
    """The output of a module loaded from such a file, and what it saves in turn."""
    saved = torch.load(source)
    torch.manual_seed(1)
    layer = _load(_MODULES[module]().to("cpu"), saved["state"])
    torch.save({"state": layer.state_dict(), "output": layer(saved["input"]).detach()}, target)


def _load(layer: torch.nn.Module, state: dict[str, Any]) -> torch.nn.Module:
    """As Transformers does: the real Linear4bit has no loading of its own, nor have its quantized parameters."""
    import bitsandbytes

    if isinstance(layer, Experts):
        return Experts().load_quantized(state)
    if not isinstance(layer, bitsandbytes.nn.Linear4bit):
        layer.load_state_dict(state)
        return layer
    parts = {key: value for key, value in state.items() if key.startswith("weight.")}
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        data=state["weight"], quantized_stats=parts, requires_grad=False, device="cpu", module=layer
    )
    if layer.bias is not None:
        layer.bias.data.copy_(state["bias"])
    return layer


def parameter_to_optimize(largest: float) -> torch.Tensor:
    return torch.linspace(-largest, largest, 64 * 128).view(64, 128)


def gradient(step: int) -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(step))


def optimize(optimizer: str, options: dict[str, Any], start: str | None, target: str, largest: float = 2.0) -> None:
    """Five steps, from the beginning or from where a file left off; the state and the parameter go into a file.

    Args:
        largest: the parameter's largest entry at the beginning. With 2.0 its norm exceeds that of any update, so that
            LAMB does not limit it.
    """
    import bitsandbytes

    saved = torch.load(start) if start else {"parameter": parameter_to_optimize(largest), "step": 0}
    parameter = torch.nn.Parameter(saved["parameter"].clone())
    run = getattr(bitsandbytes.optim, optimizer)([parameter], **options)
    if start:
        run.load_state_dict(saved["optimizer"])
    for step in range(saved["step"], saved["step"] + 5):
        parameter.grad = gradient(step)
        run.step()
    state = {"parameter": parameter.detach(), "step": saved["step"] + 5, "optimizer": run.state_dict()}
    torch.save(state, target)


class Experts(torch.nn.Module):
    """Experts in one parameter of three dimensions, which is quantized in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = torch.nn.Parameter(torch.randn(4, 64, 128))

    def quantize(self) -> Experts:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        replace_parameter_4bit(self, "down_proj", compress_statistics=True)
        return self

    def load_quantized(self, state: dict[str, Any]) -> Experts:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

        self.down_proj = torch.nn.Parameter(state["down_proj"], requires_grad=False)
        parts = {key.removeprefix("down_proj."): value for key, value in state.items() if "." in key}
        replace_parameter_4bit_prequantized(self, "down_proj", parts, "cpu")
        return self

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down_proj[:, rows]


def _linear4bit(quant_type: str, **options: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.nn.Linear4bit(128, 64, quant_type=quant_type, compute_dtype=torch.float32, **options)


def _linear8bit() -> Any:
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)


def _embedding(name: str) -> Any:
    import bitsandbytes

    return getattr(bitsandbytes.nn, name)(128, 64)


_MODULES: dict[str, Any] = {
    "Linear4bit nf4": lambda: _linear4bit("nf4"),
    "Linear4bit fp4": lambda: _linear4bit("fp4", compress_statistics=False, bias=False),
    "Linear4bit nf4 bf16 storage": lambda: _linear4bit("nf4", quant_storage=torch.bfloat16),
    "Linear8bitLt": _linear8bit,
    "fused experts": lambda: Experts().quantize(),
    "StableEmbedding": lambda: _embedding("StableEmbedding"),
}
MODULES = tuple(_MODULES)


def _input_of(layer: torch.nn.Module) -> torch.Tensor:
    if isinstance(layer, torch.nn.Embedding):
        return torch.arange(0, 128, 5)
    if isinstance(layer, Experts):
        return torch.arange(0, 64, 5)
    return torch.randn(5, 128)

"""parallelize_module on quantized linear layers: by outputs and by inputs, whole blocks to each process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bnb_core.conformance.compare import same_bits
from bnb_core.nn import EmbeddingNF4, Linear4bit, Linear8bitLt

KINDS: dict[str, dict[str, Any]] = {
    "double-quantized": {},
    "plain": {"compress_statistics": False},
    "bf16 storage": {"quant_storage": torch.bfloat16},
    "8-bit": {"has_fp16_weights": False},
}


class Block(nn.Module):
    def __init__(self, kind: str, width: int = 256, hidden: int = 512) -> None:
        super().__init__()
        layer: Any = Linear8bitLt if kind == "8-bit" else Linear4bit
        self.up, self.down = layer(width, hidden, **KINDS[kind]), layer(hidden, width, **KINDS[kind])
        self.adapter = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(self.adapter(x))))


def _block(kind: str, **sizes: int) -> Block:
    torch.manual_seed(0)
    return Block(kind, **sizes).to("cpu")


def _parallelized(block: Block, *names: str) -> Block:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(block, mesh, {name: plan[name] for name in names or plan})


def _outputs_and_gradients(block: Block) -> list[Tensor]:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    y = block(x)
    y.square().sum().backward()
    gradients = [block.adapter.weight.grad, block.up.bias.grad, block.down.bias.grad]
    return [y.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)]


def _parallel(kind: str) -> tuple[list[Tensor], int, dict[str, Tensor]]:
    block = _parallelized(_block(kind))
    held = block.up.weight.to_local().nbytes + block.down.weight.to_local().nbytes
    state_dict = {key: value for key, value in block.state_dict().items() if "bias" not in key}
    return _outputs_and_gradients(block), held, copy.deepcopy(state_dict)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_cut_layers_compute_what_the_whole_ones_do(kind: str, world_size: int, ranks: Ranks):
    """8-bit inputs are scaled by their part of a row, so that products differ by their rounding to int8."""
    block = _block(kind)
    size = block.up.weight.nbytes + block.down.weight.nbytes
    expected = _outputs_and_gradients(block)
    for results, held, state_dict in ranks.run(world_size, _parallel, kind):
        assert held * world_size == size
        for result, value in zip(results, expected, strict=True):
            tolerance = (3e-2 if kind == "8-bit" else 1e-4) * float(value.abs().max())
            torch.testing.assert_close(result, value, rtol=0, atol=tolerance)
        loaded = _block(kind)
        loaded.load_state_dict(state_dict, strict=False)
        for layer in ("up", "down"):
            same_bits(layer, getattr(loaded, layer).weight.data.view(-1), getattr(block, layer).weight.data.view(-1))
        torch.testing.assert_close(_outputs_and_gradients(loaded)[0], expected[0], rtol=0, atol=0)


def _refused(sizes: dict[str, int], name: str) -> str:
    block = _block("plain", **sizes)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError) as raised:
        _parallelized(block, name)
    for key, value in block.state_dict().items():
        same_bits(key, value, before[key])
    return str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "name", "named"),
    [({"hidden": 96}, "down", "in_features 96"), ({"width": 36, "hidden": 65}, "up", "out_features 65")],
)
def test_a_plan_that_would_cut_blocks_is_refused(sizes: dict[str, int], name: str, named: str, ranks: Ranks):
    for message in ranks.run(2, _refused, sizes, name):
        assert message.startswith(f"weight: {named} over 2 processes would cut blocks of 64")


def _rows_that_share_blocks() -> None:
    block = _block("plain", width=36, hidden=128)
    x = torch.randn(3, 36)
    expected = block(x)
    torch.testing.assert_close(_parallelized(block)(x), expected, rtol=1e-4, atol=1e-5)


def test_rows_that_share_blocks_are_cut_between_blocks(ranks: Ranks):
    ranks.run(2, _rows_that_share_blocks)


def _what_cannot_be_cut() -> list[str]:
    messages = []
    trains = Linear8bitLt(64, 64)
    for layer in (EmbeddingNF4(64, 64), trains):
        with pytest.raises(ValueError) as raised:
            parallelize_module(nn.Sequential(layer).to("cpu"), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
        messages.append(str(raised.value))
    cut = _parallelized(_block("plain"))
    with pytest.raises(RuntimeError) as raised:
        cut.load_state_dict(_block("plain").state_dict(), strict=False)
    return [*messages, str(raised.value)]


def test_a_layer_that_cannot_be_cut_or_loaded_says_so(ranks: Ranks):
    for of_embedding, of_trained, of_loaded in ranks.run(2, _what_cannot_be_cut):
        assert "EmbeddingNF4 cannot be cut by parallelize_module" in of_embedding
        assert "Linear8bitLt cannot be cut by parallelize_module" in of_trained
        assert "this layer has been cut over processes; load the state dict before that" in of_loaded

"""How much memory fine-tuning takes on each rank: adapters on a quantized base that FSDP2 shards layer by layer.

Counted is what the parts of :class:`Memory` say. What an allocator wastes, the library's own context on a device and
the working memory of single operations come on top.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, block_count
from bnb_core.records import NESTED_BLOCKSIZE

F32_BYTES = 4
SMALLEST_8BIT_STATE = 4096


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family: RMS norms, attention with grouped heads, a gated MLP; no biases.

    ``kv_width`` is that of the keys, number of heads times width of a head; ``tied`` says whether the output layer has
    the embedding's weight.
    """

    layers: int
    width: int
    mlp_width: int
    kv_width: int
    vocabulary: int
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's: query, key, value, output; gate, up, down."""
        h, kv, i = self.width, self.kv_width, self.mlp_width
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    @property
    def layer_weights(self) -> int:
        return sum(n * k for n, k in self.linears)

    @property
    def root_weights(self) -> int:
        """The embedding, the output layer and the last norm."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width

    @property
    def weights(self) -> int:
        return self.layers * (self.layer_weights + 2 * self.width) + self.root_weights


KNOWN = {
    "8B": Shape(32, 4096, 14336, 1024, 128256),
    "70B": Shape(80, 8192, 28672, 1024, 128256),
    "405B": Shape(126, 16384, 53248, 1024, 128256),
}
"""Llama 3.1 (arXiv 2407.21783, table 3)."""


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """From a model's config.json.

    Raises:
        ValueError: an entry that is missing or no whole number above 0, by its name.
    """

    def number(key: str, default: Any = None) -> int:
        value = config.get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key}: expected a whole number > 0 in the config, got {value!r}")
        return value

    width, heads = number("hidden_size"), number("num_attention_heads")
    head_width = number("head_dim", width // heads)
    return Shape(
        number("num_hidden_layers"),
        width,
        number("intermediate_size"),
        number("num_key_value_heads", heads) * head_width,
        number("vocab_size"),
        bool(config.get("tie_word_embeddings", False)),
    )


def shape_of_size(weights: float) -> Shape:
    """The widths of the model of :data:`KNOWN` that is next in size, and as many layers as fit.

    Raises:
        ValueError: fewer than 1e9 weights.
    """
    if not weights >= 1e9:
        raise ValueError(f"params: expected at least 1e9 for a shape by size, got {weights:g}; give a config")
    known = min(KNOWN.values(), key=lambda shape: abs(math.log(shape.weights / weights)))
    layers = max(1, round((weights - known.root_weights) / (known.layer_weights + 2 * known.width)))
    return Shape(layers, known.width, known.mlp_width, known.kv_width, known.vocabulary)


@dataclass(frozen=True)
class Settings:
    """How the model is trained."""

    ranks: int = 1
    lora_rank: int = 16
    sequence: int = 4096
    batch: int = 1
    """Sequences in a step of one rank."""
    bits: int = 4
    double_quantization: bool = True
    blocksize: int = 64
    state_bits: int = 8
    """Of an optimizer with two states."""
    dtype_bytes: int = 2
    """Of activations and of the weights that are not quantized; adapters and their gradients are f32."""
    checkpointing: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """Its shard of the codes, and of the embeddings and norms."""
    scales: int
    """Of all weights: each rank has them whole."""
    adapters: int
    gradients: int
    states: int
    activations: int
    """What autograd keeps at most, the loss included."""
    gathered_root: int
    """Embeddings and last norm, which FSDP2 keeps gathered from a forward to its backward; 0 on one rank."""
    gathered_layers: int
    """Of two layers: one at work, the next on its way."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def plan(shape: Shape, settings: Settings) -> Memory:
    """The memory of one rank."""
    ranks = settings.ranks
    codes = [block_count(n * k * settings.bits, 8) for n, k in shape.linears]
    adapters = [numel for n, k in shape.linears for numel in (settings.lora_rank * k, n * settings.lora_rank)]
    norms = 2 * shape.width * settings.dtype_bytes
    root = shape.root_weights * settings.dtype_bytes
    layer_adapters = sum(adapters) * F32_BYTES
    shard_of_layer = sum(block_count(size, ranks) for size in codes) + block_count(norms, ranks)
    trained = shape.layers * sum(block_count(numel, ranks) for numel in adapters) * F32_BYTES
    gathered_layer = sum(codes) + norms + layer_adapters
    return Memory(
        weights=shape.layers * shard_of_layer + block_count(root, ranks),
        scales=shape.layers * sum(_scales(n, n * k, settings) for n, k in shape.linears),
        adapters=trained,
        gradients=trained,
        states=shape.layers * sum(_state(numel, settings) for numel in adapters),
        activations=_activations(shape, settings),
        gathered_root=root if ranks > 1 else 0,
        gathered_layers=2 * gathered_layer if ranks > 1 else 0,
    )


def _scales(rows: int, weights: int, settings: Settings) -> int:
    if settings.bits == 8:
        return rows * F32_BYTES
    blocks = block_count(weights, settings.blocksize)
    codebook = 16 * F32_BYTES
    if not settings.double_quantization:
        return blocks * F32_BYTES + codebook
    return blocks + (block_count(blocks, NESTED_BLOCKSIZE) + 256 + 1) * F32_BYTES + codebook


def _state(numel: int, settings: Settings) -> int:
    """Of this rank's shard; the size of the whole decides on its form."""
    part = block_count(numel, settings.ranks)
    if settings.state_bits == 32 or numel < SMALLEST_8BIT_STATE:
        return 2 * part * F32_BYTES
    return 2 * (part + block_count(part, OPTIMIZER_BLOCKSIZE) * F32_BYTES)


def _activations(shape: Shape, settings: Settings) -> int:
    """Of each token: what a layer keeps for its gradient, or with checkpointing its input; and the logits, twice.

    A layer keeps its input and the sum before the MLP, both norms' results, query, key, value, the attention's result
    as it comes and as it is read, four of the MLP's width, and each adapter's middle; a quantized linear layer keeps no
    activation, as its weight is frozen.
    """
    h, kv, i = shape.width, shape.kv_width, shape.mlp_width
    of_layer = (7 * h + 2 * kv + 4 * i + len(shape.linears) * settings.lora_rank) * settings.dtype_bytes
    of_layer += 2 * F32_BYTES  # the norms' own
    kept = (
        of_layer + (shape.layers - 1) * h * settings.dtype_bytes if settings.checkpointing else shape.layers * of_layer
    )
    of_loss = shape.vocabulary * (settings.dtype_bytes + F32_BYTES)
    return settings.batch * settings.sequence * (kept + of_loss)

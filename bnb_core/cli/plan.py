"""`bnb-core plan`: the memory of each rank in fine-tuning with adapters on a sharded, quantized base."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from bnb_core.plan import Memory, Settings, Shape, plan, shape_of_config, shape_of_size

from .errors import BadInput
from .json_report import json_option, write_json

GIB = 2**30
PARTS = {
    "weights": "codes, embeddings and norms, sharded",
    "scales": "of all weights, on every rank",
    "adapters": "f32, sharded",
    "gradients": "of the adapters, f32, sharded",
    "states": "of the optimizer, sharded",
    "activations": "what autograd keeps at most, the loss included",
    "gathered_root": "embeddings and last norm, gathered",
    "gathered_layers": "one layer at work, the next on its way",
}


@click.command()
@click.option("--params", type=float, help="Number of weights, such as 70e9: a shape like Llama's is taken for it.")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="A model's config.json.")
@click.option("--ranks", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--lora-rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of all linear layers.")
@click.option("--seq", "sequence", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences per rank and step.")
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Of a quantized weight.")
@click.option("--double-quantization/--no-double-quantization", default=True, show_default=True)
@click.option("--state-bits", type=click.Choice(["8", "32"]), default="8", show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--checkpointing/--no-checkpointing", default=True, show_default=True)
@json_option
def command(
    params: float | None,
    config: Path | None,
    dtype: str,
    bits: str,
    state_bits: str,
    json_path: Path | None,
    **others: Any,
) -> None:
    """Print the memory that fine-tuning takes on each rank: FSDP2 by layers, adapters on a quantized base."""
    shape = _shape(params, config)
    dtype_bytes = 2 if dtype == "bfloat16" else 4
    settings = Settings(bits=int(bits), state_bits=int(state_bits), dtype_bytes=dtype_bytes, **others)
    memory = plan(shape, settings)
    _show(shape, settings, memory)
    report = {"shape": asdict(shape), "settings": asdict(settings), "bytes": {**asdict(memory), "total": memory.total}}
    write_json(json_path, report)


def _shape(params: float | None, config: Path | None) -> Shape:
    if (params is None) == (config is None):
        raise BadInput("expected one of --params and --config")
    try:
        if params is not None:
            return shape_of_size(params)
        content = json.loads(config.read_text())  # type: ignore[union-attr]
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
        return shape_of_config(content)
    except (OSError, ValueError) as error:
        raise BadInput(f"--params: {error}" if params is not None else f"--config {config}: {error}") from None


def _show(shape: Shape, settings: Settings, memory: Memory) -> None:
    table = Table(
        "on each rank",
        "GiB",
        "",
        title=f"{shape.weights / 1e9:.2f}e9 weights in {shape.layers} layers on {settings.ranks} ranks",
    )
    for name, explanation in PARTS.items():
        table.add_row(name.replace("_", " "), f"{getattr(memory, name) / GIB:.2f}", explanation)
    table.add_section()
    table.add_row("total", f"{memory.total / GIB:.2f}", "what an allocator and the device's context take comes on top")
    Console().print(table)

"""`bnb-core chat`: talk to a model in a local Transformers folder."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from bnb_core.checkpoints.modules import load_quantized

from .conversion import device_option, refusals_in_one_line, size
from .errors import BadInput
from .json_report import json_option, write_json
from .paths import PathOption

NEEDED = ("transformers", "accelerate")


@click.command()
@click.argument("path", type=PathOption())
@click.option("--prompt", multiple=True, help="Say this and end; may be given again. Default: ask in the terminal.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: always the likeliest."
)
@device_option
@json_option
def command(
    path: Path,
    prompt: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    device: str,
    json_path: Path | None,
) -> None:
    """Talk to the model in the folder PATH, quantized or not: each answer with its tokens/s and the memory.

    The folder has a tokenizer. With a chat template the talk is kept; without one each prompt is continued by itself.
    An empty line ends.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder; give a folder that Transformers has saved")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f"chat needs {', '.join(missing)}: pip install {' '.join(missing)}")
    with refusals_in_one_line():
        model: Any = load_quantized(path, device=torch.device(device))
        tokenizer = _tokenizer(path)
    if not hasattr(model, "generate") or not model.can_generate():
        raise BadInput(f"{path}: a {type(model).__name__} does not write text; give a model that generates")
    click.echo(f"{type(model).__name__}, {size(model.get_memory_footprint())} of weights, on {model.device}", err=True)
    turns = []
    talk: list[dict[str, str]] = []
    for text in prompt or _asked():
        talk = [*talk, {"role": "user", "content": text}] if tokenizer.chat_template else []
        turn = answer(model, tokenizer, talk, text, max_new_tokens, temperature)
        talk.append({"role": "assistant", "content": turn["answer"]})
        turns.append({"prompt": text, **turn})
        click.echo(
            f"[{turn['tokens']} tokens, {turn['tokens_per_second']:.1f} tokens/s, {size(turn['memory'])} in use]",
            err=True,
        )
    write_json(json_path, {"model": type(model).__name__, "weights": model.get_memory_footprint(), "turns": turns})


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: has no tokenizer that Transformers reads: {str(error).splitlines()[0]}") from None


def _asked() -> Iterator[str]:
    """What somebody types, until an empty line or the end of the input."""
    while True:
        try:
            text = click.prompt("you", default="", show_default=False, prompt_suffix="> ")
        except click.Abort:
            return
        if not text.strip():
            return
        yield text


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, talk: list[dict[str, str]], text: str, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    """One answer, printed as it comes; its text, its tokens, how fast they came, and the memory in use in bytes."""
    from transformers import TextStreamer

    if tokenizer.chat_template:
        given = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        given = tokenizer(text, return_tensors="pt")
    ids, mask = (given[name].to(model.device) for name in ("input_ids", "attention_mask"))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.perf_counter()
    generated = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **sampling,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    new = generated[0] if model.config.is_encoder_decoder else generated[0, ids.shape[1] :]
    return {
        "answer": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "memory": memory_in_use(model.device),
    }


def memory_in_use(device: torch.device) -> int:
    """Bytes: of a GPU what torch has allocated, of a CPU what the process has; its peak where only that is told."""
    if device.type not in ("cpu", "mps"):
        return torch.get_device_module(device).memory_allocated(device)
    status = Path("/proc/self/statm")
    if status.exists():
        import os

        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Quantizes a synthetic checkpoint of some GiB: peak memory, bytes/s, and the same bytes after being killed.

    python benchmarks/checkpoint.py FOLDER [--gib 4] [--kills 5] [--format nf4] [--device cpu] ...

FOLDER gets the checkpoint and two results, about 1.6 times its size, and is emptied in the end. Each run is a process
of its own, whose peak memory the system tells. Killed runs end by SIGKILL at random moments; the last one goes on to
the end, and its files are compared byte for byte with those of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

LAYER = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
WIDTH, VOCABULARY = 4096, 65536


def make(folder: Path, gib: float, vocabulary: int) -> int:
    """Shards of one layer of a Llama of 8 billion each, in bf16, and one of the embedding; gives the bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map, total, layers = {}, 0, 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    def weight(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    outer = {
        "model.embed_tokens.weight": weight((vocabulary, WIDTH)),
        "model.norm.weight": torch.ones(WIDTH).bfloat16(),
    }
    total += save("model-outer.safetensors", outer)
    del outer
    while total < gib * 2**30:
        prefix = f"model.layers.{layers}"
        tensors = {f"{prefix}.{module}.weight": weight(shape) for module, shape in LAYER.items()}
        tensors |= {f"{prefix}.{norm}.weight": torch.ones(WIDTH).bfloat16() for norm in NORMS}
        total += save(f"model-{layers:05d}.safetensors", tensors)
        layers += 1
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": WIDTH,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": layers,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return total


def load(folder: Path) -> str:
    """What Transformers makes of the folder, and that it computes."""
    import torch

    import bnb_core

    began = time.perf_counter()
    model = bnb_core.load_quantized(folder)
    layers = [type(module).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9).view(1, -1)).logits
    counts = {name: layers.count(name) for name in sorted(set(layers))}
    return (f"{type(model).__name__}, {model.get_memory_footprint() / 2**20:.0f} MiB, {counts}, in "
            f"{time.perf_counter() - began:.1f} s; finite logits: {bool(logits.isfinite().all())}")  # fmt: skip


def start(source: Path, out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bnb_core", "quantize", str(source), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def end(process: subprocess.Popen[bytes]) -> tuple[int, int, float]:
    """Exit status, peak resident bytes (Linux counts those of this process, too, which starts it, so it is
    small); and its seconds of CPU time."""
    _, status, usage = os.wait4(process.pid, 0)
    return status, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def same(first: Path, second: Path) -> bool:
    """The same files, byte for byte."""
    names = sorted(path.name for path in first.iterdir())
    if names != sorted(path.name for path in second.iterdir()):
        return False
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="rows of the embedding, the largest tensor")
    parser.add_argument("--load", action="store_true", help="have Transformers load the result")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source, whole, killed = (arguments.folder / name for name in ("source", "whole", "killed"))
    with ProcessPoolExecutor(1) as other_process:
        total = other_process.submit(make, source, arguments.gib, arguments.vocabulary).result()
    os.sync()
    print(f"{total / 2**30:.2f} GiB in {len(list(source.glob('*.safetensors')))} shards", flush=True)
    options = ["--format", arguments.format, "--device", arguments.device]
    try:
        began = time.perf_counter()
        process = start(source, whole, options)
        while not partial_of(whole).exists() and process.poll() is None:
            time.sleep(0.01)
        before_work = time.perf_counter() - began
        status, peak, cpu = end(process)
        seconds = time.perf_counter() - began
        print(f"undisturbed: exit {status}, {seconds:.1f} s, of which {before_work:.1f} s before the first byte; "
              f"{total / (seconds - before_work) / 1e6:.0f} MB/s of input, "
              f"{cpu:.1f} s of CPU time, peak {peak / 2**20:.0f} MiB")  # fmt: skip
        moments = random.Random(arguments.seed)
        for _ in range(arguments.kills):
            process = start(source, killed, options)
            moment = before_work + moments.random() * (seconds - before_work) / arguments.kills
            time.sleep(moment)
            ended = process.poll() is not None
            process.send_signal(signal.SIGKILL)
            process.wait()
            written = sum(path.stat().st_blocks * 512 for path in partial_of(killed).rglob("*"))
            print(f"killed after {moment:.1f} s{' (it had ended)' if ended else ''}: OUT exists: {killed.exists()}, "
                  f"{written / 2**20:.0f} MiB in OUT.partial", flush=True)  # fmt: skip
        began = time.perf_counter()
        status, peak, _ = end(start(source, killed, options))
        print(f"resumed: exit {status}, {time.perf_counter() - began:.1f} s, peak {peak / 2**20:.0f} MiB")
        print(f"the same bytes: {same(whole, killed)}", flush=True)
        if arguments.load:
            with ProcessPoolExecutor(1) as other_process:
                print(f"loaded by Transformers: {other_process.submit(load, killed).result()}")
    finally:
        for path in (source, whole, partial_of(whole), killed, partial_of(killed)):
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()

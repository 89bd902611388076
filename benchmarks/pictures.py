"""Draws the pictures of docs/formats.md from a checkpoint's real weights.

python benchmarks/pictures.py MODEL.safetensors TENSOR docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
from safetensors import safe_open

import bnb_core
from bnb_core.formats import FORMATS

matplotlib.use("Agg")
from matplotlib import pyplot

DEMO = {  # what `bnb-core demo` measured; README.md
    "f32": (12_582_912, 4.2029),
    "LLM.int8()": (3_182_592, 4.2034),
    "NF4": (1_770_496, 4.2213),
    "NF4, double quantization": (1_640_256, 4.2211),
    "FP4": (1_770_496, 4.2392),
}


def scaled(weight: torch.Tensor, blocksize: int = 64) -> torch.Tensor:
    """Each value over the largest magnitude of its block."""
    blocks = weight.flatten()[: weight.numel() // blocksize * blocksize].view(-1, blocksize)
    return (blocks / blocks.abs().amax(1, keepdim=True)).flatten()


def draw_codebooks(weight: torch.Tensor, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    axes.hist(scaled(weight), bins=200, density=True, color="#c9d6ea", label="values over their block's largest")
    for index, (name, format_) in enumerate(FORMATS.items()):
        height = -0.12 * (index + 1)
        axes.plot(
            format_.codebook, [height] * 16, "|", markersize=13, markeredgewidth=1.6, label=f"the codes of {name}"
        )
    axes.set(xlim=(-1.03, 1.03), yticks=[], xlabel="value over the largest magnitude of its block of 64")
    axes.legend(loc="upper right", frameon=False)
    finish(figure, path)


def draw_errors(weight: torch.Tensor, path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    rms = weight.square().mean().sqrt()
    for name in ("fp4", "nf4"):
        packed, state = bnb_core.functional.quantize_4bit(weight, quant_type=name)
        error = bnb_core.functional.dequantize_4bit(packed, state) - weight
        axes.hist(
            (error / rms).flatten(), bins=300, range=(-0.6, 0.6), histtype="step", label=label(name, error, weight)
        )
    codes, stats, _ = bnb_core.functional.int8_vectorwise_quant(weight)
    error = bnb_core.functional.int8_vectorwise_dequant(codes, stats) - weight
    axes.hist((error / rms).flatten(), bins=300, range=(-0.6, 0.6), histtype="step", label=label("int8", error, weight))
    axes.set(yscale="log", xlabel="error over the RMS of the weight", ylabel="values")
    axes.legend(frameon=False)
    finish(figure, path)


def label(name: str, error: torch.Tensor, weight: torch.Tensor) -> str:
    sqnr = 10 * torch.log10(weight.double().square().sum() / error.double().square().sum())
    return f"{name}: SQNR {sqnr:.1f} dB"


def draw_perplexity(path: Path) -> None:
    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    places = {"NF4": (8, -4), "FP4": (8, -4), "NF4, double quantization": (8, -16)}
    for name, (nbytes, perplexity) in DEMO.items():
        axes.plot(nbytes / 2**20, perplexity, "o")
        axes.annotate(name, (nbytes / 2**20, perplexity), xytext=places.get(name, (8, 4)), textcoords="offset points")
    axes.set(xlabel="MiB of the linear layers", ylabel="perplexity", xlim=(0, 14), ylim=(4.19, 4.25))
    finish(figure, path)


def finish(figure: pyplot.Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    model, name, folder = sys.argv[1:]
    with safe_open(model, "pt") as file:
        weight = file.get_tensor(name).float()
    draw_codebooks(weight, Path(folder) / "codebooks.png")
    draw_errors(weight, Path(folder) / "errors.png")
    draw_perplexity(Path(folder) / "perplexity.png")


if __name__ == "__main__":
    main()

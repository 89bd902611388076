"""QLoRA in about a hundred lines: a tiny language model, its layers in 4 bits, adapters on top.

Run it with `python examples/qlora.py`; it takes about a minute on two CPU cores. The steps are those of
QLoRA (arXiv 2305.14314): train a float model, store its linear layers as 4-bit NormalFloat, freeze them,
and fine-tune small low-rank adapters with an optimizer whose state is 8-bit and paged.
"""

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import bnb_core as bnb

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 16, 192, 4, 2


class Block(nn.Module):
    """Causal self-attention, then a perceptron, each added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Predicts the next byte: `[batch, positions]` int64 to `[batch, positions, 256]`."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.lm_head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.lm_head(self.blocks(self.token(tokens) + self.position(positions)))


class LoRA(nn.Module):
    """A frozen layer plus a trained product of two thin matrices (arXiv 2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int = 32) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


def read(*packages: str) -> torch.Tensor:
    """The source text of some packages of the standard library, as bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for package in packages for file in (library / package).rglob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, text: torch.Tensor, steps: int) -> None:
    """Train on random windows of the text and print the loss now and then."""
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(CONTEXT + 1)].long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % (steps // 10) == 0:
            print(f"  step {step:4d}  loss {loss.item():.3f}")


def main() -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    print("training in f32 on asyncio, email and json")
    train(model, torch.optim.AdamW(model.parameters(), lr=2e-3), read("asyncio", "email", "json"), steps=400)

    def nf4(in_features: int, out_features: int, bias: bool) -> nn.Module:
        return bnb.nn.Linear4bit(in_features, out_features, bias, quant_type="nf4")

    bnb.utils.replace_linear(model, nf4, copy_weights=True)
    model.to("cpu").requires_grad_(False)  # the move is what quantizes; .to("cuda") would do as well
    for block in model.blocks:
        for name in ("query_key_value", "output", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name)))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    print("fine-tuning adapters over the 4-bit model on unittest and logging")
    train(model, bnb.optim.PagedAdamW8bit(adapters, lr=2e-3), read("unittest", "logging"), steps=200)


if __name__ == "__main__":
    main()

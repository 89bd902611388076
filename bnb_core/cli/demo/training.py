"""Training, perplexity and generation, the same code for float and quantized models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data
from .model import Cache
from .settings import Settings


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy, in nats a token, of windows `[batch, context + 1]` int64."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    steps: int,
    settings: Settings,
    on_step: Callable[[float], None],
) -> list[float]:
    """The loss of every step, each of which is also given to `on_step`.

    The learning rate rises over a tenth of the steps, then falls along a cosine.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, steps))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    model.train()
    for _ in range(steps):
        loss = next_token_loss(model, data.random_batch(tokens, settings, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        on_step(losses[-1])
    model.eval()
    return losses


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the full learning rate at `step`, counted from 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, settings: Settings) -> float:
    """exp of the mean loss a byte over fixed windows of `tokens`."""
    batches = data.evaluation_windows(tokens, settings).split(settings.batch_size)
    losses = [next_token_loss(model, batch.to(settings.device)) * len(batch) for batch in batches]
    return math.exp(torch.stack(losses).double().sum().item() / settings.evaluation_windows)


@dataclass(frozen=True)
class Generation:
    """What a model wrote after the prompt, and how fast."""

    text: str
    tokens_per_second: float


@torch.no_grad()
def generate(model: nn.Module, settings: Settings) -> Generation:
    """Continue the prompt a byte at a time with a key-value cache; the speed leaves out the prompt."""
    generator = torch.Generator().manual_seed(settings.seed)
    prompt = torch.tensor([list(settings.prompt.encode())], device=settings.device)
    cache: Cache = {}
    token = sample(model(prompt, cache), settings, generator)
    written = [token]
    start = time.perf_counter()
    for _ in range(settings.generated_tokens - 1):
        token = sample(model(token, cache), settings, generator)
        written.append(token)
    seconds = time.perf_counter() - start
    text = bytes(torch.cat(written, 1)[0].tolist()).decode(errors="replace")
    return Generation(printable(text), (settings.generated_tokens - 1) / seconds)


def printable(text: str) -> str:
    """The text without what could steer a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def sample(logits: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """`[1, 1]` int64: a draw from the last position's distribution, on the CPU and so alike everywhere."""
    probabilities = (logits[0, -1].float().cpu() / settings.temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[None].to(logits.device)

"""Serving with continuous batches: requests come and go at every step, memory and shapes stay the same.

Run it with `python examples/serving.py [--compile] [--device cuda]`; it takes some seconds on two CPU cores. The model
is in 4 bits. Its cache is static: a slot for each request that is served at a time. A step takes the next token of each
slot, so that it has one shape for ever and can be compiled, or captured in a CUDA graph. A request that has ended gives
its slot to the next one at once; nobody waits for the longest.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnb_core as bnb

SLOTS, LENGTH, VOCABULARY, WIDTH, HEADS, LAYERS = 8, 96, 512, 256, 4, 4


@dataclass
class Request:
    """Somebody's prompt, and what has been written to it."""

    prompt: list[int]
    new_tokens: int
    answer: list[int] = field(default_factory=list)


class Layer(nn.Module):
    """Attention over the cache, then a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
        """x [slots, width], cache [2, slots, heads, length, width of a head], positions [slots]."""
        query, key, value = self.query_key_value(self.norm1(x)).view(SLOTS, 3, HEADS, -1).unbind(1)
        slots = torch.arange(SLOTS, device=x.device)
        cache[0, slots, :, positions] = key
        cache[1, slots, :, positions] = value
        seen = torch.arange(LENGTH, device=x.device) <= positions[:, None]
        mixed = F.scaled_dot_product_attention(query[:, :, None], cache[0], cache[1], attn_mask=seen[:, None, None])
        x = x + self.output(mixed.reshape(SLOTS, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """A language model with a static cache for each slot."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("cache", torch.zeros(LAYERS, 2, SLOTS, HEADS, LENGTH, WIDTH // HEADS), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The next token of each slot: tokens and positions [slots] to tokens [slots]."""
        x = self.token(tokens) + self.position(positions)
        for layer, cache in zip(self.layers, self.cache, strict=True):
            x = layer(x, cache, positions)
        return self.lm_head(x).argmax(-1)


class Server:
    """Gives slots to requests, and takes a step of all of them at a time."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model, device
        self.waiting: deque[Request] = deque()
        self.served: list[Request | None] = [None] * SLOTS
        self.places = [0] * SLOTS

    @torch.no_grad()
    def step(self) -> int:
        """One token for each slot that is taken; gives how many were."""
        for slot in range(SLOTS):
            if self.served[slot] is None and self.waiting:
                self.served[slot], self.places[slot] = self.waiting.popleft(), 0
        tokens = [self._next_input(slot) for slot in range(SLOTS)]
        inputs = torch.tensor([tokens, self.places], device=self.device)
        outputs = self.model(inputs[0], inputs[1]).tolist()
        taken = [slot for slot in range(SLOTS) if self.served[slot] is not None]
        for slot in taken:
            self._take(slot, outputs[slot])
        return len(taken)

    def _next_input(self, slot: int) -> int:
        request, place = self.served[slot], self.places[slot]
        return 0 if request is None else [*request.prompt, *request.answer][place]

    def _take(self, slot: int, token: int) -> None:
        request = self.served[slot]
        assert request is not None
        self.places[slot] += 1
        if self.places[slot] >= len(request.prompt):
            request.answer.append(token)
        if len(request.answer) == request.new_tokens:
            self.served[slot], self.places[slot] = None, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile the step; on a GPU with CUDA graphs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model: nn.Module = bnb.quantize_model(Model()).to(arguments.device)
    if arguments.compile:
        model = torch.compile(model, mode="reduce-overhead" if arguments.device != "cpu" else "default")
    server = Server(model, arguments.device)
    requests = [
        Request(torch.randint(VOCABULARY, (int(size),)).tolist(), int(new))
        for size, new in zip(torch.randint(4, 40, (24,)), torch.randint(8, 48, (24,)), strict=True)
    ]
    server.waiting.extend(requests)
    began, steps, tokens = time.perf_counter(), 0, 0
    while server.waiting or any(server.served):
        tokens += server.step()
        steps += 1
    seconds = time.perf_counter() - began
    assert all(len(request.answer) == request.new_tokens for request in requests)
    print(f"{len(requests)} requests in {steps} steps: {tokens} tokens read or written, {tokens / seconds:.0f}/s, "
          f"{100 * tokens / steps / SLOTS:.0f} % of the slots in use")  # fmt: skip


if __name__ == "__main__":
    main()

"""8-bit Adam in a plain training loop, beside torch's: the same loss, a quarter of the state.

Run it with `python examples/adam_8bit.py`; it takes some seconds on two idle CPU cores.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import bnb_core as bnb

STEPS, BATCH, WIDTH, CLASSES = 100, 64, 256, 10


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, CLASSES))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors that the optimizer keeps for the parameters; tables that they share count once."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def train(optimizer_class: type[torch.optim.Optimizer]) -> tuple[float, int]:
    """The mean loss of the last steps, and the bytes of the optimizer's state."""
    model = make_model()
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(CLASSES, WIDTH, generator=generator)
    losses = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        inputs = centers[labels] + 4 * torch.randn(BATCH, WIDTH, generator=generator)
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20, state_bytes(optimizer)


def main() -> None:
    for optimizer_class in (torch.optim.Adam, bnb.optim.Adam8bit, bnb.optim.PagedAdam8bit):
        loss, nbytes = train(optimizer_class)
        library = optimizer_class.__module__.partition(".")[0]
        print(f"{library}.{optimizer_class.__name__}: loss {loss:.3f}, {nbytes:,} bytes of state")


if __name__ == "__main__":
    main()

"""Where the state of an optimizer lies: on its parameter's device, in paged memory or not, and its codebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from bnb_core import functional
from bnb_core.optim.checkpoint import STATE_KEYS
from bnb_core.sharding import local_part

# Below this many elements a state is not worth a file (or an allocation in managed memory) of its own.
SMALLEST_PAGED = 100_000


class StateBuffers(torch.optim.Optimizer):
    """The part of an optimizer that allocates and moves state."""

    is_paged: bool
    _process: int

    @property
    def name2qmap(self) -> dict[str, Tensor]:
        """The codebooks of the states: "dynamic" is signed, for state1, and "udynamic" is not, for state2."""
        if not hasattr(self, "_name2qmap"):
            self.fill_qmap()
        return self._name2qmap

    def fill_qmap(self) -> None:
        """Make the codebooks, which happens by itself when they are first needed."""
        self._name2qmap = {
            "dynamic": functional.create_dynamic_map(signed=True),
            "udynamic": functional.create_dynamic_map(signed=False),
        }

    def _qmap(self, state_key: str, device: torch.device) -> Tensor:
        name = "dynamic" if state_key == "state1" else "udynamic"
        if self.name2qmap[name].device != device:
            self.name2qmap[name] = self.name2qmap[name].to(device)
        return self.name2qmap[name]

    def _pages(self, p: Tensor) -> bool:
        return self.is_paged and local_part(p).numel() >= SMALLEST_PAGED

    def get_state_buffer(
        self, p: Tensor, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Zeros in the parameter's shape (or ``shape``), row-major, on its device, paged if this optimizer's are.

        Of a parameter that is sharded over processes, this one's part counts.
        """
        p = local_part(p)
        shape = p.shape if shape is None else shape
        if self._pages(p):
            return functional.get_paged(*shape, dtype=dtype, device=p.device)
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def prefetch_state(self, p: Tensor) -> None:
        """Start to read the parameter's paged state before it is needed; no part of a CUDA graph."""
        if is_capturing():
            return
        for key in STATE_KEYS:
            buffer = self.state[p].get(key)
            if getattr(buffer, "is_paged", False):
                functional.prefetch_tensor(buffer)

    def to_gpu(self) -> None:
        """Bring every state to where it belongs: its parameter's device, and paged memory if this optimizer's are.

        Paged memory is shared with forked processes; a child works on copies.
        """
        self._process = os.getpid()
        for p, state in self.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and not self._is_in_place(p, key, value):
                    state[key] = self._copied(p, key, value)

    def _is_in_place(self, p: Tensor, key: str, value: Tensor) -> bool:
        p = local_part(p)
        paged = getattr(value, "is_paged", False)
        in_memory = not paged or getattr(value, "page_process", self._process) == self._process
        return value.device == p.device and in_memory and (key not in STATE_KEYS or paged == self._pages(p))

    def _copied(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        """A copy of one state tensor where it belongs."""
        p = local_part(p)
        if key in STATE_KEYS:
            return self.get_state_buffer(p, value.dtype, value.shape).copy_(value)
        if key.startswith("qmap"):
            shared = self._qmap(f"state{key[-1]}", p.device)
            if torch.equal(shared, value.to(p.device)):
                return shared
        return value.detach().to(p.device, copy=True)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

"""What a case is, and how it calls a primitive: guarded, observed, twice."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnb_core.primitive import Out, Primitive
from bnb_core.records import flat, map_tensors

GUARD_BYTES = 256
GUARD = 0xA5
UNWRITTEN = 0xFF


class Failure(AssertionError):
    """A backend does not do what docs/SPEC.md says."""


@dataclass(frozen=True)
class Case:
    """One promise about one primitive (or about the API, where ``primitive`` is empty).

    Args:
        name: unique within the primitive.
        run: raises :class:`Failure`; any other error fails the case too.
        traits: what it covers, such as ``dtype=float32``, ``blocksize=64``, ``shape=odd``, ``values=nan``.
        large: needs gigabytes or minutes; only run when asked for.
        reaches_kernel: False where the point is that no kernel is called.
    """

    primitive: str
    name: str
    run: Callable[[Context], None]
    traits: dict[str, str] = field(default_factory=dict)
    large: bool = False
    reaches_kernel: bool = True

    @property
    def id(self) -> str:
        return f"{self.primitive or 'api'}/{self.name}"


@dataclass
class Context:
    """Where a case runs: the backend held to the suite, the device its tensors are on, the seed of the run."""

    backend: str
    device: torch.device
    seed: int = 0
    served: set[tuple[str, str]] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)

    def start(self) -> None:
        """Forget what the last case left."""
        self.served.clear()
        self.digest = hashlib.sha256()

    def generator(self, name: str) -> torch.Generator:
        """A random generator that depends on the run's seed and a name, but on nothing else."""
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)

    def observe(self, primitive: str, backend: str) -> None:
        self.served.add((primitive, backend))

    def check_served(self, case: Case) -> None:
        """The named backend, and no other, has served the case, and it has served the case's primitive."""
        others = sorted({backend for _, backend in self.served if backend != self.backend})
        if others:
            raise Failure(f"served by {', '.join(others)} instead of {self.backend}")
        if not case.reaches_kernel and self.served:
            raise Failure("a kernel was called")
        if case.reaches_kernel and case.primitive and (case.primitive, self.backend) not in self.served:
            raise Failure(f"{case.primitive} was never called")

    def move(self, tensor: Tensor) -> Tensor:
        """To the device, with the same strides and storage offset: cases are about layouts, too."""
        # Sparse tensors are there to be refused, also on devices that have none.
        if tensor.device == self.device or tensor.is_meta or tensor.layout is not torch.strided:
            return tensor
        storage_size = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        base = tensor.as_strided((storage_size,), (1,), 0).to(self.device)
        return base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def call(self, primitive: Primitive, *arguments: Any) -> tuple[Tensor, ...]:
        """The primitive's outputs, on the CPU.

        It is called twice, into guarded memory and without ``out``: the results must have the same bits, the guards
        must survive, and so must the inputs.
        """
        moved = map_tensors(self.move, arguments)
        before = [snapshot(a) for a in flat(moved)]
        outputs = primitive.declaration(*moved)
        expected = (outputs,) if isinstance(outputs, Out) else outputs
        guarded = [Guarded(o.shape, o.dtype, self.device) for o in expected]  # type: ignore[union-attr]
        out = tuple(g.tensor for g in guarded)
        primitive(*moved, out=out[0] if isinstance(outputs, Out) else out)
        for index, guard in enumerate(guarded):
            guard.check(f"output {index}")
        if before != [snapshot(a) for a in flat(moved)]:
            raise Failure("an input was changed")
        again = primitive(*moved)
        for first, second in zip(out, (again,) if isinstance(again, Tensor) else again, strict=True):
            bits = snapshot(first)
            if bits != snapshot(second):
                raise Failure("two calls with the same arguments gave different bits")
            self.digest.update(bits or b"")
        return tuple(t.cpu() for t in out)

    def update(self, primitive: Primitive, *arguments: Any) -> dict[str, Tensor | None]:
        """Call a primitive that changes arguments in place: by name those that its schema marks so, on the CPU."""
        changed = [argument.name for argument in primitive.op._schema.arguments if argument.alias_info]
        given, moved = named(primitive, arguments), named(primitive, map_tensors(self.move, arguments))
        guards = {name: Guarded.like(given[name], self.device) for name in changed if given[name] is not None}
        moved |= {name: guard.tensor for name, guard in guards.items()}
        read = [value for name, value in moved.items() if name not in guards]
        before = [snapshot(value) for value in read]
        primitive(*positional(primitive, moved))
        for name, guard in guards.items():
            guard.check(name)
            self.digest.update(snapshot(guard.tensor) or b"")
        if before != [snapshot(value) for value in read]:
            raise Failure("an argument that is only read was changed")
        return {name: guards[name].tensor.cpu() if name in guards else None for name in changed}


def named(primitive: Primitive, arguments: Iterable[Any]) -> dict[str, Any]:
    """The primitive's arguments by name, the fields of records among them."""
    return dict(zip(primitive.names, flat(arguments), strict=True))


def positional(primitive: Primitive, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same, named in any order, as the primitive takes them."""
    return primitive.structured([arguments[name] for name in primitive.names])


class Guarded:
    """A tensor between guard bytes, filled with a pattern that no kernel would write."""

    def __init__(self, shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
        shape = tuple(shape)
        self.size = torch.Size(shape).numel() * dtype.itemsize
        self.memory = torch.full((self.size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=device)
        content = self.memory[GUARD_BYTES : GUARD_BYTES + self.size]
        content.fill_(1 if dtype == torch.bool else UNWRITTEN)
        self.tensor = content.view(dtype).view(shape)

    @classmethod
    def like(cls, tensor: Tensor, device: torch.device) -> Guarded:
        """A guarded contiguous copy."""
        guarded = cls(tensor.shape, tensor.dtype, device)
        guarded.tensor.copy_(tensor)
        return guarded

    def check(self, what: str) -> None:
        for side, guard in (("before", self.memory[:GUARD_BYTES]), ("after", self.memory[GUARD_BYTES + self.size :])):
            if bool((guard != GUARD).any()):
                raise Failure(f"{what}: bytes {side} it were overwritten")


def snapshot(value: Any) -> bytes | None:
    """The bytes of a tensor; None for anything else."""
    if not isinstance(value, Tensor):
        return None
    if value.numel() == 0:
        return b""
    # A clone, as a contiguous tensor of one element may have any stride, which no view as bytes takes.
    return (
        value.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).numpy().tobytes()
    )

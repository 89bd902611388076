"""What a backend is: a table from primitive names to functions, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from bnb_core.row_passes import RowsAlike

EVERY_DEVICE = "*"


class BackendError(ValueError):
    """No backend can serve a call, or a backend was named that does not exist or is not available."""


class SettingError(BackendError):
    """An environment variable has a value that cannot be used."""

    def __init__(self, variable: str, value: str, accepted: str) -> None:
        super().__init__(f"{variable}: expected {accepted}, got {value!r}")


def in_words(error: BaseException) -> str:
    """Its class and message, whatever the message holds."""
    try:
        message = str(error).encode(errors="backslashreplace").decode()
    except Exception:
        message = "a message that cannot be shown"
    return f"{type(error).__name__}: {message}"


@dataclass(frozen=True)
class Kernel:
    """A function that serves one primitive.

    ``function(*arguments, out=outputs)`` writes the outputs (a tensor or a tuple of them) that the primitive
    has allocated. ``supports(*arguments)`` returns None, or the reason why these arguments cannot be served.
    A kernel that comes and goes while the process runs has ``present(device_type)``, which says whether it is there
    now; where it is not, ``supports`` refuses. ``several``, where there is one, does the work of many calls: it takes a
    list for each tensor that differs between them. ``rows_alike``, of the arguments, says which calls give a row the
    same bits whatever rows are beside it (row_passes.py); a kernel without it is called for one row at a time where
    that counts.
    """

    function: Callable[..., None]
    supports: Callable[..., str | None] | None = None
    present: Callable[[str], bool] | None = None
    several: Callable[..., None] | None = None
    rows_alike: RowsAlike | None = None

    def is_on(self, device_type: str) -> bool:
        return self.present is None or self.present(device_type)


@dataclass(frozen=True)
class InstructionSets:
    """The builds of one backend's kernels for different instruction sets.

    ``available()`` names those that this machine runs, ``current()`` the one that serves, and ``select(name)`` makes
    another one serve.
    """

    available: Callable[[], list[str]]
    current: Callable[[], str]
    select: Callable[[str], None]


class PagedMemory(Protocol):
    """Memory of a device that may be paged out to the host's."""

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Zeros [numel] on the device."""

    def prefetch(self, tensor: torch.Tensor, to_cpu: bool) -> None:
        """Start to bring one to its device, or to the host, in the order of the current stream."""


def _require(name: str, value: object, right: bool, accepted: str) -> None:
    if not right:
        raise TypeError(f"Backend: {name}: expected {accepted}, got {value!r}")


@dataclass(frozen=True)
class Backend:
    """A table of kernels.

    Args:
        name: what BNB_BACKEND calls it.
        device_types: torch device types whose tensors it takes; ``("*",)`` for every one.
        priority: the highest available one serves.
        kernels: primitive name to :class:`Kernel`, or to its function.
        unavailable: why it cannot run here and what to do about it; None when it can.
        by_name_only: never chosen by priority (simulators, interpreters).
        details: facts for ``bnb-core info``, such as the instruction set in use.
        instruction_sets: where there are several, how to choose among them.
        paged_memory: for paged optimizer state, where the device has it.
        expected_failures: a JSON file of the conformance cases that are known to fail (conformance/runner.py).
        library: the file of its compiled module, where that exports the C symbols of csrc_shared/c_api.cpp.
    """

    name: str
    device_types: tuple[str, ...]
    priority: int
    kernels: Mapping[str, Kernel | Callable[..., None]]
    unavailable: str | None = None
    by_name_only: bool = False
    details: Callable[[], dict[str, str]] = field(default=dict)
    instruction_sets: InstructionSets | None = None
    paged_memory: PagedMemory | None = None
    expected_failures: Path | None = None
    library: Path | None = None

    def __post_init__(self) -> None:
        """Raise TypeError for a field of the wrong type, here rather than where somebody looks for a backend."""
        _require("name", self.name, isinstance(self.name, str), "a str")
        devices = isinstance(self.device_types, tuple) and all(isinstance(d, str) for d in self.device_types)
        _require("device_types", self.device_types, devices, "a tuple of str")
        _require("priority", self.priority, isinstance(self.priority, int), "an int")
        _require("kernels", self.kernels, isinstance(self.kernels, Mapping), "a mapping")
        object.__setattr__(self, "kernels", dict(self.kernels))  # read here once, as another mapping may raise later
        for primitive, kernel in self.kernels.items():
            function = kernel.function if isinstance(kernel, Kernel) else kernel
            _require(f"kernels[{primitive!r}]", kernel, callable(function), "a function or a Kernel")
        reason = self.unavailable
        _require("unavailable", reason, reason is None or isinstance(reason, str), "a str or None")
        _require("details", self.details, callable(self.details), "a function")
        failures = self.expected_failures
        _require("expected_failures", failures, failures is None or isinstance(failures, Path), "a Path or None")

    @property
    def available(self) -> bool:
        return self.unavailable is None

    def prepare(self) -> None:
        """Called where the backend is named, before it is asked whether it is available; most have nothing to do."""

    def facts(self) -> dict[str, str]:
        """Its ``details``, or why it cannot tell them."""
        try:
            return {str(name): str(fact) for name, fact in self.details().items()}
        except Exception as error:
            return {"details": f"backend {self.name!r} cannot tell them: {in_words(error)}"}

    def serves(self, device_type: str) -> bool:
        return EVERY_DEVICE in self.device_types or device_type in self.device_types

    def kernel(self, primitive: str) -> Kernel | None:
        entry = self.kernels.get(primitive)
        return entry if entry is None or isinstance(entry, Kernel) else Kernel(entry)

"""Which function serves a primitive on a device.

Without an override the available backend of highest priority serves. ``BNB_BACKEND`` and :func:`use_backend` are
strict: the backend they name serves, or the call raises :class:`~bnb_core.backend.BackendError`. An environment
variable with a value that cannot be used is no failure of the backend that reads it: it raises
:class:`~bnb_core.backend.SettingError`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import torch

from bnb_core import installed_backends
from bnb_core.backend import Backend, BackendError, Kernel, PagedMemory, in_words
from bnb_core.row_passes import batch_invariant_function

ENVIRONMENT_VARIABLE = "BNB_BACKEND"
EVERY_PRIMITIVE = "*"
BATCH_INVARIANT = "batch invariant"
"""In the choice of a context, beside primitives: whether rows must not depend on each other."""


@dataclass(frozen=True)
class _Candidate:
    backend: str
    kernel: Kernel


_primitives: list[str] = []
_registered: dict[str, Backend] = {}
_override: ContextVar[Mapping[str, str] | None] = ContextVar("bnb_core_backend", default=None)
_observers: list[Callable[[str, str], None]] = []


def declare(primitive: str) -> None:
    """Make a primitive's name known; primitives/ calls it once for each."""
    _primitives.append(primitive)


def primitive_names() -> list[str]:
    return list(_primitives)


def _names() -> list[str]:
    """Of every backend there is, loaded or not, and of the packages that cannot be asked for theirs."""
    return sorted(installed_backends.names() | _registered.keys())


def _is_ours(name: str) -> bool:
    """Whether the backend comes with bnb_core."""
    return name not in _registered and installed_backends.is_ours(name)


def backends() -> dict[str, Backend]:
    """Every registered backend by name, highest priority first, available or not (``.unavailable`` says why)."""
    loaded = ((name, _named(name)) for name in _names())
    return dict(sorted(loaded, key=lambda item: -item[1].priority))


def _check_name(name: str) -> None:
    if name not in _names():
        raise BackendError(f"unknown backend {name!r}; registered are: {', '.join(_names())}")


def _named(name: str) -> Backend:
    _check_name(name)
    return _registered[name] if name in _registered else installed_backends.load(name)


def why_unavailable(backend: Backend) -> str | None:
    """The reason why the backend cannot serve, once it has prepared; None when it can."""
    try:
        backend.prepare()
    except Exception as error:
        return f"preparing it failed: {in_words(error)}"
    return backend.unavailable


def available_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        BackendError: it is unknown, or not available (with the reason).
    """
    backend = _named(name)
    reason = why_unavailable(backend)
    if reason is not None:
        raise BackendError(f"backend {name!r} is not available: {reason}")
    return backend


def _forget_lookups() -> None:
    _look_up.cache_clear()
    _unasked.cache_clear()
    paged_memory.cache_clear()


@contextmanager
def registered(backend: Backend) -> Iterator[None]:
    """Have one more backend in this context, beside those of the entry points: for trying one out.

    Raises:
        BackendError: its name is taken.
    """
    if backend.name in _names():
        raise BackendError(f"backend {backend.name!r} is registered already; give it another name")
    _registered[backend.name] = backend
    _forget_lookups()
    try:
        yield
    finally:
        del _registered[backend.name]
        _forget_lookups()


@cache
def paged_memory(device_type: str) -> PagedMemory:
    """That of the backend of highest priority which has it for this device.

    Raises:
        BackendError: none has.
    """
    for backend in backends().values():
        if backend.available and backend.serves(device_type) and backend.paged_memory is not None:
            return backend.paged_memory
    reasons = "; ".join(f"{b.name}: {b.unavailable}" for b in backends().values() if b.unavailable)
    raise BackendError(f"device: no backend has paged memory on {device_type}. Not available: {reasons or 'none'}")


def library_backend() -> Backend | None:
    """The backend whose compiled module answers calls of C symbols: the one named for every primitive, if one is.

    Otherwise that of highest priority, one for GPUs before one for CPUs; None where none has such a module.
    """
    name = _override_in_force().get(EVERY_PRIMITIVE)
    if name is not None:
        backend = available_backend(name)
        return backend if backend.library is not None else None
    usable = [b for b in backends().values() if b.available and b.library is not None and not b.by_name_only]
    return min(usable, key=lambda backend: backend.serves("cpu"), default=None)


def delegated_to(name: str) -> dict[str, Kernel]:
    """The kernels of another backend, for a backend that wants them to stand in where it has none of its own.

    They count as the kernels of the backend whose table holds them.

    Raises:
        BackendError: an unknown name, or a backend that is not available.
    """
    backend = available_backend(name)
    return {primitive: kernel for primitive in _primitives if (kernel := backend.kernel(primitive)) is not None}


def parse_override(text: str) -> dict[str, str]:
    """Read ``"cpu"`` or ``"gemm_4bit=reference,*=cpu"`` into a mapping from primitive to backend name.

    Raises:
        BackendError: an unknown backend or primitive, or a malformed entry.
    """
    override: dict[str, str] = {}
    for entry in (part.strip() for part in text.split(",")):
        primitive, separator, name = entry.rpartition("=")
        if not separator:
            primitive = EVERY_PRIMITIVE
        if primitive != EVERY_PRIMITIVE and primitive not in _primitives:
            raise BackendError(f"unknown primitive {primitive!r} in {text!r}; primitives are: {', '.join(_primitives)}")
        if primitive in override:
            raise BackendError(f"{text!r} names a backend for {primitive!r} twice; name one")
        _check_name(name)
        override[primitive] = name
    return override


@cache
def _environment_override() -> dict[str, str]:
    text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    try:
        return parse_override(text) if text else {}
    except BackendError as error:
        raise BackendError(f"{ENVIRONMENT_VARIABLE}: {error}") from None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call in this context by the named backend (or ``"primitive=backend,*=backend"``), strictly.

    Raises:
        BackendError: an unknown name, or a backend that is not available (with the reason).
    """
    override = parse_override(name)
    for backend in set(override.values()):
        available_backend(backend)
    if BATCH_INVARIANT in _override_in_force():
        override[BATCH_INVARIANT] = BATCH_INVARIANT
    with carry(override):
        yield


@contextmanager
def batch_invariant() -> Iterator[None]:
    """In this context no row of a product depends, by a bit, on the other rows or on how many there are.

    That holds for what layers and functions with 4-bit and int8 weights compute in a forward pass, on every backend:
    kernels are called for as many rows at a time as they treat alike. An int8 product with a threshold takes each row's
    own outliers. Gradients are computed as elsewhere. The context is that of a thread or task; a compiled function is
    called in it.

    Raises:
        RuntimeError: torch.compile traces it.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("batch_invariant: cannot be entered in a compiled function; call the function in it instead")
    with carry({**_override_in_force(), BATCH_INVARIANT: BATCH_INVARIANT}):
        yield


def choice() -> Mapping[str, str] | None:
    """What :func:`use_backend` has chosen here, to be carried to where its context does not reach.

    None while torch compiles: a compiled graph asks when it runs. Gradients may depend on their batch.
    """
    return None if torch.compiler.is_compiling() else chosen()


def chosen() -> Mapping[str, str] | None:
    """:func:`choice` where torch does not compile."""
    override = _override.get()
    if override is None or BATCH_INVARIANT not in override:
        return override
    return {key: name for key, name in override.items() if key != BATCH_INVARIANT}


@contextmanager
def carry(choice: Mapping[str, str] | None) -> Iterator[None]:
    """Have another context's choice, if any, hold in this one: autograd runs backward passes in threads of its own."""
    if choice is None:
        yield
        return
    token = _override.set(choice)
    try:
        yield
    finally:
        _override.reset(token)


@contextmanager
def observe(callback: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``callback(primitive, backend)`` for every primitive served in this context, in any thread."""
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def _override_in_force() -> Mapping[str, str]:
    override = _override.get()
    return _environment_override() if override is None else override


def _candidates(primitive: str, device_type: str, override: Mapping[str, str]) -> list[_Candidate]:
    """The kernels that may serve, in the order in which they are asked."""
    name = override.get(primitive) or override.get(EVERY_PRIMITIVE)
    return _look_up(primitive, device_type, name, BATCH_INVARIANT in override)


@cache
def _look_up(primitive: str, device_type: str, name: str | None, batch_invariant: bool) -> list[_Candidate]:
    """The candidates where an override names that backend, or none."""
    if batch_invariant:
        candidates = _look_up(primitive, device_type, name, False)
        return [_Candidate(c.backend, _batch_invariant(primitive, c.kernel)) for c in candidates]
    if name is None:
        return _by_priority(primitive, device_type)
    return [_strict_candidate(primitive, device_type, name)]


def _batch_invariant(primitive: str, kernel: Kernel) -> Kernel:
    return replace(kernel, function=batch_invariant_function(primitive, kernel))


def _strict_candidate(primitive: str, device_type: str, name: str) -> _Candidate:
    """The candidate of the backend that an override names, or an error that says what is missing."""
    backend = available_backend(name)
    remedy = f"choose another with {ENVIRONMENT_VARIABLE} or use_backend(), or name none"
    if not backend.serves(device_type):
        raise BackendError(
            f"{primitive}: backend {name!r} takes tensors on {', '.join(backend.device_types)}, "
            f"got one on {device_type}; move the tensor or {remedy}"
        )
    kernel = backend.kernel(primitive)
    if kernel is None:
        raise BackendError(f"{primitive}: backend {name!r} does not have this primitive; {remedy}")
    return _candidate(primitive, name, kernel)


def _candidate(primitive: str, backend: str, kernel: Kernel) -> _Candidate:
    return _Candidate(backend, kernel if _is_ours(backend) else _others_kernel(primitive, backend, kernel))


def _others_kernel(primitive: str, backend: str, kernel: Kernel) -> Kernel:
    """Somebody else's kernel: what it raises names the backend and the primitive, and keeps its type.

    Where asking it whether it supports a call raises, it supports none, which a warning says.
    """
    whose = f"{primitive}: backend {backend!r}"

    def named(function: Callable[..., None]) -> Callable[..., None]:
        @wraps(function)
        def call(*arguments: Any, **outputs: Any) -> None:
            try:
                function(*arguments, **outputs)
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(f"raised in {whose}")
                raise

        return call

    def asked(question: Callable[..., Any] | None, otherwise: Callable[[str], Any]) -> Callable[..., Any] | None:
        if question is None:
            return None

        def ask(*arguments: Any) -> Any:
            try:
                return question(*arguments)
            except Exception as error:
                sentence = f"cannot say whether it supports a call: {in_words(error)}"
                warnings.warn(f"{whose} {sentence}", stacklevel=2)
                return otherwise(sentence)

        return ask

    supports, present = asked(kernel.supports, str), asked(kernel.present, lambda sentence: False)
    several = None if kernel.several is None else named(kernel.several)
    return Kernel(named(kernel.function), supports, present, several, kernel.rows_alike)


def _by_priority(primitive: str, device_type: str) -> list[_Candidate]:
    found = []
    for backend in backends().values():
        kernel = backend.kernel(primitive)
        if kernel is None or backend.by_name_only or not backend.serves(device_type):
            continue
        if backend.available or kernel.present is not None:
            found.append(_candidate(primitive, backend.name, kernel))
    if not found:
        reasons = "; ".join(f"{b.name}: {b.unavailable}" for b in backends().values() if b.unavailable)
        raise BackendError(
            f"{primitive}: no backend serves tensors on {device_type}. Not available: {reasons or 'none'}"
        )
    return found


@cache
def _unasked(primitive: str, device_type: str) -> Kernel | None:
    """The kernel that serves where the context has no choice, if it takes whatever arguments there are."""
    kernel = _candidates(primitive, device_type, _environment_override())[0].kernel
    return kernel if kernel.supports is None else None


def kernel_for(primitive: str, device_type: str, arguments: tuple[Any, ...]) -> Kernel:
    """The kernel that serves ``primitive`` with these arguments on tensors of this device type.

    Raises:
        BackendError: none does, or the one that an override names cannot.
    """
    if _override.get() is None and not _observers:
        kernel = _unasked(primitive, device_type)
        if kernel is not None:
            return kernel
    reasons = []
    for candidate in _candidates(primitive, device_type, _override_in_force()):
        supports = candidate.kernel.supports
        reason = supports(*arguments) if supports else None
        if reason is None:
            for observer in _observers:
                observer(primitive, candidate.backend)
            return candidate.kernel
        reasons.append(f"{candidate.backend}: {reason}")
    raise BackendError(f"{primitive}: no backend supports these arguments: {'; '.join(reasons)}")


def served_by(primitive: str, device_type: str) -> str:
    """The name of the backend that is asked first for ``primitive`` on tensors of this device type.

    Raises:
        BackendError: none serves it, or the one that an override names does not.
    """
    candidates = _candidates(primitive, device_type, _override_in_force())
    for candidate in candidates:
        if candidate.kernel.is_on(device_type):
            return candidate.backend
    raise BackendError(
        f"{primitive}: backend {candidates[0].backend!r} has no kernel for it on {device_type} "
        "now; bnb-core info shows what serves where"
    )


def serving(device_type: str) -> dict[str, str]:
    """For each primitive, the name of the backend that serves tensors of this device type, or the error.

    Raises:
        BackendError: BNB_BACKEND cannot be read.
    """
    _override_in_force()  # raises here where it cannot be read, not once for each primitive
    table = {}
    for primitive in _primitives:
        try:
            table[primitive] = served_by(primitive, device_type)
        except BackendError as error:
            table[primitive] = str(error)
    return table

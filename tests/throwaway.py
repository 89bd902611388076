"""Backends for one test: the reference's kernels, some of them spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bnb_core import primitives, registry
from bnb_core.backend import Backend
from bnb_core.conformance import runner
from bnb_core.conformance.case import Case, named, positional

NAME = "throwaway"


def after(primitive: str, spoil: Callable[..., None]) -> dict[str, Callable[..., None]]:
    """The reference's kernel, then ``spoil`` with the arguments by name and the output."""
    correct = registry.delegated_to("reference")[primitive].function

    def kernel(*arguments: Any, **outputs: Any) -> None:
        correct(*arguments, **outputs)
        spoil(named(getattr(primitives, primitive), arguments), outputs.get("out"))

    return {primitive: kernel}


def before(primitive: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Callable[..., None]]:
    """``change`` the arguments, by name, then the reference's kernel."""
    correct = registry.delegated_to("reference")[primitive].function

    def kernel(*arguments: Any, **outputs: Any) -> None:
        changed = named(getattr(primitives, primitive), arguments)
        change(changed)
        correct(*positional(getattr(primitives, primitive), changed), **outputs)

    return {primitive: kernel}


@contextmanager
def throwaway(kernels: dict[str, Callable[..., None]] | None = None, **fields: Any) -> Iterator[Backend]:
    table = {**registry.delegated_to("reference"), **(kernels or {})}
    backend = Backend(NAME, ("*",), priority=-1, kernels=table, **fields)
    with registry.registered(backend):
        yield backend


def run(backend: Backend, cases: list[Case]) -> list[runner.Result]:
    return runner.run(cases, backend, torch.device("cpu"))

"""Options and fixtures of ``pytest --pyargs bnb_core.conformance --backend NAME`` (loaded by pytest_bnb_core.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bnb_core import registry
from bnb_core.conformance import runner


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bnb_core conformance")
    group.addoption("--backend", required=True, help="the backend to hold to the suite")
    group.addoption("--isa", default=None, help="one of its instruction sets")
    group.addoption("--device", default=None, help="torch device; default: the backend's first")
    group.addoption("--seed", type=int, default=0, help="of the random inputs")
    group.addoption("--thorough", action="store_true", help="also the cases that need minutes or gigabytes")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse bad options once, instead of in every test."""
    option = config.option
    try:
        backend = registry.available_backend(option.backend)
        runner.device_of(backend, option.device)
        runner.ExpectedFailures(backend.expected_failures)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.fixture(scope="session")
def expected_failures(request: pytest.FixtureRequest) -> runner.ExpectedFailures:
    """Those that the backend's author knows of."""
    return runner.ExpectedFailures(registry.available_backend(request.config.option.backend).expected_failures)


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest) -> Iterator[runner.Context]:
    """Where the cases run, on the instruction set that was asked for."""
    option = request.config.option
    backend = registry.available_backend(option.backend)
    context = runner.Context(backend.name, runner.device_of(backend, option.device), option.seed)
    with runner.instruction_set(backend, option.isa):
        yield context

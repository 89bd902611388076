"""Teaches pytest the options of ``pytest --pyargs bnb_core.conformance --backend NAME``, and no other run.

A plugin is imported by every run of pytest in its environment, so this one stands outside the package, whose import
would bring in torch.
"""

from __future__ import annotations

from typing import Any

SUITE = "bnb_core.conformance"


def pytest_load_initial_conftests(early_config: Any, parser: Any, args: list[str]) -> None:
    if any(argument.partition("::")[0].startswith(SUITE) for argument in args):
        early_config.pluginmanager.import_plugin(f"{SUITE}.options")

"""`bnb-core info`: what this machine has and which backend serves what on it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bnb_core
from bnb_core import registry, signature
from bnb_core.backend import Backend

PACKAGES = ("torch", "numpy", "safetensors")
GPU_KINDS = ("cuda", "xpu")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(as_json: bool) -> None:
    """Show versions, hardware, backends, and the backend that serves each primitive."""
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show(facts)


def collect() -> dict[str, Any]:
    """All facts as plain dicts, lists and strings.

    Raises:
        BackendError: BNB_BACKEND names what does not exist, another variable of ours cannot be used, or nothing is
            registered.
    """
    backends = {name: describe(backend) for name, backend in registry.backends().items()}
    gpus = list(find_gpus())
    devices = ["cpu", *dict.fromkeys(gpu["device"].partition(":")[0] for gpu in gpus)]
    serving = {device: registry.serving(device) for device in devices}
    return {
        "versions": {
            "bnb_core": bnb_core.__version__,
            "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES},
        },
        "cpu": {
            "model": cpu_model(),
            "torch threads": str(torch.get_num_threads()),
            "signatures of calls": signature.implementation,
        },
        "gpus": gpus,
        "backends": backends,
        "serving": {name: {d: serving[d][name] for d in devices} for name in registry.primitive_names()},
    }


def version_of(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name as Linux tells it, elsewhere as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def find_gpus() -> Iterable[dict[str, str]]:
    """Name and memory of each GPU torch sees. Counting creates no context; only the names may."""
    for kind in GPU_KINDS:
        module = getattr(torch, kind)
        for index in range(module.device_count()):
            properties = module.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.1f} GiB"
            yield {"device": f"{kind}:{index}", "name": properties.name, "memory": memory}


def describe(backend: Backend) -> dict[str, Any]:
    """One backend: available or why not, the devices it takes and what it tells of itself."""
    reason = registry.why_unavailable(backend)
    return {
        "available": reason is None,
        "unavailable because": reason,
        "devices": list(backend.device_types),
        "priority": backend.priority,
        "details": backend.facts() if reason is None else {},
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts as tables."""
    console = Console()
    machine = Table(title="Machine", show_header=False, title_justify="left")
    for name, text in facts["versions"].items():
        machine.add_row(name, text)
    for name, text in facts["cpu"].items():
        machine.add_row(f"CPU {name}" if name == "model" else name, text)
    for gpu in facts["gpus"] or [{"device": "GPU", "name": "none that torch sees", "memory": ""}]:
        machine.add_row(gpu["device"], f"{gpu['name']} {gpu['memory']}".strip())
    console.print(machine)

    backends = Table("backend", "available", "devices", "details", title="Backends", title_justify="left")
    for name, backend in facts["backends"].items():
        details = backend["unavailable because"] or lines(backend["details"])
        available = "[green]yes[/]" if backend["available"] else "[red]no[/]"
        backends.add_row(escape(name), available, escape(", ".join(backend["devices"])), escape(details))
    console.print(backends)

    devices: dict[str, str] = next(iter(facts["serving"].values()), {})
    serving = Table("primitive", *devices, title="Which backend serves", title_justify="left")
    for primitive, by_device in facts["serving"].items():
        serving.add_row(primitive, *map(escape, by_device.values()))
    console.print(serving)


def lines(details: dict[str, str]) -> str:
    """One `name: text` a line."""
    return "\n".join(f"{name}: {text}" for name, text in details.items())

"""What all tests share: the backends they run on, the golden files, a fixed seed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import bnb_core
from bnb_core import paged
from bnb_core.conformance.runner import instruction_set
from bnb_core.optim import GlobalOptimManager

GOLDEN = Path(__file__).parent / "golden"


def _backend_ids() -> list[str]:
    """The reference, and the cpu backend at every instruction set that this machine has."""
    choice = bnb_core.backends()["cpu"].instruction_sets
    return ["reference", *(f"cpu-{isa}" for isa in (choice.available() if choice else []))]


@pytest.fixture(params=_backend_ids())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve everything by this backend, strictly, on this instruction set."""
    name, _, isa = request.param.partition("-")
    with bnb_core.use_backend(name), instruction_set(bnb_core.backends()[name], isa or None):
        yield name


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_optimizer_overrides() -> Iterator[None]:
    """Those of one test do not reach the next."""
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.fixture
def paged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where paged memory lies."""
    monkeypatch.setenv(paged.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Of this process alone, for torch.distributed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def load_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a golden file and its metadata."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def state_dict_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict that a golden file holds."""
    return {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}


@pytest.fixture(params=sorted(path.stem for path in GOLDEN.glob("linear4bit_*.safetensors")))
def golden_linear4bit(request: pytest.FixtureRequest) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Each golden 4-bit checkpoint; the metadata also hold what its name says."""
    tensors, metadata = load_golden(request.param)
    quant_type, *nested, storage = request.param.removeprefix("linear4bit_").split("_")
    made = {"quant_type": quant_type, "nested": json.dumps(bool(nested)), "quant_storage": storage}
    return tensors, {**metadata, **made}

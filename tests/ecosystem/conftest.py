"""bitsandbytes is bnb_core for everything in this folder, and the real one is in a process beside it.

BNB_FACE=process (the default) gives bnb_core the name in this process; BNB_FACE=distribution expects the distribution
of the folder compat to be installed; BNB_FACE=real runs the tests on the real one: what fails there, too, is upstream.
BNB_PEER is the folder with the real bitsandbytes; without it the comparisons are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from ecosystem.upstream import FACE

import bnb_core
from bnb_core.compat.names import VERSION

if FACE == "process":
    bnb_core.install_as_bitsandbytes()

# Only now: these import what looks for bitsandbytes.
import bitsandbytes
from ecosystem import models
from ecosystem.peer import Peer

assert bitsandbytes.__version__ == ("0.50.2" if FACE == "real" else VERSION), bitsandbytes.__version__


@pytest.fixture(scope="session")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the models of models.py, before they are quantized."""
    folder = tmp_path_factory.mktemp("full_precision")
    for name in models.CONFIGS:
        models.make(name).save_pretrained(folder / name)
    return {name: folder / name for name in models.CONFIGS}


@pytest.fixture(scope="session")
def peer() -> Iterator[Peer]:
    folder = os.environ.get("BNB_PEER")
    if not folder:
        pytest.skip("BNB_PEER names no folder with the real bitsandbytes (pip install --no-deps --target)")
    process = Peer(Path(folder).resolve())
    assert process.version() == "0.50.2", process.version()
    yield process
    process.close()


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU: Accelerate's load_and_quantize_model and Diffusers quantize on a GPU or not at all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

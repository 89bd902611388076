"""What the real bitsandbytes saved loads here, and the reverse: modules and optimizers."""

from __future__ import annotations

import pytest
import torch
from ecosystem import tasks

WAYS = ["bitsandbytes to bnb_core", "bnb_core to bitsandbytes"]

# Name of the class: its options; whether the state has 8 bits.
OPTIMIZERS = {
    "AdamW": ({"lr": 1e-2}, False),
    "AdamW8bit": ({"lr": 1e-2}, True),
    "PagedAdamW8bit": ({"lr": 1e-2}, True),
    "Adam": ({"lr": 1e-2}, False),
    "Adam8bit": ({"lr": 1e-2}, True),
    "Lion": ({"lr": 1e-3}, False),
    "Lion8bit": ({"lr": 1e-3}, True),
    "PagedLion": ({"lr": 1e-3}, False),
    "SGD": ({"lr": 1e-2, "momentum": 0.9}, False),
    "SGD8bit": ({"lr": 1e-2, "momentum": 0.9}, True),
    "RMSprop": ({"lr": 1e-3}, False),
    "RMSprop8bit": ({"lr": 1e-3}, True),
    "Adagrad": ({"lr": 1e-2}, False),
    "Adagrad8bit": ({"lr": 1e-2}, True),
    "AdEMAMix": ({"lr": 1e-3}, False),
    "AdEMAMix8bit": ({"lr": 1e-3}, True),
}


def test_both_libraries_work_in_one_process_under_their_own_names(peer):
    found = peer.compare_with_bnb_core()
    assert found["version"] == "0.50.2" and found["same"]
    assert "already imported" in found["refused"]


@pytest.fixture(params=WAYS)
def libraries(request, peer):
    """The one that saves and the one that loads."""
    return (peer, tasks) if request.param == WAYS[0] else (tasks, peer)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Packed codes that are viewed as bf16 may be NaN, which equals nothing."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("module", tasks.MODULES)
def test_modules(libraries, tmp_path, module):
    saver, loader = libraries
    first, second = str(tmp_path / "first.pt"), str(tmp_path / "second.pt")
    saver.save_module(module, first)
    loader.load_module(module, first, second)
    saved, loaded = torch.load(first), torch.load(second)
    assert saved["state"].keys() == loaded["state"].keys()
    for key, value in saved["state"].items():
        other = loaded["state"][key]
        assert value.dtype == other.dtype and value.shape == other.shape and same_bytes(value, other), key
    error = (saved["output"] - loaded["output"]).abs().max()
    assert error <= 0.01 * saved["output"].abs().max(), "more than bf16 and f16 inside the real one explain"


def flat_keys(saved) -> set[str]:
    """Of a parameter's state: the real one also groups what is not quantized."""
    state = dict(saved["optimizer"]["state"][0])
    return {*state, *state.pop("__bnb_optimizer_quant_state__", {})} - {"__bnb_optimizer_quant_state__"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(libraries, tmp_path, optimizer):
    """Five steps with one library and five with the other end where ten with the first do."""
    saver, loader = libraries
    options, is_8bit = OPTIMIZERS[optimizer]
    half, end, other_end = (str(tmp_path / f"{name}.pt") for name in ("half", "end", "other_end"))
    saver.optimize(optimizer, options, None, half)
    saver.optimize(optimizer, options, half, end)
    loader.optimize(optimizer, options, half, other_end)
    (ours, theirs) = (torch.load(file) for file in (end, other_end))
    difference = (ours["parameter"] - theirs["parameter"]).abs()
    assert difference.mean() <= 1e-4 if is_8bit else difference.max() <= 1e-5
    assert flat_keys(ours) == flat_keys(theirs)

"""What the real bitsandbytes saved loads here, and the reverse: modules and optimizers."""

from __future__ import annotations

import pytest
import torch
from ecosystem import tasks
from ecosystem.tasks import same_bytes

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
    "LARS": ({"lr": 1e-2, "momentum": 0.9}, False),
    "LAMB8bit": ({"lr": 1e-2}, True),
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
    if module == "fused experts":
        assert torch.equal(saved["output"], loaded["output"]), "rows of the dequantized weight"
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


def steps(library, folder, optimizer, largest=1.0, **options) -> torch.Tensor:
    """The parameter after five steps. With entries up to 1.0, its norm is less than that of LAMB's updates."""
    library.optimize(optimizer, options, None, str(folder / "steps.pt"), largest)
    return torch.load(folder / "steps.pt")["parameter"]


LARS = {"lr": 1e-2, "momentum": 0.9}


@pytest.mark.parametrize(
    ("limited", "plain", "options"),
    [("LARS8bit", "SGD8bit", LARS), ("LAMB8bit", "Adam8bit", {"lr": 1e-2})],
)
def test_max_unorm_limits_8_bit_updates_too_unlike_in_the_real_one(peer, tmp_path, limited, plain, options):
    """The real ones are SGD8bit and Adam8bit to the bit; here they do what the ones with 32-bit state do."""
    theirs = steps(peer, tmp_path, limited, **options)
    assert torch.equal(theirs, steps(peer, tmp_path, plain, **options))
    ours = steps(tasks, tmp_path, limited, **options)
    of_32_bits = steps(tasks, tmp_path, limited.removesuffix("8bit"), **options)
    assert (ours - of_32_bits).abs().mean() <= 0.1 * (ours - theirs).abs().mean()
    assert (steps(tasks, tmp_path, limited, **options, max_unorm=0.0) - theirs).abs().mean() <= 1e-4


def lamb(norm_is_corrected: bool, lr: float = 1e-2, beta1: float = 0.9, beta2: float = 0.999) -> torch.Tensor:
    """Five steps in f64 (docs/SPEC.md section 5); optionally limited by the norm of an update without c1 and c2."""
    parameter = tasks.parameter_to_optimize(1.0).double()
    m, v = torch.zeros_like(parameter), torch.zeros_like(parameter)
    for t in range(1, 6):
        g = tasks.gradient(t - 1).double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        correction = (1 - beta2**t) ** 0.5 / (1 - beta1**t)
        update = m / (v.sqrt() + 1e-8)
        norm = update.norm() * (correction if norm_is_corrected else 1)
        parameter -= lr * min(1, parameter.norm() / norm) * correction * update
    return parameter


@pytest.mark.parametrize("optimizer", ["LAMB", "LAMB32bit"])
def test_the_norm_that_lamb_limits_is_of_the_corrected_update_unlike_in_the_real_one(peer, tmp_path, optimizer):
    ours, theirs = steps(tasks, tmp_path, optimizer, lr=1e-2), steps(peer, tmp_path, optimizer, lr=1e-2)
    assert (ours - lamb(norm_is_corrected=True)).abs().max() <= 1e-5
    assert (theirs - lamb(norm_is_corrected=False)).abs().max() <= 1e-5
    assert (ours - theirs).abs().max() > 1e-2

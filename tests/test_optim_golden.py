"""Ten steps that bitsandbytes recorded: the optimizers follow them, and take them up after the fifth."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bnb_core import optim

GOLDEN = sorted((Path(__file__).parent / "golden").glob("optim_*.safetensors"))
assert len(GOLDEN) == 13, "the golden runs are missing from tests/golden"

STEPS, SAVED_AT = 10, 5
LARGEST_SHARE_OF_OTHER_CODES = 0.015


class Run:
    """A recorded run and the same optimizer built here."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.is_8bit = metadata["class"].endswith("8bit")
        self.optimizer_class = getattr(optim, metadata["class"])
        self.arguments = {"lr": float(metadata["lr"]), **json.loads(metadata["kwargs"])}

    def start(self, name):
        p = torch.nn.Parameter(self.tensors[name].clone())
        return p, self.optimizer_class([p], **self.arguments)

    def saved_state(self):
        return {
            name.removeprefix("state5."): tensor for name, tensor in self.tensors.items() if name.startswith("state5.")
        }

    def steps(self, p, optimizer, first, last):
        for step in range(first, last):
            p.grad = self.tensors[f"g{step}"].clone()
            optimizer.step()

    def check_end(self, p):
        error = (p.detach() - self.tensors[f"p{STEPS}"]).abs()
        if self.is_8bit:
            assert error.mean() <= 1e-4
        else:
            assert error.max() <= 1e-5


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem.removeprefix("optim_"))
def run(request):
    return Run(request.param)


def test_follows_the_recorded_run(run, backend):
    p, optimizer = run.start("p0")
    run.steps(p, optimizer, 0, SAVED_AT)
    state = optimizer.state[p]
    for name, saved in run.saved_state().items():
        assert state[name].shape == saved.shape
        if saved.dtype == torch.uint8:
            assert (state[name] != saved).double().mean() <= LARGEST_SHARE_OF_OTHER_CODES
        elif name.startswith("qmap"):
            assert torch.equal(state[name], saved)
        else:
            torch.testing.assert_close(state[name], saved, rtol=1e-4, atol=1e-6)
    run.steps(p, optimizer, SAVED_AT, STEPS)
    run.check_end(p)


@pytest.mark.parametrize("grouped", [False, True], ids=["flat", "grouped"])
def test_resumes_the_recorded_run(run, backend, grouped):
    p, optimizer = run.start("p5")
    state = run.saved_state()
    if grouped:
        state = {"__bnb_optimizer_quant_state__": state}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: {"step": SAVED_AT, **state}}, "param_groups": groups})
    run.steps(p, optimizer, SAVED_AT, STEPS)
    run.check_end(p)

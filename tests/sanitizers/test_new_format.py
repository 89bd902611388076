"""A format added to a copy of the source is held to the suite on the reference, the CPU and CUDA; layers take it.

The kernels are those that are built with the sanitizers: they are built once, and HIP's are CUDA's.
"""

from __future__ import annotations

import pytest
from compilers import needs
from sanitizers.new_format import NAME
from sanitizers.sanitized import MEMORY, run

pytestmark = needs("gcc", remedy="apt-get install g++, with its sanitizer runtimes")


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-sim"])
def test_the_suite_holds_a_new_format_to_the_contract(package, backend):
    command = ["-m", "bnb_core", "conformance", "--backend", backend, "--case", f"*{NAME}*"]
    if backend == "cpu":
        command += ["--isa", "all"]
    result = run(package(MEMORY), MEMORY, *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout and " 0 passed" not in result.stdout


def test_layers_and_checkpoints_take_it(package):
    code = """
import torch, bnb_core
torch.manual_seed(0)
options = dict(quant_type="even4", compute_dtype=torch.float32, compress_statistics=False)
layer = bnb_core.nn.Linear4bit(64, 32, **options)
weight = layer.weight.data.clone()
layer.to("cpu")
again = bnb_core.nn.Linear4bit(64, 32, **options)
again.load_state_dict(layer.state_dict())
x = torch.randn(3, 64)
assert torch.equal(layer(x), again(x))
error = (bnb_core.functional.dequantize_4bit(layer.weight, layer.weight.quant_state) - weight).abs().max()
farthest = weight.abs().max() / 8  # of the least weight from the least code, and a rounding to f32
assert error <= farthest * 1.000001, error
"""
    result = run(package(MEMORY), MEMORY, "-c", code)
    assert result.returncode == 0, result.stderr

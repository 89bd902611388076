"""The kernels of the CPU, and those of GPUs in the simulator, under sanitizers, held to the conformance suite.

Kernels that read a vector at a time are checked where it matters: at the ends of buffers. The thread sanitizer sees
the threads of a GPU's block as threads, and blocks on two of the machine's.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from compilers import needs
from sanitizers.sanitized import MEMORY, RUNTIMES, THREADS, run

from bnb_core import registry

pytestmark = needs("gcc", remedy="apt-get install g++, with its sanitizer runtimes")


@pytest.mark.parametrize("module", ["cpu._kernels", "sim._cuda_kernels"])
def test_a_read_beyond_a_buffer_is_found(package, module):
    """Of the absmax of dequantize_4bit, two scales short."""
    code = (
        f"import torch, importlib; k = importlib.import_module('bnb_core.backends.{module}')\n"
        "packed, out = torch.zeros(512, dtype=torch.uint8), torch.zeros(1024)\n"
        "absmax = torch.zeros(14)\n"
        "k.dequantize_4bit((packed, (1024,), absmax, 64, 'nf4', None, None, None, 256), out, 0)\n"
    )
    result = run(package(MEMORY), MEMORY, "-c", code)
    assert result.returncode != 0
    assert "heap-buffer-overflow" in result.stderr


def only(names):
    return tuple(word for name in names for word in ("--primitive", name))


# One order of lanes is enough here: it changes neither which addresses are touched nor what is ordered. One dtype shows
# what a template does, and float32 has kernels of its own for products. The API's cases call kernels that the others
# call, too. A case takes seconds in the simulator under the thread sanitizer: they are few. The longest come first.
CLASSES, PAIRS = ("--cover", "classes"), ("--cover", "pairs")
BFLOAT16 = ("--dtype", "bfloat16")
FLOAT32 = ("--dtype", "float32")
PRODUCTS = only(("gemm_4bit", "grouped_gemm_4bit", "grouped_gemm_4bit_backward", "int8_mixed_scaled_mm"))
PRIMITIVES = only(registry.primitive_names())
CONFORMANCE = [
    ("cuda-sim", THREADS, (*CLASSES, *BFLOAT16, *PRIMITIVES)),
    ("cuda-sim", THREADS, (*CLASSES, *FLOAT32, *PRODUCTS)),
    ("cpu", MEMORY, (*PAIRS, "--isa", "all")),
    ("cuda-sim", MEMORY, (*PAIRS, *BFLOAT16)),
    ("cuda-sim", MEMORY, (*CLASSES, *FLOAT32, *PRODUCTS)),
]


@pytest.fixture(scope="session")
def runs(package):
    """All of them, as many at once as there are cores."""
    folders = {sanitizer: package(sanitizer) for sanitizer in RUNTIMES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            (backend, sanitizer, options): pool.submit(
                run, folders[sanitizer], sanitizer, "-m", "bnb_core", "conformance", "--backend", backend, *options
            )
            for backend, sanitizer, options in CONFORMANCE
        }
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", CONFORMANCE, ids=lambda name: f"{name[0]}-{name[1]}")
def test_the_conformance_suite_passes(runs, name):
    result = runs[name]
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert "ThreadSanitizer" not in result.stderr

"""The kernels of the CPU, and those of GPUs in the simulator, under sanitizers, held to the conformance suite.

Kernels that read a vector at a time are checked where it matters: at the ends of buffers. The thread sanitizer sees
the threads of a GPU's block as threads, and blocks on two of the machine's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from compilers import needs

ROOT = Path(__file__).parents[2]
MEMORY = "address,undefined"
THREADS = "thread"
# The runtimes that must be loaded before the interpreter's own libraries.
RUNTIMES = {MEMORY: ("libasan.so", "libubsan.so"), THREADS: ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    # numpy's and torch's own libraries are not built for the thread sanitizer, nor is the OpenMP runtime.
    "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

pytestmark = needs("gcc", remedy="apt-get install g++, with its sanitizer runtimes")


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Gives the folder of the package whose kernels are built with a sanitizer."""

    @cache
    def build(sanitizer: str) -> Path:
        folder = tmp_path_factory.mktemp("sanitized")
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "__pycache__"))
        flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=undefined -O1"
        options = {"CFLAGS": flags, "CXXFLAGS": flags, "LDFLAGS": f"-fsanitize={sanitizer}"}
        sets = {"BNB_BUILD": "cpu,sim" if sanitizer == MEMORY else "sim"}
        environment = {**os.environ, "CC": "gcc", "CXX": "g++", **options, **sets}
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--target", str(folder / "package"), str(source)], env=environment, check=True)
        return folder / "package"

    return build


def _run(folder: Path, sanitizer: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    find = ["gcc", "-print-file-name="]
    libraries = [
        subprocess.run([find[0], find[1] + name], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    environment = {
        **os.environ,
        **OPTIONS,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(libraries),
        **variables,
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=3600)


@pytest.mark.parametrize("module", ["cpu._kernels", "sim._cuda_kernels", "sim._hip_kernels"])
def test_a_read_beyond_a_buffer_is_found(package, module):
    """Of the absmax of dequantize_4bit, two scales short."""
    code = (
        f"import torch, importlib; k = importlib.import_module('bnb_core.backends.{module}')\n"
        "packed, out = torch.zeros(512, dtype=torch.uint8), torch.zeros(1024)\n"
        "absmax = torch.zeros(14)\n"
        "k.dequantize_4bit((packed, (1024,), absmax, 64, 'nf4', None, None, None, 256), out, 0)\n"
    )
    run = _run(package(MEMORY), MEMORY, "-c", code)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr


# One order of lanes is enough here: it changes neither which addresses are touched nor what is ordered. One dtype shows
# what a template does, and float32 has kernels of its own for products. HIP's kernels are CUDA's in other names: what
# waves of 64 change is to be seen. The longest come first.
WAVE = {"BNB_SIM_WARP": "64"}
BFLOAT16 = ("--dtype", "bfloat16")
PRODUCTS = ("gemm_4bit", "grouped_gemm_4bit", "grouped_gemm_4bit_backward", "int8_mixed_scaled_mm")
FLOAT32 = ("--dtype", "float32", *(word for name in PRODUCTS for word in ("--primitive", name)))
CONFORMANCE = [
    ("cuda-sim", THREADS, BFLOAT16, {}),
    ("hip-sim", THREADS, BFLOAT16, WAVE),
    ("cuda-sim", THREADS, FLOAT32, {}),
    ("cpu", MEMORY, ("--isa", "all"), {}),
    ("cuda-sim", MEMORY, BFLOAT16, {}),
    ("hip-sim", MEMORY, BFLOAT16, WAVE),
    ("cuda-sim", MEMORY, FLOAT32, {}),
]


@pytest.fixture(scope="session")
def runs(package):
    """All of them, as many at once as there are cores."""
    folders = {sanitizer: package(sanitizer) for sanitizer in RUNTIMES}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            (backend, sanitizer, options): pool.submit(
                _run,
                folders[sanitizer],
                sanitizer,
                "-m",
                "bnb_core",
                "conformance",
                "--backend",
                backend,
                *options,
                **variables,
            )
            for backend, sanitizer, options, variables in CONFORMANCE
        }
    return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", [row[:3] for row in CONFORMANCE], ids=lambda name: f"{name[0]}-{name[1]}")
def test_the_conformance_suite_passes(runs, name):
    run = runs[name]
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert "ThreadSanitizer" not in run.stderr

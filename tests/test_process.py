"""The cpu backend in the process it shares with torch: one OpenMP runtime, and results that threads do not change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compilers import needs

import bnb_core
from bnb_core import functional as F
from bnb_core import optim

OPENMP = re.compile(r"\S*/lib(?:gomp|iomp5|omp)[-.\w]*")
USE_ALL_THREADS = """
import torch, bnb_core
weight = torch.randn(1024, 1024)
packed, state = bnb_core.functional.quantize_4bit(weight)
bnb_core.matmul_4bit(torch.randn(64, 1024), packed.t(), state)
torch.randn(2048, 2048) @ torch.randn(2048, 2048)
print(open("/proc/self/maps").read())
print("serves:", bnb_core.backends()["cpu"].details()["openmp"])
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_the_process_holds_one_openmp_runtime_and_the_kernels_run_on_it():
    command = [sys.executable, "-c", USE_ALL_THREADS]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    maps, _, serving = output.rpartition("serves:")
    runtimes = set(OPENMP.findall(maps))
    assert len(runtimes) == 1
    assert Path(serving.strip()).resolve() == Path(runtimes.pop()).resolve()


ON_ANOTHER_RUNTIME = """
import ctypes, sys, torch
import test_process
from bnb_core.backends.cpu import _kernels
before = test_process._everything()
library = ctypes.CDLL(sys.argv[1])
_kernels.set_openmp(sys.argv[1])
after = test_process._everything()
print(_kernels.openmp_path(), ctypes.c_int.in_dll(library, "forks").value, all(map(torch.equal, before, after)))
"""


@needs("g++", remedy="apt-get install g++")
def test_a_runtime_of_llvms_interface_alone_serves_too(tmp_path):
    """As torch's does on Windows."""
    here, library = Path(__file__).parent, tmp_path / "libruntime.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, str(here / "llvm_openmp.cpp"), "-o", str(library)], check=True, timeout=120)
    command = [sys.executable, "-c", ON_ANOTHER_RUNTIME, str(library)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    path, forks, same = run.stdout.split()
    assert (path, same) == (str(library), "True")
    assert int(forks) > 0


def _cpu_backend(**environment):
    """Name of the instruction set in use, or why the backend is unavailable, in a fresh interpreter."""
    code = "import bnb_core; b = bnb_core.backends()['cpu']; print(b.unavailable or b.details()['isa'])"
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=variables, cwd=Path(__file__).parent
    ).stdout.strip()


@pytest.mark.parametrize("isa", bnb_core.backends()["cpu"].instruction_sets.available())
def test_the_environment_caps_the_instruction_set(isa):
    assert _cpu_backend(BNB_CPU_ISA=isa) == isa


def _everything():
    """One result of each kind of kernel, large enough to be shared out among threads."""
    A = torch.randn(300, 1031, generator=torch.Generator().manual_seed(1))
    packed, state = F.quantize_4bit(A, compress_statistics=True, quant_type="nf4")
    codes, blockwise = F.quantize_blockwise(A, blocksize=256)
    q, stats, _ = F.int8_vectorwise_quant(A, threshold=2.0)
    p = torch.nn.Parameter(A.clone())
    p.grad = A.cos()
    optim.LAMB8bit([p], lr=0.01).step()
    products = [F.gemm_4bit(A[:rows], packed, state) for rows in (1, 3, 40, 300)]
    dense = [F.dequantize_4bit(packed, state), F.dequantize_blockwise(codes, blockwise)]
    return [packed, state.absmax, codes, q, stats, F.int8_linear_matmul(q, q), p.detach(), *products, *dense]


@pytest.fixture
def threads_restored():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(backend, threads_restored):
    if backend == "reference":
        pytest.skip("the reference is torch's own matmul, which promises no such thing")
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(_everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_python_threads_do_not_disturb_one_another():
    expected = _everything()
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: _everything(), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

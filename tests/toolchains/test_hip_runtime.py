"""The HIP kernels as a wheel has them: they link no HIP runtime, and find one when they are called.

AMD's runtime computes nothing without its GPU. One of ours stands in for it, which says what it was asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from toolchains.conftest import CLANG_ARCHS, needs_clang
from wheel_builds import TORCHS_GLIBC

STAND_IN = Path(__file__).parents[1] / "hip_runtime.cpp"

pytestmark = [
    needs_clang,
    pytest.mark.skipif(torch.version.hip is not None, reason="this torch has loaded AMD's own runtime"),
]

LOAD = """
import ctypes, importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "amdhip64" not in open("/proc/self/maps").read()
"""

REFUSED = """
print(module.archs, module.driver_version(), module.missing_runtime(), sep="\\n")
codes, absmax, code, out = torch.zeros(8, dtype=torch.uint8), torch.ones(1), torch.zeros(256), torch.ones(8)
try:
    module.dequantize_blockwise(codes, absmax, code, 64, out, 0)
except RuntimeError as error:
    print(error)
"""

LAUNCHED = """
n, blocksize, stream = 10_000, 64, 0x5170
codes, code = torch.zeros(n, dtype=torch.uint8), torch.zeros(256)
absmax, out = torch.zeros(157), torch.empty(n)
module.dequantize_blockwise(codes, absmax, code, blocksize, out, stream)
assert module.missing_runtime() is None
runtime = ctypes.CDLL(module.runtime_path())
runtime.launches.restype = ctypes.c_char_p
# A thread dequantizes 16 values and a block has 256 threads; the shift by 6 is a division by the blocksize.
expected = [3, 1, 1, 256, 1, 1, 0, stream]
expected += [codes.data_ptr(), absmax.data_ptr(), code.data_ptr(), n, 6, out.data_ptr()]
assert [int(number) for number in runtime.launches().split()] == expected, (runtime.launches(), expected)
print(module.runtime_path(), module.driver_version(), runtime.registered_kernels(), sep="\\n")
"""


@pytest.fixture(scope="module")
def module(hip_wheel, tmp_path_factory) -> Path:
    with zipfile.ZipFile(hip_wheel.wheel) as wheel:
        return Path(wheel.extract("bnb_core/backends/hip/_kernels.abi3.so", tmp_path_factory.mktemp("unpacked")))


def stand_in(file: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-D__HIP_PLATFORM_AMD__", f"-Wl,-soname,{file.name}", *flags]
    subprocess.run([*command, str(STAND_IN), "-o", str(file)], check=True, timeout=300)
    return file


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    return stand_in(tmp_path_factory.mktemp("runtime") / "libamdhip64.so.7")


def said_by(code: str, *arguments: object, libraries: Path | None = None) -> list[str]:
    """The lines that a process prints which has loaded the module, its first argument."""
    variables = {**os.environ, "LD_LIBRARY_PATH": "" if libraries is None else str(libraries)}
    command = [sys.executable, "-c", LOAD + code, *map(str, arguments)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def functions(module: Path, *options: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", *options, str(module)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def test_the_module_links_no_runtime_and_keeps_its_functions_to_itself(module):
    needed = subprocess.run(["readelf", "-d", str(module)], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and "amdhip64" not in needed
    assert [name for name in functions(module) if re.match("(__)?hip", name)] == []
    assert {"PyInit__kernels", "cdequantize_blockwise_fp32"} <= functions(module, "--defined-only")


def kernels_of(objects: Path) -> int:
    """How many kernels the compiler made, each of which has a handle on the host."""
    stubs = set()
    for path in objects.rglob("*.o"):
        listing = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout
        stubs |= set(re.findall(r"_Z\w*__device_stub__\w+", listing))
    return len(stubs)


def test_the_wheel_is_for_the_linuxes_of_torch(hip_wheel):
    command = [sys.executable, "-m", "auditwheel", "show", str(hip_wheel.wheel)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    found = re.search(r"manylinux_(\d+)_(\d+)_x86_64", said)
    assert found is not None, said
    assert (int(found[1]), int(found[2])) <= TORCHS_GLIBC


def test_without_a_runtime_the_module_is_loaded_and_every_call_says_what_is_missing(module, tmp_path):
    """The module looks for a name that no library has, as the machine may have AMD's."""
    lost = tmp_path / module.name
    lost.write_bytes(module.read_bytes().replace(b"libamdhip64", b"libnowhere1"))
    archs, driver, missing, error = said_by(REFUSED, lost)
    assert archs.split() == list(CLANG_ARCHS)
    assert driver == "0"
    assert missing.startswith("there is no HIP runtime")
    assert "none of libnowhere1.so.7, .so.6, .so.5 and libnowhere1.so could be loaded; install" in missing
    assert error == f"hipGetDevice: {missing}"


def test_a_runtime_that_cannot_be_loaded_is_named_with_the_reason(module, tmp_path):
    for file in ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"):
        (tmp_path / file).write_bytes(b"")
    missing = said_by(REFUSED, module, libraries=tmp_path)[2]
    assert re.search(r"\(libamdhip64\.so\.6: \S+/libamdhip64\.so\.6: file too short\)", missing)


def test_a_runtime_that_is_too_old_is_told_by_what_it_lacks(module, tmp_path):
    old = stand_in(tmp_path / "libamdhip64.so.7", "-DWITHOUT_POOLS")
    missing = said_by(REFUSED, module, libraries=tmp_path)[2]
    lacking = "hipMallocFromPoolAsync, hipMemPoolCreate, hipMemPoolSetAttribute"
    assert missing == f"the HIP runtime {old} has no {lacking}; ROCm 5.1 and newer have"


def test_a_runtime_is_found_by_name_has_all_kernels_and_launches_them(hip_wheel, module, runtime):
    path, driver, kernels = said_by(LAUNCHED, module, libraries=runtime.parent)
    assert (path, driver) == (str(runtime), "60300000")
    assert int(kernels) == kernels_of(hip_wheel.objects)


def test_a_runtime_that_the_process_has_loaded_comes_first_whatever_its_file_is_called(module, runtime, tmp_path):
    torchs = stand_in(tmp_path / "libamdhip64-5170cafe.so.6")
    path, *_ = said_by("ctypes.CDLL(sys.argv[2])\n" + LAUNCHED, module, torchs, libraries=runtime.parent)
    assert path == str(torchs)

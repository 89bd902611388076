"""What it takes to build csrc_cuda with NVIDIA's compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from csrc_shared.environment import listed

DEFAULT_ARCHS = ("75", "80", "86", "89", "90", "100", "120")
"""What is built where no GPU is visible and none is named, as far as the compiler knows them."""

# -fmad=false: the results are promised to the bit, and a contraction would change them; kernels say fmaf where one
# is wanted. Division and square root are exact by default.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",
    "-Werror",
    "all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror",
]


def installed() -> bool:
    return _nvcc_or_none() is not None


@cache
def _nvcc_or_none() -> Path | None:
    """nvcc of CUDA_HOME or of the PATH; the file itself, since the toolkit's folders lie beside it."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    return Path(found) if found else None


def nvcc() -> Path:
    found = _nvcc_or_none()
    if found is None:
        raise SystemExit(
            "BNB_BUILD=cuda needs nvcc 11.8 or newer, and none was found in CUDA_HOME/bin or on the PATH. On Debian "
            "and Ubuntu, with NVIDIA's package repository: apt install cuda-toolkit."
        )
    return found


@cache
def _toolkit_folder() -> Path:
    """Where the compiler says its toolkit is: nvcc on the PATH may be a script that calls another one."""
    command = [str(nvcc()), "-dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    match = re.search(r"^#\$ TOP=(.*)$", report, re.MULTILINE)
    if match is None:
        raise SystemExit(f"{nvcc()} does not tell where its toolkit is; set CUDA_HOME")
    return Path(match[1]).resolve()


def include_folder() -> str:
    return str(_toolkit_folder() / "include")


def library_folders() -> list[str]:
    return [str(folder) for folder in (_toolkit_folder() / "lib64", _toolkit_folder() / "lib") if folder.is_dir()]


# The runtime is linked into the module, so that it depends on no installed CUDA, and hidden in it: torch has its own.
LIBRARIES = ["cudart_static", "pthread", "rt", "dl"]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"]


def known_archs() -> list[str]:
    """The architectures that this nvcc compiles for, such as 75 and 90."""
    command = [str(nvcc()), "--list-gpu-code"]
    return re.findall(r"sm_(\w+)", subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@cache
def release() -> int:
    """The major version of this nvcc."""
    report = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)", report)
    if match is None:
        raise SystemExit(f"{nvcc()} --version names no release: {report!r}")
    return int(match[1])


def visible_archs() -> list[str]:
    """Those of the GPUs of this machine."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted({line.strip().replace(".", "") for line in report.splitlines() if line.strip()}, key=int)


def archs() -> list[str]:
    """What to build for: BNB_CUDA_ARCHS, else the GPUs of this machine, else every usual one."""
    known = known_archs()
    requested = listed("BNB_CUDA_ARCHS", ";", "80;90")
    for arch in requested:
        if arch not in known:
            raise SystemExit(f"BNB_CUDA_ARCHS: expected what {nvcc()} compiles for, {';'.join(known)}, got {arch!r}")
    return requested or visible_archs() or [arch for arch in DEFAULT_ARCHS if arch in known]


def compile_command(archs: list[str], source: str) -> list[str]:
    """nvcc with its flags: machine code for each architecture, and the last one's PTX for chips to come."""
    # Hopper's own instructions (csrc_cuda/wgmma.h) are in the target 90a, which compilers before CUDA 12 lack.
    own = {"90": "90a"} if release() >= 12 else {}
    targets = [own.get(arch, arch) for arch in archs]
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    newest = archs[-1]
    ptx = f"-gencode=arch=compute_{newest},code=compute_{newest}"
    return [str(nvcc()), *FLAGS, *_same_bytes(source), "-t", "2", *codes, ptx]


def _same_bytes(source: str) -> list[str]:
    """Names that nvcc otherwise makes up of random numbers and of its process; it makes others of a source's folder."""
    return [f"-frandom-seed={Path(source).stem}", "--objdir-as-tempdir"] if release() >= 13 else []

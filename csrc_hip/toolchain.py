"""What it takes to build csrc_cuda for AMD's GPUs: its sources in HIP's names, and AMD's compiler."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

from csrc_shared.environment import listed

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc_cuda"
UNCHANGED = ("csrc_shared", "csrc_hip")
"""Folders that the sources include and that are the same for both makers."""

DEFAULT_ARCHS = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201")
"""What is built where no GPU is visible and none is named."""

ARCH = r"gfx[0-9a-z-]+(:(xnack|sramecc)[+-])*"
"""What hipcc calls a chip or a family of them, with or without the features it is set to."""

# Results are promised to the bit: no contraction, and divisions and square roots rounded correctly.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# What this HIP lacks is found in a folder that is searched last.
INCLUDE = ["-idirafter", str(ROOT / "csrc_hip" / "include")]
# runtime.cpp finds AMD's runtime, whose functions it defines for this module alone. The module stays for good, as the
# runtime knows its kernels.
LINK_FLAGS = [f"-Wl,--version-script={ROOT / 'csrc_hip' / 'runtime.map'}", "-Wl,-z,nodelete"]
# Without a language hipcc would compile files of host code for a GPU, too. What HIPCXX has for GPUs is not used there.
HOST_FLAGS = ["-x", "c++", "-D__HIP_PLATFORM_AMD__=1", "-Wno-unused-command-line-argument"]
DEVICE_FLAGS = ["-x", "hip", "-D__HIP_PLATFORM_AMD__=1", "-fhip-fp32-correctly-rounded-divide-sqrt"]


def hipify(output: Path) -> dict[str, Path]:
    """Write csrc_cuda in HIP's names into ``output``/csrc_cuda; gives the file that each source became.

    torch's hipify does the renaming: it is what users of torch on ROCm build their extensions with. The same sources
    give the same files, and files that it has written once it leaves as they are.
    """
    try:
        from torch.utils.hipify import hipify_python
    except ImportError as error:
        raise SystemExit(
            "BNB_BUILD=hip needs torch while it builds, for torch.utils.hipify: pip install --no-build-isolation ."
        ) from error
    output = output.resolve()
    target = output / SOURCES.name
    shutil.rmtree(output, ignore_errors=True)
    for name in UNCHANGED:
        shutil.copytree(ROOT / name, output / name, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        results = hipify_python.hipify(
            project_directory=str(SOURCES),
            output_directory=str(target),
            header_include_dirs=[str(target)],
            includes=[f"{target}/*"],
            is_pytorch_extension=True,
        )
    # It also tells of what it was asked for earlier in this process.
    own = {Path(source): result for source, result in results.items() if Path(source).parent == target}
    renamed = {source: Path(result.hipified_path or source) for source, result in own.items()}
    for source, result in renamed.items():
        if result != source:
            source.unlink()
    return {f"{SOURCES.name}/{source.name}": result for source, result in sorted(renamed.items())}


def installed() -> bool:
    return _compiler_or_none() is not None


def _compiler_or_none() -> list[str] | None:
    """The command that HIPCXX holds, or hipcc of ROCM_PATH, of the PATH or of ROCm's usual folder."""
    named = os.environ.get("HIPCXX", "").split()
    if named:
        return named
    home = os.environ.get("ROCM_PATH")
    hipcc = shutil.which("hipcc", path=f"{home}/bin" if home else None)
    found = hipcc if hipcc or home else shutil.which("hipcc", path="/opt/rocm/bin")
    return [found] if found else None


def compiler() -> list[str]:
    """What compiles HIP: hipcc, or what HIPCXX names, as CMake does, a Clang with the flags that it needs there."""
    found = _compiler_or_none()
    if found is None:
        raise SystemExit(
            "BNB_BUILD=hip needs hipcc, and none was found in ROCM_PATH/bin, on the PATH or in /opt/rocm/bin. It comes "
            "with ROCm; on Debian and Ubuntu: apt install hipcc. A Clang that compiles HIP: set HIPCXX."
        )
    if shutil.which(found[0]) is None:
        raise SystemExit(f"HIPCXX: expected a compiler and its flags, but {found[0]!r} was not found")
    return found


def visible_archs() -> list[str]:
    """Those of the GPUs of this machine."""
    try:
        command = [str(Path(compiler()[0]).with_name("rocm_agent_enumerator"))]
        report = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return sorted(set(re.findall(r"^gfx(?!000)\w+", report, re.MULTILINE)))


def archs() -> list[str]:
    """What to build for: BNB_HIP_ARCHS, else the GPUs of this machine, else usual ones."""
    requested = listed("BNB_HIP_ARCHS", ";", "gfx90a;gfx1100")
    for arch in requested:
        if not re.fullmatch(ARCH, arch):
            raise SystemExit(f"BNB_HIP_ARCHS: expected names of chips such as gfx90a or gfx90a:xnack+, got {arch!r}")
    return requested or visible_archs() or list(DEFAULT_ARCHS)


def sources(hipified: dict[str, Path]) -> list[Path]:
    """What is to be compiled of hipify's files."""
    return [path for path in hipified.values() if path.suffix in (".cu", ".hip", ".cpp")]


def compile_command(archs: list[str], source: str) -> list[str]:
    """The compiler with its flags; env, because where nvcc is installed too, hipcc would call that one."""
    command = ["env", "HIP_PLATFORM=amd", *compiler(), *FLAGS, *INCLUDE]
    if source.endswith(".cpp"):
        return [*command, *HOST_FLAGS]
    # The compiler would name a file for its folder, and in another one make other bytes.
    name = f"-cuid={Path(source).stem}"
    return [*command, *DEVICE_FLAGS, name, *(f"--offload-arch={arch}" for arch in archs)]

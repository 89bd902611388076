"""AMD's device libraries as Debian and Ubuntu have them, with what they lack for newer chips.

    python -m csrc_hip.device_libraries FOLDER

FOLDER gets links to all that the system has, and for each chip to build for the one file that is a chip's own: it says
what the instruction set is. So a Clang that is newer than the libraries compiles for chips that these do not know:

    HIPCXX="clang++-19 --rocm-path=/usr --rocm-device-lib-path=FOLDER"
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from csrc_hip import toolchain

SYSTEM = Path("/usr/lib/x86_64-linux-gnu/amdgcn/bitcode")


def isa_version(chip: str) -> int:
    """The number that the libraries have for an instruction set: 9010 for gfx90a, whose version is 9.0.10."""
    match = re.fullmatch(r"gfx(\d+)(\d)([0-9a-f])(:.*)?", chip)
    if match is None:
        raise SystemExit(f"device libraries: expected a chip such as gfx942, got {chip!r}")
    return 1000 * int(match[1]) + 100 * int(match[2]) + int(match[3], 16)


def write(folder: Path, chips: list[str], clang: str = "clang-19") -> None:
    """Write the libraries into ``folder``, which is made; raises SystemExit where the system has none."""
    if not SYSTEM.is_dir():
        raise SystemExit(f"there are no device libraries in {SYSTEM}; on Debian and Ubuntu: apt install hipcc")
    folder.mkdir(parents=True, exist_ok=True)
    for library in SYSTEM.glob("*.bc"):
        if not (folder / library.name).exists():
            (folder / library.name).symlink_to(library)
    for chip in chips:
        output = folder / f"oclc_isa_version_{chip.removeprefix('gfx').partition(':')[0]}.bc"
        if output.exists():
            continue
        source = output.with_suffix(".ll")
        source.write_text(
            'target triple = "amdgcn-amd-amdhsa"\n'
            "@__oclc_ISA_version = linkonce_odr hidden local_unnamed_addr addrspace(4) constant "
            f"i32 {isa_version(chip)}, align 4\n"
        )
        options = ["--target=amdgcn-amd-amdhsa", "-nogpulib", "-x", "ir", "-c", "-emit-llvm"]
        subprocess.run([clang, *options, str(source), "-o", str(output)], check=True, timeout=60)


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve(), toolchain.archs())

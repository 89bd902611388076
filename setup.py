"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

BNB_BUILD names the kernel sets to build, separated by commas; cpu by default.
"""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AMX = [*AVX512_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"]

# Each source with the flags of its own. An instruction set's flags go to its target and nowhere else: they
# let the compiler use instructions that another machine lacks, even in code that runs before the choice.
CPU_SOURCES = {
    "csrc_shared/bindings.cpp": ["-DBNB_MODULE_NAME=_kernels"],
    "csrc_cpu/module.cpp": [],
    "csrc_cpu/dispatch.cpp": [],
    "csrc_cpu/memory.cpp": [],
    "csrc_cpu/threads.cpp": [],
    "csrc_cpu/targets/portable.cpp": [],
}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_SOURCES |= {
        "csrc_cpu/targets/avx2.cpp": AVX2,
        "csrc_cpu/targets/avx512.cpp": AVX512,
        "csrc_cpu/targets/avx512_vnni.cpp": AVX512_VNNI,
        "csrc_cpu/targets/amx.cpp": AMX,
    }


class KernelExtension(Extension):
    """An extension whose sources have flags of their own and depend on all headers of some folders."""

    def __init__(self, name: str, source_flags: dict[str, list[str]], header_folders: list[str]):
        headers = [str(header) for folder in header_folders for header in Path(folder).rglob("*.h")]
        super().__init__(
            name,
            sources=list(source_flags),
            depends=[*headers, "setup.py"],
            include_dirs=[pybind11.get_include()],
            libraries=["dl"],
            language="c++",
        )
        self.source_flags = source_flags


KERNEL_SETS = {
    "cpu": KernelExtension("bnb_core.backends.cpu._kernels", CPU_SOURCES, ["csrc_shared", "csrc_cpu"]),
}


class BuildKernels(build_ext):
    """Compiles the sources of an extension in parallel, each with its own flags."""

    def build_extension(self, ext: KernelExtension) -> None:
        compiler = self.compiler.compiler_cxx[0]
        if not shutil.which(compiler):
            raise SystemExit(
                f"bnb_core's kernels need a C++17 compiler, and {compiler!r} was not found. "
                "On Debian and Ubuntu: apt install build-essential. Another compiler: set CXX."
            )
        compile_one = type(self.compiler).compile

        def compile_all(sources, extra_postargs=None, **keywords):
            def job(source):
                flags = [*FLAGS, *WARNINGS, *ext.source_flags[source]]
                return compile_one(self.compiler, [source], extra_postargs=flags, **keywords)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [built for objects in pool.map(job, sources) for built in objects]

        self.compiler.compile = compile_all
        super().build_extension(ext)


def kernel_sets() -> list[KernelExtension]:
    names = [name.strip() for name in os.environ.get("BNB_BUILD", "cpu").split(",") if name.strip()]
    for name in names:
        if name not in KERNEL_SETS:
            raise SystemExit(f"BNB_BUILD={name}: this version builds: {', '.join(KERNEL_SETS)}")
    return [KERNEL_SETS[name] for name in names]


setup(ext_modules=kernel_sets(), cmdclass={"build_ext": BuildKernels})

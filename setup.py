"""Builds the compiled kernels; everything else about the package stands in pyproject.toml.

BNB_BUILD names the kernel sets to build, separated by commas: cpu, cuda, hip, and what simulates them, cpu-sim,
cuda-sim, hip-sim. By default cpu, and cuda or hip where both the compiler and such a GPU are on the machine.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from csrc_cuda import toolchain as cuda
from csrc_hip import toolchain as hip
from csrc_shared.bill_of_materials import bill_of_materials
from csrc_shared.environment import listed

# A Python for several architectures would have each source compiled for all of them, by flags of one.
if sys.platform == "darwin":
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

FLAGS = ["-std=c++17", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]

# Python's stable interface as of the oldest Python that we serve: one build for all of them.
HAS_STABLE_INTERFACE = not sysconfig.get_config_var("Py_GIL_DISABLED")
PYTHON_INTERFACE = ["-DPy_LIMITED_API=0x030A0000"] if HAS_STABLE_INTERFACE else []

OLDEST_GLIBC = "csrc_shared/oldest_glibc.cpp"
OLDEST_GLIBC_OF_CUDART = "csrc_shared/oldest_glibc_of_cudart.cpp"
HIPIFIED = Path("build/hipified")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_VNNI = [*AVX512, "-mavx512vnni"]
AVX512_BF16 = [*AVX512_VNNI, "-mavx512bf16", "-mavx512vbmi", "-mavx512bitalg"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]

NEON = ["-march=armv8-a"]
NEON_DOTPROD = ["-march=armv8.2-a+dotprod"]
NEON_I8MM = ["-march=armv8.2-a+dotprod+i8mm"]


def machine() -> str:
    """The one to build for, such as x86_64; another than this one where Python's own variable for that names it."""
    return os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).rpartition("-")[2]


def for_x86() -> bool:
    return machine() in ("x86_64", "AMD64", "amd64")


def for_windows() -> bool:
    return os.environ.get("_PYTHON_HOST_PLATFORM", sys.platform).startswith("win")


Command = Callable[[list[str], str], list[str]]
"""The command that compiles a source, without its own flags, from the host compiler's command and the source."""


def host_command(host: list[str], source: str, optimization: str = "-O3") -> list[str]:
    """The builder's own flags come last, so that they hold."""
    return [*host, optimization, *FLAGS, *WARNINGS, *os.environ.get("CXXFLAGS", "").split()]


class KernelExtension(Extension):
    """An extension whose sources have flags of their own and depend on all headers of some folders."""

    def __init__(
        self,
        name: str,
        source_flags: dict[str, list[str]],
        header_folders: list[str],
        command: Command = host_command,
        **options: object,
    ):
        headers = [str(header) for folder in header_folders for header in Path(folder).rglob("*.h")]
        super().__init__(
            name,
            sources=list(source_flags),
            depends=[*headers, "setup.py"],
            language="c++",
            py_limited_api=HAS_STABLE_INTERFACE,
            **{"libraries": [] if for_windows() else ["dl"], **options},
        )
        self.extra_link_args = [*self.extra_link_args, *oldest_glibc_flags()]
        self.source_flags = source_flags
        self.command = command


def oldest_glibc_flags(source: str = OLDEST_GLIBC) -> list[str]:
    """So that what is built on a new Linux runs on an old one; none where the source has nothing to say."""
    if for_windows() or platform.libc_ver()[0] != "glibc" or machine() not in ("x86_64", "aarch64"):
        return []
    names = re.findall(r"^BNB_OLDEST_VERSION\((\w+)", Path(source).read_text(), re.MULTILINE)
    return [f"-Wl,--wrap={name}" for name in names]


def bindings(module: str) -> dict[str, list[str]]:
    files = {"csrc_shared/bindings.cpp": [f"-DBNB_MODULE_NAME={module}"], "csrc_shared/c_api.cpp": []}
    return {**files, OLDEST_GLIBC: []} if oldest_glibc_flags() else files


def sources(*patterns: str) -> dict[str, list[str]]:
    """The files that match, in order, with no flags of their own."""
    return {str(path): [] for pattern in patterns for path in sorted(Path().glob(pattern))}


def signature() -> KernelExtension:
    """No kernel, but what makes a call of one cheap; it is built with every kernel set."""
    return KernelExtension("bnb_core._signature", {"csrc_shared/signature.cpp": []}, ["csrc_shared"])


def chosen_isas(known: list[str]) -> list[str]:
    """Those of BNB_CPU_ISAS, in order, and portable code before them; all that are known where it is not set."""
    requested = listed("BNB_CPU_ISAS", ";", "avx2;avx512")
    for name in requested:
        if name not in known:
            raise SystemExit(f"BNB_CPU_ISAS: expected some of {';'.join(known)}, got {name!r}")
    return [known[0], *(isa for isa in known[1:] if isa in requested or not requested)]


def cpu_targets() -> dict[str, list[str]]:
    """The flags of each instruction set that is built, ascending.

    They go to its target and nowhere else: they let the compiler use instructions that another machine lacks, even in
    code that runs before the choice.
    """
    flags: dict[str, list[str]] = {"portable": []}
    if for_x86():
        flags |= {"avx2": AVX2, "avx512": AVX512, "avx512_vnni": AVX512_VNNI, "avx512_bf16": AVX512_BF16, "amx": AMX}
    if machine() in ("aarch64", "arm64"):
        flags |= {"neon": NEON, "neon_dotprod": NEON_DOTPROD, "neon_i8mm": NEON_I8MM}
    return {isa: flags[isa] for isa in chosen_isas(list(flags))}


def cpu_sources(module: str, target_flags: dict[str, list[str]]) -> dict[str, list[str]]:
    isas = " ".join(f"BNB_ISA({isa})" for isa in target_flags)
    return {
        **bindings(module),
        **sources("csrc_cpu/*.cpp"),
        "csrc_cpu/dispatch.cpp": [f"-DBNB_ISAS={isas}"],
        **{f"csrc_cpu/targets/{isa}.cpp": flags for isa, flags in target_flags.items()},
    }


def cpu_kernels() -> list[KernelExtension]:
    source_flags = cpu_sources("_kernels", cpu_targets())
    return [KernelExtension("bnb_core.backends.cpu._kernels", source_flags, ["csrc_shared", "csrc_cpu"])]


def cuda_kernels() -> list[KernelExtension]:
    archs = cuda.archs()
    extension = KernelExtension(
        "bnb_core.backends.cuda._kernels",
        {
            **bindings("_kernels"),
            **sources("csrc_cuda/*.cu", "csrc_cuda/*.cpp"),
            "csrc_cuda/module.cpp": [gpu_archs(archs)],
            **({OLDEST_GLIBC_OF_CUDART: []} if oldest_glibc_flags() else {}),
        },
        ["csrc_shared", "csrc_cuda"],
        lambda host, source: (
            cuda.compile_command(archs, source) if source.endswith(".cu") else host_command(host, source)
        ),
        include_dirs=[cuda.include_folder()],
        library_dirs=cuda.library_folders(),
        libraries=cuda.LIBRARIES,
        extra_link_args=[*cuda.LINK_FLAGS, *oldest_glibc_flags(OLDEST_GLIBC_OF_CUDART)],
    )
    return [extension]


def hip_kernels() -> list[KernelExtension]:
    archs = hip.archs()
    hipified = hip.hipify(HIPIFIED)
    extension = KernelExtension(
        "bnb_core.backends.hip._kernels",
        {
            **bindings("_kernels"),
            **{str(path): [] for path in hip.sources(hipified)},
            str(hipified["csrc_cuda/module.cpp"]): [gpu_archs(archs)],
            **sources("csrc_hip/*.cpp"),
        },
        ["csrc_shared", "csrc_cuda", "csrc_hip"],
        lambda host, source: hip.compile_command(archs, source),
        extra_link_args=hip.LINK_FLAGS,
    )
    return [extension]


def gpu_archs(archs: list[str]) -> str:
    return f'-DBNB_GPU_ARCHS="{" ".join(archs)}"'


def simulated_command(host: list[str], source: str) -> list[str]:
    """Compiled in half the time, for an eighth more of the runs'."""
    return host_command(host, source, "-O1")


def simulated_cpu_kernels() -> list[KernelExtension]:
    """The CPU's kernels for AVX-512 and AMX, on any machine with AVX2."""
    target_flags = {isa: AVX2 for isa in cpu_targets() if isa.startswith(("avx512", "amx"))}
    if not target_flags:
        raise SystemExit("BNB_BUILD: cpu-sim simulates instruction sets of x86-64 from avx512 on, and none is built")
    source_flags = cpu_sources("_cpu_kernels", {"portable": [], **target_flags})
    source_flags["csrc_sim/x86/machine.cpp"] = source_flags.pop("csrc_cpu/machine.cpp")
    return [
        KernelExtension(
            "bnb_core.backends.sim._cpu_kernels",
            source_flags,
            ["csrc_shared", "csrc_cpu", "csrc_sim/x86"],
            lambda host, source: [*simulated_command(host, source), "-Wno-psabi"],
            include_dirs=["csrc_sim/x86"],
        )
    ]


def simulated_gpu_kernels(module: str, kernel_sources: dict[str, list[str]]) -> list[KernelExtension]:
    """The kernels of a GPU for the host, on the simulator."""
    return [
        KernelExtension(
            f"bnb_core.backends.sim.{module}",
            {**bindings(module), **kernel_sources, **sources("csrc_sim/*.cpp")},
            ["csrc_shared", "csrc_cuda", "csrc_sim"],
            lambda host, source: [*simulated_command(host, source), "-g1", "-Wno-unknown-pragmas", "-x", "c++"],
            include_dirs=["csrc_sim/include"],
            libraries=["dl", "pthread"],
        )
    ]


def simulated_cuda_kernels() -> list[KernelExtension]:
    return simulated_gpu_kernels("_cuda_kernels", sources("csrc_cuda/*.cu", "csrc_cuda/managed_memory.cpp"))


def simulated_hip_kernels() -> list[KernelExtension]:
    kernels = [path for path in hip.sources(hip.hipify(HIPIFIED)) if "module" not in path.name]
    return simulated_gpu_kernels("_hip_kernels", {str(path): ["-D__HIP_PLATFORM_AMD__"] for path in kernels})


def include_flags(folder: str) -> list[str]:
    """Our folders are relative; what others' headers are warned of must not stop a build.

    The compiler's own folder is left out: named again, it would come too early for headers that look for the next.
    """
    if not os.path.isabs(folder):
        return [f"-I{folder}"]
    return [] if Path(folder) == Path("/usr/include") else ["-isystem", folder]


KERNEL_SETS = {
    "cpu": cpu_kernels,
    "cpu-sim": simulated_cpu_kernels,
    "cuda": cuda_kernels,
    "cuda-sim": simulated_cuda_kernels,
    "hip": hip_kernels,
    "hip-sim": simulated_hip_kernels,
}


class BuildKernels(build_ext):
    """Compiles the sources of an extension in parallel, each with its own flags."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One extension after the other, also where `--parallel` asks otherwise: they share the compiler's object.
        self.parallel = None

    def build_extension(self, ext: KernelExtension) -> None:
        # Windows' own compiler knows no vectors. One that takes GNU's options builds there, such as `zig c++`.
        host = os.environ.get("CXX", "clang++").split() if for_windows() else list(self.compiler.compiler_so_cxx)
        compiler = host[0]
        if not shutil.which(compiler):
            raise SystemExit(
                f"bnb_core's kernels need a C++17 compiler, and {compiler!r} was not found. "
                "On Debian and Ubuntu: apt install build-essential. Another compiler: set CXX."
            )
        folders = (*ext.include_dirs, *self.compiler.include_dirs)
        include = [flag for folder in folders for flag in include_flags(folder)]

        def compile_one(source: str, folder: str) -> str:
            object_file = Path(folder, os.path.relpath(source)).with_suffix(".o")
            object_file.parent.mkdir(parents=True, exist_ok=True)
            command = ext.command(host, source)
            flags = [*include, *PYTHON_INTERFACE, *ext.source_flags[source], "-c", source, "-o", str(object_file)]
            if subprocess.run([*command, *flags]).returncode != 0:
                raise SystemExit(f"{source} could not be compiled")
            return str(object_file)

        def compile_all(sources, output_dir=None, **_):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(lambda source: compile_one(source, f"{output_dir}/{ext.name}"), sources))

        if for_windows():
            self.link_for_windows(ext, host, compile_all(ext.sources, self.build_temp))
        else:
            self.compiler.compile = compile_all
            super().build_extension(ext)

    def link_for_windows(self, ext: KernelExtension, host: list[str], objects: list[str]) -> None:
        # Beside the objects, as the linker leaves other files there, too.
        module = Path(self.build_temp, ext.name, f"{ext.name.rpartition('.')[2]}.pyd")
        options = ["-shared", "-s", f"-L{Path(sys.base_prefix, 'libs')}"]
        if subprocess.run([*host, *options, *objects, "-lpython3", "-o", str(module)]).returncode != 0:
            raise SystemExit(f"{module.name} could not be linked")
        folder = Path(self.get_ext_fullpath(ext.name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, folder)


class BuildWheel(bdist_wheel):
    """A wheel for every Python that Python's stable interface serves, with its bill of materials."""

    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        host = os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++").split()
        compilers = {"C++ compiler": [*host, "--version"]}
        linked_in = {}
        if "cuda" in requested():
            compilers["nvcc"] = [str(cuda.nvcc()), "--version"]
            linked_in["cudart_static"] = str(cuda.release())
        if "hip" in requested():
            compilers["HIP compiler"] = [*hip.compiler(), "--version"]
        folder = Path(distinfo_path, "sboms")
        folder.mkdir()
        bill = bill_of_materials(self.distribution.get_version(), compilers, linked_in)
        (folder / "bnb_core.cdx.json").write_text(bill, encoding="utf-8")


def requested() -> list[str]:
    """The kernel sets to build, by name."""
    names = listed("BNB_BUILD", ",", "cpu,cuda")
    for name in names:
        if name not in KERNEL_SETS:
            raise SystemExit(f"BNB_BUILD: expected some of {', '.join(KERNEL_SETS)}, got {name!r}")
    found = [name for name, maker in (("cuda", cuda), ("hip", hip)) if maker.installed() and maker.visible_archs()]
    return names or ["cpu", *found]


setup(
    ext_modules=[signature(), *(extension for name in requested() for extension in KERNEL_SETS[name]())],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": BuildWheel},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if HAS_STABLE_INTERFACE else {},
)

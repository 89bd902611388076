"""The CUDA kernels compile for every architecture without a warning or a spill, and their module needs no driver."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from compilers import VARIABLE, needs
from toolchains import machine_code
from wheel_builds import ROOT, TORCHS_GLIBC

sys.path.insert(0, str(ROOT))
from csrc_cuda import toolchain

MOST_REGISTERS = 255
LEAST_SUMS = 64
"""A thread's sums of one product on wgmma."""

needs_disassembler = pytest.mark.skipif(
    machine_code.disassembler() is None and os.environ.get(VARIABLE) != "required",
    reason="needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or NVIDIA's toolkit",
)
pytestmark = needs("nvcc", remedy="install NVIDIA's CUDA toolkit")


def kernels(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and spilled bytes by kernel (its mangled name) and architecture, as ptxas reports them."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    current: tuple[str, str] | None = None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            current = (match[1], match[2])
            found[current] = {}
        elif current is not None and (match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)):
            found[current] |= {"stack": int(match[1]), "spilled": int(match[2])}
        elif current is not None and (match := re.search(r"Used (\d+) registers", line)):
            found[current]["registers"] = int(match[1])
    return found


def test_the_sources_tell_no_other_architectures_apart():
    """An architecture beyond these would have to be compiled here."""
    folders = (ROOT / "csrc_cuda", ROOT / "csrc_shared")
    text = "".join(path.read_text() for folder in folders for path in folder.glob("*.[hc]*"))
    assert set(re.findall(r"__CUDA_ARCH__ *[<>=]+ *(\d+)", text)) == {"800", "900", "1200"}


def test_a_source_compiles_to_the_same_bytes_each_time(tmp_path):
    """nvcc makes names of its process and of random numbers, unless it is told otherwise."""
    source = "csrc_cuda/workspace.cu"
    objects = [tmp_path / name / "workspace.o" for name in ("one", "other")]
    for path in objects:
        path.parent.mkdir()
        command = [*toolchain.compile_command(["75"], source), "-c", source, "-o", str(path)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert objects[0].read_bytes() == objects[1].read_bytes()


def test_every_architecture_compiles_without_a_warning(built):
    """Hopper's with its own instructions."""
    assert {arch for _, arch in kernels(built.report)} == {"90a" if arch == "90" else arch for arch in built.archs}
    assert "warning" not in built.report.lower()


def test_products_on_wgmma_do_not_wait_for_one_another(built):
    """The assembler makes them wait, and says so, where it finds a use of their registers that may come too early."""
    registers = [
        use["registers"] for (kernel, arch), use in kernels(built.report).items() if "wgmma" in kernel and arch == "90a"
    ]
    assert registers and min(registers) > LEAST_SUMS
    assert re.findall(r"\(C75\d\d\).*", built.report) == []


def test_no_kernel_spills_registers(built):
    found = kernels(built.report)
    assert len(found) > 10 * len(built.archs)
    assert {kernel: use for kernel, use in found.items() if use["spilled"] or use["registers"] > MOST_REGISTERS} == {}


# Of the loop over the weight, for sm_90: instructions and accesses to shared memory for each weight of a lane. The
# kernels named mma read codes from global memory into registers, whose pipe is the same and is not in these counts.
MOST_COUNTS = {
    "gemm_4bit_mma_kernelI13__nv_bfloat16Li1ENS_8SegmentsILi64": (3.35, 0.75),
    "gemm_4bit_mma_kernelI13__nv_bfloat16Li8ENS_8SegmentsILi64": (5.80, 1.68),
    "StagedShapeILi1ELi16ELi1ELi4ELi2ELi0E": (3.90, 1.00),  # staged8_wide
    "StagedShapeILi1ELi16ELi1ELi4ELi2ELi1E": (3.70, 0.87),  # staged8_permuted
    "StagedShapeILi1ELi16ELi1ELi2ELi4ELi0E": (4.85, 1.05),  # staged8_deep
    "StagedShapeILi1ELi8ELi2ELi2ELi3ELi0E": (4.85, 1.05),  # staged8_two
    "StagedShapeILi2E": (5.10, 1.17),  # staged16
    "StagedShapeILi4E": (5.70, 1.42),  # staged32
    "StagedShapeILi6E": (6.30, 1.67),  # staged48
    "StagedShapeILi8E": (6.85, 1.92),  # staged64
}
PRODUCTS_OF_TILE = 8  # mma instructions of a segment and eight rows of A


@needs_disassembler
def test_kernels_spend_no_more_instructions_and_accesses_on_a_weight_than_they_are_known_for(built):
    code = {}
    for path in built.objects.rglob("gemm_4bit*.o"):
        code |= machine_code.functions(path, "sm_90a")
    found = {}
    for kernel, most in MOST_COUNTS.items():
        (name,) = (name for name in code if kernel in name and "bfloat16" in name)
        tiles = int(re.search(r"(?:bfloat16|StagedShapeI)Li(\d+)E", name)[1])
        counts = machine_code.counts(code[name], tiles * PRODUCTS_OF_TILE)
        found[kernel] = (round(counts.instructions, 2), round(counts.accesses, 2), most)
    over = {k: v for k, v in found.items() if v[0] > v[2][0] or v[1] > v[2][1]}
    assert over == {}, found


# Of the loop over whole blocks or tiles, for sm_90a: elements of a lane in a turn, and instructions for each. A warp's
# sums over fewer lanes (quantize_kernel) are a loop, and are not in these counts: 7 instructions a step.
ELEMENTWISE_COUNTS = {
    "update_kernelINS0_9ParameterILNS_13OptimizerNameE0E13__nv_bfloat16NS_9ByteStateELb1EEENS0_7NumbersE": (8, 71.0),
    "update_kernelINS0_9ParameterILNS_13OptimizerNameE0EfNS_9ByteStateELb1EEENS0_7NumbersE": (8, 72.5),
    "17dequantize_kernelINS0_13ShortCodebookENS_9F32ScalesE13__nv_bfloat16": (32, 8.0),
    "17dequantize_kernelINS0_13ShortCodebookENS_12StoredScalesE13__nv_bfloat16": (32, 16.5),
    "15quantize_kernelINS_12ShortEncoderILNS_7EncoderE0EEE13__nv_bfloat16": (16, 15.0),
    "15quantize_kernelINS_11CellEncoderEf": (16, 20.5),
}


@needs_disassembler
def test_kernels_spend_no_more_instructions_on_an_element_than_they_are_known_for(built):
    code = {}
    for source in ("optimizer", "quantize"):
        (path,) = built.objects.rglob(f"{source}.o")
        code |= machine_code.functions(path, "sm_90a")
    found = {}
    for kernel, (elements, most) in ELEMENTWISE_COUNTS.items():
        (name,) = (name for name in code if kernel in name)
        found[kernel] = (round(machine_code.bulk_instructions(code[name]) / elements, 2), most)
    assert {kernel: counts for kernel, counts in found.items() if counts[0] > counts[1]} == {}, found


def test_the_module_imports_without_a_driver_and_says_so(built):
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_kernels', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.driver_version(), module.archs)\n"
    )
    (library,) = built.package.rglob("_kernels*.so")
    run = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=True)
    version, *archs = run.stdout.split()
    assert tuple(archs) == built.archs
    if shutil.which("nvidia-smi") is None:
        assert version == "0"


def test_the_module_is_for_the_linuxes_of_torch(built):
    """NVIDIA's static runtime calls what is younger in newer glibcs."""
    (library,) = built.package.rglob("_kernels*.so")
    symbols = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    versions = [tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_(2\.\d+)", symbols)]
    assert versions and max(versions) <= TORCHS_GLIBC


def test_the_module_depends_on_no_installed_cuda(built):
    (library,) = built.package.rglob("_kernels*.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"NEEDED.*(cuda|cublas)", needed)

"""What the sdist and the wheel hold, byte for byte, and that an instruction set's flags stay in its own object file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from wheel_builds import build, build_environment

# A pointer to data that exception handling needs; it is no code.
HARMLESS_WEAK_SYMBOL = "DW.ref.__gxx_personality_v0"


def test_the_wheel_holds_the_package_and_nothing_else(released):
    with zipfile.ZipFile(released) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"bnb_core", "pytest_bnb_core.py"}
    assert not [name for name in names if re.search(r"\.(cpp|h|cu|cuh|o)$|/tests/|csrc", name)]
    assert [name for name in names if name.endswith(".so")] == [
        "bnb_core/_signature.abi3.so",
        "bnb_core/backends/cpu/_kernels.abi3.so",
    ]
    for needed in ("conformance/suite/quantize.py", "cli/demo/command.py", "py.typed", "backends/reference/int8.py"):
        assert f"bnb_core/{needed}" in names


def test_the_sdist_holds_what_the_build_needs(sdist):
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"setup.py", "constraints.txt", "csrc_shared/kernels.h", "csrc_cpu/dispatch.cpp", "LICENSE"} <= names


def test_a_wheel_of_the_sdist_is_the_same_to_the_byte(sdist, tmp_path):
    """Another folder and another way there: what a wheel holds depends on its sources and its compiler alone.

    Of two instruction sets; the others are compiled no differently.
    """
    chosen = {"BNB_CPU_ISAS": "avx512_bf16"}
    built = build(tmp_path / "checkout", **chosen)
    with tarfile.open(sdist) as files:
        files.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    # Compiled anew, also where a cache has the object files.
    environment = build_environment(CCACHE_DISABLE="1", **chosen)
    subprocess.run(command, env=environment, check=True, timeout=1200, stdout=subprocess.DEVNULL)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == built.wheel.name
    with zipfile.ZipFile(again) as one, zipfile.ZipFile(built.wheel) as other:
        assert one.namelist() == other.namelist()
        assert [name for name in one.namelist() if one.read(name) != other.read(name)] == []
    assert again.read_bytes() == built.wheel.read_bytes()


def test_the_wheel_says_what_it_is_made_of(released):
    with zipfile.ZipFile(released) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/sboms/bnb_core.cdx.json"))
        text = wheel.read(name).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    version = released.name.split("-")[1]
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/bnb-core@{version}"
    (compiler,) = bill["metadata"]["tools"]["components"]
    assert re.search(r"\d+\.\d+", compiler["version"])
    assert bill["components"] == []


def test_no_symbol_of_an_instruction_set_can_replace_anothers(built):
    """A weak symbol of an AVX-512 object may be the one that the linker keeps for everybody: SIGILL elsewhere."""
    objects = list(built.objects.rglob("targets/*.o"))
    assert objects
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listing.splitlines() if re.search(r"\s[WwVvu]\s", line)]
        assert [line for line in weak if HARMLESS_WEAK_SYMBOL not in line] == [], path.name

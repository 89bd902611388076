"""bnb_core answers to the name bitsandbytes, in a process or an environment, unless something else does already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from fresh_python import run_python
from packaging.version import Version

from bnb_core import optim
from bnb_core.compat.names import MODULES, VERSION

COMPAT = Path(__file__).parents[1] / "compat"

INSTALL = "import bnb_core; bnb_core.install_as_bitsandbytes()"

# In the order in which programs ask: is it there, which version, then the imports.
FACTS = """
import importlib, importlib.metadata, importlib.util, json, pickle
facts = {
    "found": importlib.util.find_spec("bitsandbytes") is not None,
    "version": importlib.metadata.version("bitsandbytes"),
    "name": importlib.metadata.metadata("bitsandbytes")["Name"],
    "distributions": sorted(set(importlib.metadata.packages_distributions()["bitsandbytes"])),
    "answers": len(list(importlib.metadata.distributions(name="bitsandbytes"))),
    "elsewhere": len(list(importlib.metadata.distributions(name="bitsandbytes", path=["/nonexistent"]))),
}
import bitsandbytes, bitsandbytes.nn.modules as nn_modules, bnb_core
from bitsandbytes.cextension import lib
bnb_core.install_as_bitsandbytes()
facts["__version__"] = bitsandbytes.__version__
facts["modules"] = {}
for name in MODULES:
    module = importlib.import_module(f"bitsandbytes.{name}")
    attribute = bitsandbytes
    for part in name.split("."):
        attribute = getattr(attribute, part)
    facts["modules"][name] = module.__name__ if attribute is module else "another object"
facts["optimizers"] = {name: str(getattr(bitsandbytes.optim, name)) for name in bnb_core.optim.__all__}
classes = [getattr(bnb_core.optim, name) for name in bnb_core.optim.__all__]
facts["unpickled"] = all(pickle.loads(pickle.dumps(optimizer)) is optimizer for optimizer in classes)
facts["same"] = (
    bitsandbytes.nn.Linear4bit is bnb_core.nn.Linear4bit is nn_modules.Linear4bit
    and nn_modules.QuantState is bitsandbytes.functional.QuantState
    and bitsandbytes.autograd._functions.matmul_4bit is bnb_core.matmul_4bit is bitsandbytes.matmul_4bit
    and bitsandbytes.functional.lib is lib
)
try:
    import bitsandbytes.research
except ModuleNotFoundError as error:
    facts["unknown"] = str(error)
import torch
layer = bitsandbytes.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
facts["output"] = list(layer(torch.ones(2, 64)).shape)
print(json.dumps(facts))
"""


def run_with(folders: list[Path], code: str) -> subprocess.CompletedProcess[str]:
    return run_python(code, PYTHONPATH=os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")]))


def real_version() -> str | None:
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        return None
    return None if found == VERSION else found


@pytest.fixture(scope="session")
def compat_folder(tmp_path_factory) -> Path:
    """The distribution in compat/, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("compat")
    source = shutil.copytree(COMPAT, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "installed")]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return folder / "installed"


@pytest.fixture(scope="session", params=["in one process", "in the environment"])
def facts(request) -> dict:
    """What a program finds out about bitsandbytes, with either way of giving it bnb_core."""
    code = f"MODULES = {list(MODULES)}\n{FACTS}"
    if request.param == "in one process":
        result = run_python(f"{INSTALL}\nbnb_core.install_as_bitsandbytes()\n{code}")
    elif real_version():
        pytest.skip(f"bitsandbytes {real_version()} is installed here, beside which the distribution refuses to work")
    else:
        result = run_with([request.getfixturevalue("compat_folder")], code)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_who_asks_for_the_distribution_is_told_a_version_that_serves_them(facts):
    assert facts["found"] and facts["name"] == "bitsandbytes" and facts["distributions"] == ["bitsandbytes"]
    assert facts["version"] == facts["__version__"] == VERSION and Version(facts["version"]) >= Version("0.48")
    assert facts["answers"] == (2 if real_version() else 1)
    assert facts["elsewhere"] == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_imported_under_the_other_name(facts, name):
    assert facts["modules"][name] == MODULES[name]


def test_classes_and_functions_are_the_same_objects_under_both_names(facts):
    assert facts["same"] and facts["output"] == [2, 8]


@pytest.mark.parametrize("name", [name for name in optim.__all__ if name != "GlobalOptimManager"])
def test_optimizers_name_a_module_of_bitsandbytes(facts, name):
    assert "'bitsandbytes.optim." in facts["optimizers"][name]


def test_classes_of_optimizers_can_be_pickled(facts):
    assert facts["unpickled"]


def test_a_module_that_is_not_offered_is_not_found(facts):
    assert facts["unknown"] == "No module named 'bitsandbytes.research'"


RUN = "import runpy; runpy.run_module('bitsandbytes', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize("way", ["in one process", "in the environment"])
def test_the_package_is_a_program_that_tells_what_runs(way, compat_folder):
    if way == "in the environment" and real_version():
        pytest.skip(f"bitsandbytes {real_version()} is installed here, beside which the distribution refuses to work")
    result = run_python(f"{INSTALL}\n{RUN}") if way == "in one process" else run_with([compat_folder], RUN)
    assert result.returncode == 0, result.stderr
    assert "Which backend serves" in result.stdout


def test_shorter_names_are_the_same_modules():
    code = "import bitsandbytes as b; print(b.adam is b.optim.adam, b.modules is b.nn.modules, callable(b.backends))"
    assert run_python(f"{INSTALL}\n{code}").stdout.split() == ["True"] * 3


def test_importing_bnb_core_alone_claims_no_name():
    code = "import sys, bnb_core; print([m for m in sys.modules if m.startswith('bitsandbytes')])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.skipif(real_version() is not None, reason="a real bitsandbytes is installed here for it to find")
def test_a_library_that_looked_before_is_named_in_a_warning():
    early = "import sys, types; sys.modules['peft.import_utils'] = types.ModuleType('peft.import_utils')"
    result = run_python(f"{early}\n{INSTALL}")
    assert "UserWarning: peft.import_utils: imported before install_as_bitsandbytes()" in result.stderr
    assert run_python(f"{INSTALL}").stderr == ""


@pytest.fixture
def real(tmp_path) -> SimpleNamespace:
    """Folders with what a real bitsandbytes leaves behind: all of it, and its metadata alone."""
    package, metadata = tmp_path / "package", tmp_path / "metadata"
    for folder in (package, metadata):
        (folder / "bitsandbytes-0.50.2.dist-info").mkdir(parents=True)
        (folder / "bitsandbytes-0.50.2.dist-info" / "METADATA").write_text("Name: bitsandbytes\nVersion: 0.50.2\n")
    (package / "bitsandbytes").mkdir()
    (package / "bitsandbytes" / "__init__.py").write_text("__version__ = '0.50.2'\n")
    return SimpleNamespace(package=package, metadata=metadata)


def test_a_real_bitsandbytes_works_beside_bnb_core_and_is_not_replaced(real):
    code = f"import bitsandbytes\ntry:\n    {INSTALL}\nexcept RuntimeError as error:\n    print(error)\n"
    result = run_with([real.package], f"{code}print(bitsandbytes.__version__, bnb_core.nn.__name__)")
    error, names = result.stdout.splitlines()
    assert "already imported from" in error and str(real.package) in error
    assert names == "0.50.2 bnb_core.nn"


def test_one_process_can_take_the_name_where_a_real_bitsandbytes_is_installed(real):
    code = "import bitsandbytes, importlib.metadata; print(importlib.metadata.version('bitsandbytes'))"
    result = run_with([real.package], f"{INSTALL}\n{code}\nprint(bitsandbytes.__version__)")
    assert result.stdout.split() == [VERSION, VERSION], result.stderr


def test_a_real_bitsandbytes_that_comes_first_on_the_path_is_imported(real, compat_folder):
    result = run_with([real.package, compat_folder], "import bnb_core, bitsandbytes; print(bitsandbytes.__version__)")
    assert result.stdout.strip() == "0.50.2"


def test_the_distribution_beside_a_real_one_is_an_error_that_names_both(real, compat_folder):
    result = run_with([compat_folder, real.metadata], "import bitsandbytes")
    assert "ImportError: bitsandbytes is installed twice" in result.stderr
    assert VERSION in result.stderr and f"0.50.2 in {real.metadata}" in result.stderr


@pytest.fixture
def environment(tmp_path, real) -> Path:
    """The interpreter of a virtual environment that has a real bitsandbytes, and our setuptools to build with."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    installed = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    shutil.copytree(real.package, installed, dirs_exist_ok=True)
    (installed / "ours.pth").write_text(str(Path(setuptools.__file__).parents[1]))
    return python


INSTALLERS = {
    "pip": [sys.executable, "-m", "pip", "--python", "{python}", "install", "--no-index"],
    "pip, by force": [
        sys.executable,
        "-m",
        "pip",
        "--python",
        "{python}",
        "install",
        "--no-index",
        "--force-reinstall",
    ],
    "uv": ["uv", "pip", "install", "--python", "{python}", "--offline", "--no-cache"],
}


@pytest.mark.skipif(os.name == "nt", reason="the paths in an environment are those of other systems")
@pytest.mark.parametrize("installer", INSTALLERS)
def test_an_installer_that_builds_in_sight_of_a_real_one_leaves_it_as_it_is(installer, environment, tmp_path):
    command = [part.format(python=environment) for part in INSTALLERS[installer]]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    source = shutil.copytree(COMPAT, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command += ["--no-deps", "--no-build-isolation", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "bitsandbytes 0.50.2 is installed in" in result.stdout + result.stderr
    code = "import bitsandbytes; print(bitsandbytes.__version__)"
    assert subprocess.run([environment, "-c", code], capture_output=True, text=True).stdout.strip() == "0.50.2"


def test_what_cannot_be_refused_stands_in_the_first_line_of_the_readme():
    first = (COMPAT / "README.md").read_text().splitlines()[0]
    assert "`uv pip install` and wheels replace a real bitsandbytes without asking" in first


REFUSE = """
import sys, sysconfig
sysconfig.get_path = lambda name: sys.argv[1]
import refusing_backend
refusing_backend.build_wheel(sys.argv[2])
"""


def test_the_distribution_is_not_built_where_it_would_replace_a_real_one(real, tmp_path):
    command = [sys.executable, "-c", REFUSE, str(real.metadata), str(tmp_path)]
    result = subprocess.run(command, cwd=COMPAT, capture_output=True, text=True)
    assert result.returncode == 1 and not list(tmp_path.glob("*.whl"))
    assert f"bitsandbytes 0.50.2 is installed in {real.metadata}" in result.stderr

"""The backends of other people's packages: found through entry points, and never in the way of an import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_python import PACKAGES, QUANTIZE, run_python

from bnb_core.installed_backends import ENTRY_POINT_GROUP


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages that other people could have written, installed: one works, one raises when it is imported."""
    folder = tmp_path_factory.mktemp("strangers")
    sources = [str(PACKAGES / name) for name in ("third_party_backend", "broken_backend")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), *sources], check=True, capture_output=True, timeout=300)
    return folder


def test_a_strangers_backend_is_found_chosen_and_used(strangers):
    code = (
        "import torch, bnb_core\n"
        "from bnb_core import functional as F, registry\n"
        "assert 'third-party' in bnb_core.backends()\n"
        "assert registry.serving('cpu')['dequantize_blockwise'] == 'cpu'\n"
        "codes, state = F.quantize_blockwise(torch.linspace(-1, 1, 300))\n"
        "ours = F.dequantize_blockwise(codes, state)\n"
        "seen = []\n"
        "with bnb_core.use_backend('third-party'), registry.observe(lambda *served: seen.append(served)):\n"
        "    assert torch.equal(F.dequantize_blockwise(codes, state), ours)\n"
        "    try: F.quantize_blockwise(torch.ones(3))\n"
        "    except registry.BackendError as error: print(error)\n"
        "assert seen == [('dequantize_blockwise', 'third-party')]\n"
    )
    result = run_python(code, strangers)
    assert result.returncode == 0, result.stderr
    assert "quantize_blockwise: backend 'third-party' does not have this primitive" in result.stdout


def test_a_backend_that_raises_at_import_is_listed_and_harms_nobody(strangers):
    code = f"{QUANTIZE}; print(bnb_core.backends()['broken'].unavailable)"
    result = run_python(code, strangers)
    assert result.returncode == 0, result.stderr
    assert "served" in result.stdout and "RuntimeError: this machine has no such device" in result.stdout
    refused = run_python(QUANTIZE, strangers, BNB_BACKEND="broken")
    assert "backend 'broken' is not available" in refused.stderr


@pytest.mark.parametrize(
    ("name", "reason"),
    [("quitting", "SystemExit"), ("misnamed", "'misnamed', the backend 'other'"), ("malformed", "device_types")],
)
def test_a_backend_that_is_wrong_in_another_way_is_listed_too(strangers, name, reason):
    code = f"{QUANTIZE}; print(bnb_core.backends()[{name!r}].unavailable)"
    result = run_python(code, strangers)
    assert result.returncode == 0, result.stderr
    assert "served" in result.stdout and reason in result.stdout


def _offer(folder, distribution, name, source=None):
    """Install by hand a package that offers a backend under that name, with a module of that source."""
    metadata = folder / f"{distribution}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {distribution}:backend\n")
    if source is not None:
        (folder / f"{distribution}.py").write_text(f"from bnb_core.backend import Backend, Kernel\n{source}\n")


FAIL = "def fail(*arguments, **outputs): raise ZeroDivisionError('a bug of theirs')\n"
STRANGE = {
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "raises-its-own": ("class Own(BaseException): pass\nraise Own('no such device')", "Own: no such device"),
    "leaves-a-generator": ("raise GeneratorExit", "GeneratorExit"),
    "cannot-say-why": (
        "class Own(Exception):\n    def __str__(self): raise self\nraise Own",
        "Own: a message that cannot be shown",
    ),
    "says-what-is-no-text": ("raise OSError('\\udcff')", r"OSError: \udcff"),
    "has-a-table-that-raises": (
        "from collections import UserDict\n"
        "class Table(UserDict):\n    def __getitem__(self, primitive): raise LookupError('not yet')\n"
        "backend = Backend('has-a-table-that-raises', ('cpu',), 1000, Table(gemm_4bit=print))",
        "LookupError: not yet",
    ),
    "has-no-reason-in-words": (
        "backend = Backend('has-no-reason-in-words', ('cpu',), 1000, {}, unavailable=1)",
        "Backend: unavailable: expected a str or None, got 1",
    ),
}
"""What a module of somebody else's does, and the reason that is given for it."""


@pytest.fixture(scope="module")
def odd_ones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for name, (source, _) in STRANGE.items():
        _offer(folder, name.replace("-", "_"), name, source)
    _offer(
        folder,
        "tells_nothing",
        "[/tells] nothing",
        f"{FAIL}backend = Backend('[/tells] nothing', ('cpu',), 1, {{}}, details=fail)",
    )
    return folder


@pytest.fixture(scope="module")
def odd_facts(odd_ones):
    """What `bnb-core info --json` says beside them, once a call was served."""
    program = "from bnb_core.cli import main; import sys; sys.argv[1:] = ['info', '--json']; main()"
    result = run_python(f"{QUANTIZE}\n{program}", odd_ones)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    served, _, facts = result.stdout.partition("\n")
    assert served == "served"
    return json.loads(facts)


@pytest.mark.parametrize("name", STRANGE)
def test_a_backend_that_fails_in_any_way_is_listed_with_its_reason_and_disturbs_nobody(odd_facts, name):
    assert STRANGE[name][1] in odd_facts["backends"][name]["unavailable because"]
    assert {row["cpu"] for row in odd_facts["serving"].values()} == {"cpu"}


def test_a_backend_that_cannot_tell_its_details_is_listed_with_the_reason(odd_facts):
    assert odd_facts["backends"]["[/tells] nothing"]["details"] == {
        "details": "backend '[/tells] nothing' cannot tell them: ZeroDivisionError: a bug of theirs"
    }


def test_tables_show_names_as_they_are(odd_ones):
    program = "from bnb_core.cli import main; import sys; sys.argv[1:] = ['info']; main()"
    result = run_python(program, odd_ones, COLUMNS="250")
    assert result.returncode == 0 and "[/tells] nothing" in result.stdout, result.stderr


def test_an_interrupt_while_a_backend_is_imported_ends_the_program(tmp_path):
    _offer(tmp_path, "interrupted", "interrupted", "raise KeyboardInterrupt")
    result = run_python("import bnb_core; bnb_core.backends()", tmp_path)
    assert result.returncode and "KeyboardInterrupt" in result.stderr


def test_a_package_whose_entry_points_cannot_be_read_is_listed_and_disturbs_nobody(tmp_path):
    _offer(tmp_path, "good", "good", "backend = Backend('good', ('cpu',), 1, {})")
    _offer(tmp_path, "bad", "bad")
    (tmp_path / "bad-1.dist-info" / "entry_points.txt").write_bytes(b"[bnb_core.backends]\n\xff = bad:backend\n")
    code = f"{QUANTIZE}; b = bnb_core.backends(); print(b['good'].available, b['bad'].unavailable)"
    # torch itself reads the entry points of all packages when it is imported, unless it is told not to.
    result = run_python(code, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    reason = "the entry points of the package bad cannot be read: UnicodeDecodeError: 'utf-8' codec can't decode byte"
    assert result.stdout.startswith(f"served\nTrue {reason}"), result.stderr
    refused = run_python(QUANTIZE, tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0", BNB_BACKEND="bad")
    assert f"BackendError: backend 'bad' is not available: {reason}" in refused.stderr


def test_a_setting_that_a_backend_cannot_use_is_an_error_and_no_reason_to_go_on_without_it(tmp_path):
    source = "from bnb_core.backend import SettingError\nraise SettingError('MINE', 'x', 'a number')"
    _offer(tmp_path, "strict", "strict", source)
    result = run_python(QUANTIZE, tmp_path)
    assert result.stderr.splitlines()[-1] == "bnb_core.backend.SettingError: MINE: expected a number, got 'x'"


def test_of_two_packages_that_offer_one_name_neither_serves_and_both_are_named(tmp_path):
    for distribution in ("one", "other"):
        _offer(tmp_path, distribution, "twice")
    result = run_python(QUANTIZE, tmp_path)
    assert "served" in result.stdout and result.stderr.count("one (one:backend), other (other:backend)") == 1
    refused = run_python(QUANTIZE, tmp_path, BNB_BACKEND="twice")
    assert re.search("BackendError: backend 'twice' is not available: .*one.*, other", refused.stderr)
    assert run_python("import bnb_core", tmp_path, BNB_BACKEND="twice").stderr == ""


def test_import_initializes_no_gpu_and_loads_no_backend_and_no_compiler():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bnb_core\n"
        "assert not torch.cuda.is_initialized()\n"
        "late = ('bnb_core.backends.', 'torch._dynamo', 'torch._inductor', 'triton')\n"
        "print([m for m in set(sys.modules) - before if m.startswith(late)])"
    )
    assert run_python(code).stdout.strip() == "[]"

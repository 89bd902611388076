"""Which backend serves: found through entry points, chosen strictly, and never in the way of an import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bnb_core
from bnb_core import registry
from bnb_core.registry import Backend, BackendError, Kernel

PACKAGES = Path(__file__).parent / "packages"
QUANTIZE = "import torch, bnb_core; bnb_core.functional.quantize_4bit(torch.ones(64)); print('served')"


def run_python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, outside the checkout, with the packages of a folder if one is given."""
    variables = {**os.environ, **environment}
    if folder is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=PACKAGES, timeout=120
    )


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages that other people could have written, installed: one works, one raises when it is imported."""
    folder = tmp_path_factory.mktemp("strangers")
    sources = [str(PACKAGES / name) for name in ("third_party_backend", "broken_backend")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder), *sources], check=True, capture_output=True, timeout=300)
    return folder


def test_our_backends_are_available_and_serve_everything():
    found = bnb_core.backends()
    assert list(found)[-1] == "reference" and found["reference"].available
    assert found["cpu"].available, found["cpu"].unavailable
    assert set(registry.serving("cpu").values()) == {"cpu"}
    assert set(registry.serving("mps").values()) == {"reference"}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_variable_chooses_strictly(name):
    code = f"{QUANTIZE}; from bnb_core import registry; print(set(registry.serving('cpu').values()))"
    assert run_python(code, BNB_BACKEND=name).stdout.split() == ["served", f"{{'{name}'}}"]


def test_the_environment_variable_chooses_per_primitive():
    code = "from bnb_core import registry; s = registry.serving('cpu'); print(s['gemm_4bit'], s['quantize_4bit'])"
    assert run_python(code, BNB_BACKEND="gemm_4bit=reference,*=cpu").stdout.split() == ["reference", "cpu"]


@pytest.mark.parametrize(
    ("value", "named"),
    [("nowhere", "cpu, cuda"), ("gemm_3bit=cpu", "quantize_4bit"), ("gemm_4bit=cpu,gemm_4bit=cpu", "twice")],
)
def test_a_wrong_environment_variable_is_an_error_that_lists_what_there_is(value, named):
    result = run_python(QUANTIZE, BNB_BACKEND=value)
    assert result.returncode and "BackendError: BNB_BACKEND: " in result.stderr and named in result.stderr
    assert run_python("import bnb_core", BNB_BACKEND=value).returncode == 0


def test_use_backend_nests_and_ends():
    with bnb_core.use_backend("reference"):
        assert registry.serving("cpu")["gemm_4bit"] == "reference"
        with bnb_core.use_backend("gemm_4bit=cpu,*=reference"):
            assert registry.serving("cpu")["gemm_4bit"] == "cpu"
        assert registry.serving("cpu")["gemm_4bit"] == "reference"
    assert registry.serving("cpu")["gemm_4bit"] == "cpu"


def test_use_backend_concerns_its_own_thread():
    seen = []
    with bnb_core.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.serving("cpu")["gemm_4bit"]))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("layer", ["4bit", "8bit"])
def test_use_backend_reaches_a_backward_pass_in_another_thread(layer):
    """Autograd has threads of its own for each GPU."""
    weight, A = torch.randn(8, 64), torch.randn(3, 64, requires_grad=True)
    with bnb_core.use_backend("reference"):
        if layer == "4bit":
            packed, state = bnb_core.functional.quantize_4bit(weight, compress_statistics=True)
            loss = bnb_core.matmul_4bit(A, packed.t(), state).sum()
        else:
            loss = bnb_core.matmul(A, weight).sum()
    served = []
    with registry.observe(lambda primitive, backend: served.append(backend)):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert A.grad is not None
    assert set(served) == {"reference"}


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(BackendError, match="registered are"), bnb_core.use_backend("nowhere"):
        pass


def test_a_named_backend_refuses_other_devices_with_a_remedy():
    with bnb_core.use_backend("cpu"), pytest.raises(BackendError, match=r"cuda.*choose another"):
        registry.kernel_for("gemm_4bit", "cuda", ())


def test_observers_see_who_served():
    seen = []
    with registry.observe(lambda *served: seen.append(served)), bnb_core.use_backend("reference"):
        bnb_core.functional.quantize_4bit(torch.ones(64))
    assert seen == [("quantize_4bit", "reference")]


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


WRONG_FIELDS = {
    "name": {"name": None},
    "device_types": {"device_types": "cpu"},
    "priority": {"priority": "high"},
    "kernels": {"kernels": ["gemm_4bit"]},
    "kernels['gemm_4bit']": {"kernels": {"gemm_4bit": "a function"}},
    "unavailable": {"unavailable": False},
    "details": {"details": {"driver": "13.0"}},
    "expected_failures": {"expected_failures": "failures.json"},
}


@pytest.mark.parametrize("named", WRONG_FIELDS)
def test_a_backend_with_a_wrong_field_is_refused_where_it_is_made(named):
    right = {"name": "x", "device_types": ("cpu",), "priority": 1, "kernels": {}}
    with pytest.raises(TypeError, match=re.escape(f"Backend: {named}: expected")):
        Backend(**{**right, **WRONG_FIELDS[named]})


def test_a_kernel_that_does_not_support_the_arguments_is_passed_over_unless_named():
    served = []
    picky = Kernel(lambda *arguments, out: served.append(arguments), lambda *arguments: "too small")
    with registry.registered(Backend("picky", ("cpu",), 1000, {"quantize_4bit": picky})):
        seen = []
        with registry.observe(lambda *by: seen.append(by)):
            bnb_core.functional.quantize_4bit(torch.ones(64))
        assert seen == [("quantize_4bit", "cpu")] and not served
        with bnb_core.use_backend("picky"), pytest.raises(BackendError, match="picky: too small"):
            bnb_core.functional.quantize_4bit(torch.ones(64))


@pytest.mark.parametrize("override", ["temporary", "gemm_4bit=reference"], ids=["named", "by priority"])
def test_a_backend_that_was_removed_serves_no_longer(override):
    temporary = Backend("temporary", ("cpu",), 1000, {"quantize_4bit": lambda *arguments, out: None})
    registration = registry.registered(temporary)
    registration.__enter__()
    with bnb_core.use_backend(override):
        assert registry.serving("cpu")["quantize_4bit"] == "temporary"
        registration.__exit__(None, None, None)
        after = "unknown backend 'temporary'" if override == "temporary" else "cpu"
        assert registry.serving("cpu")["quantize_4bit"].startswith(after)


def test_a_wrong_environment_variable_neither_prevents_nor_keeps_a_registration():
    code = (
        "from bnb_core.registry import Backend, registered\n"
        "for attempt in ('first', 'second'):\n"
        "    with registered(Backend('temporary', ('cpu',), 1, {})): print(attempt)\n"
    )
    result = run_python(code, BNB_BACKEND="nowhere")
    assert result.stdout.split() == ["first", "second"], result.stderr


def _offer(folder, distribution, name, source=None):
    """Install by hand a package that offers a backend under that name, with a module of that source."""
    metadata = folder / f"{distribution}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\n{name} = {distribution}:backend\n")
    if source is not None:
        (folder / f"{distribution}.py").write_text(f"from bnb_core.registry import Backend, Kernel\n{source}\n")


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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
@pytest.mark.parametrize("backend", ["theirs", None], ids=["named", "by priority"])
def test_what_a_kernel_of_somebody_else_raises_names_the_backend_and_the_primitive(backend):
    def fail(*arguments, out):
        raise ZeroDivisionError("a bug of theirs")

    with (
        registry.registered(Backend("theirs", ("cpu",), 1000, {"quantize_4bit": fail})),
        bnb_core.use_backend(backend) if backend else nullcontext(),
        pytest.raises(ZeroDivisionError, match="a bug of theirs") as caught,
    ):
        bnb_core.functional.quantize_4bit(torch.ones(64))
    assert caught.value.__notes__ == ["raised in quantize_4bit: backend 'theirs'"]


def test_a_kernel_of_somebody_else_takes_many_parameters_in_one_call():
    calls = []

    def one(*arguments):
        calls.append("one")

    def several(step, g, p, state, unorm_vec):
        calls.append(len(p))

    parameters = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    optimizer = bnb_core.optim.Adam32bit(parameters)
    kernel = registry.Kernel(one, several=several)
    with registry.registered(Backend("theirs", ("cpu",), 1000, {"optimizer_update_32bit": kernel})):
        optimizer.step()
    assert calls == [3]


def test_a_backend_that_cannot_say_what_it_supports_is_passed_over_with_a_warning_unless_named():
    def fail(*arguments):
        raise ZeroDivisionError("a bug of theirs")

    kernel = Kernel(lambda *arguments, out: None, supports=fail, present=fail)
    sentence = r"backend 'theirs' cannot say whether it supports a call: ZeroDivisionError: a bug of theirs"
    with registry.registered(Backend("theirs", ("cpu",), 1000, {"quantize_4bit": kernel})):
        seen = []
        with registry.observe(lambda *by: seen.append(by)), pytest.warns(UserWarning, match=sentence):
            bnb_core.functional.quantize_4bit(torch.ones(64))
        assert seen == [("quantize_4bit", "cpu")]
        with pytest.warns(UserWarning, match=sentence):
            assert registry.served_by("quantize_4bit", "cpu") == "cpu"
        with (
            bnb_core.use_backend("theirs"),
            pytest.warns(UserWarning, match=sentence),
            pytest.raises(BackendError, match="theirs: cannot say whether it supports a call"),
        ):
            bnb_core.functional.quantize_4bit(torch.ones(64))


def test_a_backend_that_cannot_prepare_is_not_available_with_the_reason():
    class Unprepared(Backend):
        def prepare(self):
            raise ZeroDivisionError("a bug of theirs")

    backend = Unprepared("theirs", ("cpu",), 1, {})
    assert registry.why_unavailable(backend) == "preparing it failed: ZeroDivisionError: a bug of theirs"
    with registry.registered(backend), pytest.raises(BackendError, match="'theirs' is not available: preparing it"):
        registry.available_backend("theirs")


def test_a_setting_that_a_backend_cannot_use_is_an_error_and_no_reason_to_go_on_without_it(tmp_path):
    source = "from bnb_core.registry import SettingError\nraise SettingError('MINE', 'x', 'a number')"
    _offer(tmp_path, "strict", "strict", source)
    result = run_python(QUANTIZE, tmp_path)
    assert result.stderr.splitlines()[-1] == "bnb_core.registry.SettingError: MINE: expected a number, got 'x'"


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


def test_amds_chips_are_those_of_which_its_driver_tells(monkeypatch, tmp_path):
    from bnb_core.backends.hip import chips

    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    assert chips(tmp_path / "no driver") == []
    for node, version in enumerate((0, 90010, 90402, 110001, 90010)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(
            f"simd_count 4\ngfx_target_version {version}\nvendor_id 4098\n"
        )
    assert chips(tmp_path) == ["gfx90a", "gfx942", "gfx1101"]
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
    assert chips(tmp_path) == []


@pytest.mark.parametrize(
    "archs, chips, served",
    [
        ("gfx90a:xnack+ gfx1100", ["gfx90a"], True),
        ("gfx1100", ["gfx1036", "gfx1100"], True),
        ("gfx1100", [], True),
        ("gfx11-generic", ["gfx1101"], True),
        ("gfx90a gfx1100", ["gfx1101"], False),
    ],
)
def test_kernels_for_other_chips_than_the_machines_leave_it_to_another_backend(monkeypatch, archs, chips, served):
    from bnb_core.backends import compiled_gpu

    module = SimpleNamespace(missing_runtime=lambda: None, driver_version=lambda: 60342134, archs=archs)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    platform = compiled_gpu.GpuPlatform("hip", build="BUILD", compiler="hipcc", minor=100_000, chips=lambda: chips)
    reason = compiled_gpu._why_unavailable(platform, module)
    others = f"its kernels are built for {archs}, and this machine has {' '.join(chips)}; BUILD builds them for that"
    assert reason == (None if served else f"{others} with hipcc")


@pytest.mark.parametrize(
    "name, minor, number, version", [("cuda", 10, 13020, "13.2"), ("hip", 100_000, 60342134, "6.3")]
)
def test_versions_are_read_as_each_maker_counts_them(name, minor, number, version):
    from bnb_core.backends import compiled_gpu

    module = SimpleNamespace(runtime_version=lambda: number, runtime_path=lambda: None)
    platform = compiled_gpu.GpuPlatform(name, build="", compiler="", minor=minor)
    assert compiled_gpu._runtime(platform, module) == version
    module.runtime_path = lambda: "/lib/runtime.so"
    assert compiled_gpu._runtime(platform, module) == f"{version} (/lib/runtime.so)"


def test_a_gpu_without_its_kernels_or_its_driver_is_unavailable_with_the_remedy(monkeypatch):
    from bnb_core.backends import compiled_gpu

    platform = compiled_gpu.GpuPlatform("cuda", build="BNB_BUILD=cpu,cuda pip install .", compiler="nvcc", minor=10)
    monkeypatch.setattr(compiled_gpu, "import_module", lambda name: (_ for _ in ()).throw(ImportError("none")))
    assert "BNB_BUILD=cpu,cuda pip install ." in str(compiled_gpu.make_backend(platform).unavailable)
    module = SimpleNamespace(missing_runtime=lambda: "there is no runtime", driver_version=lambda: 0)
    monkeypatch.setattr(compiled_gpu, "import_module", lambda name: module)
    assert compiled_gpu.make_backend(platform).unavailable == "there is no runtime"
    module.missing_runtime = lambda: None
    assert compiled_gpu.make_backend(platform).unavailable == "no NVIDIA driver is installed"
    module.driver_version = lambda: 13000
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is not built for NVIDIA's GPUs" in str(compiled_gpu.make_backend(platform).unavailable)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert (
        compiled_gpu.make_backend(platform).unavailable == "this torch is built for AMD (hip 6.4); its backend is 'hip'"
    )

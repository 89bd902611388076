"""Whether a backend of compiled GPU kernels can serve: its kernels, the driver and torch, each faked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bnb_core.backends import compiled_gpu
from bnb_core.backends.hip import chips as driver_chips


def test_amds_chips_are_those_of_which_its_driver_tells(monkeypatch, tmp_path):
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    assert driver_chips(tmp_path / "no driver") == []
    for node, version in enumerate((0, 90010, 90402, 110001, 90010)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(
            f"simd_count 4\ngfx_target_version {version}\nvendor_id 4098\n"
        )
    assert driver_chips(tmp_path) == ["gfx90a", "gfx942", "gfx1101"]
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
    assert driver_chips(tmp_path) == []


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
    module = SimpleNamespace(runtime_version=lambda: number, runtime_path=lambda: None)
    platform = compiled_gpu.GpuPlatform(name, build="", compiler="", minor=minor)
    assert compiled_gpu._runtime(platform, module) == version
    module.runtime_path = lambda: "/lib/runtime.so"
    assert compiled_gpu._runtime(platform, module) == f"{version} (/lib/runtime.so)"


def test_a_gpu_without_its_kernels_or_its_driver_is_unavailable_with_the_remedy(monkeypatch):
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

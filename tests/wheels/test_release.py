"""The workflow of a release, which runs elsewhere: what can be held against it here."""

from __future__ import annotations

import re
import subprocess
import sys

from wheel_builds import ROOT

sys.path.insert(0, str(ROOT))
from csrc_cuda import toolchain as cuda
from csrc_hip import toolchain as hip

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
LINUX_X86_64 = ROOT / ".github" / "linux_x86_64.sh"


def test_the_workflow_is_one_that_github_takes():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    subprocess.run(command, check=True, timeout=120)


def test_every_action_is_pinned_to_a_commit_and_says_its_version():
    uses = re.findall(r"uses: (.*)", WORKFLOW.read_text())
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


def packages_installed(text: str) -> list[str]:
    """What every `pip install` names that is no file, with its version."""
    found = []
    for command in re.findall(r"pip install (.*?)(?:&&|$)", text.replace("\\\n", " "), re.MULTILINE):
        words = command.split()
        values = {words[i + 1] for i, word in enumerate(words) if word in ("-c", "--target")}
        found += [word for word in words if re.match(r"\w", word) and word not in values]
    return found


def test_every_package_that_it_installs_has_its_version():
    """But torch, of which a wheel serves every one."""
    packages = packages_installed(WORKFLOW.read_text()) + packages_installed(LINUX_X86_64.read_text())
    assert {"torch", "cibuildwheel==4.3.5", "build==1.3.0", "nvidia-cuda-nvcc==13.0.88"} <= set(packages)
    assert [each for each in packages if "==" not in each and each != "torch"] == []


def test_the_wheel_with_kernels_for_gpus_is_for_what_a_build_here_is_for_by_default():
    script = LINUX_X86_64.read_text()
    assert f"BNB_CUDA_ARCHS:-{';'.join(cuda.DEFAULT_ARCHS)}}}" in script
    assert f"BNB_HIP_ARCHS:-{';'.join(hip.DEFAULT_ARCHS)}}}" in script

"""The workflow of a release, which runs elsewhere: what can be held against it here."""

from __future__ import annotations

import re
import subprocess
import sys

from wheel_builds import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"


def test_the_workflow_is_one_that_github_takes():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(WORKFLOW)]
    subprocess.run(command, check=True, timeout=120)


def test_every_action_is_pinned_to_a_commit_and_says_its_version():
    uses = re.findall(r"uses: (.*)", WORKFLOW.read_text())
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


def test_every_package_that_it_installs_by_name_has_its_version():
    installs = re.findall(r"pip install ([\w-]+\S*)", WORKFLOW.read_text())
    assert [each for each in installs if "==" not in each] == []

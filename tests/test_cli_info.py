"""`bnb-core info`, the group of commands, and what happens without the `cli` extra."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import bnb_core
from bnb_core import cli, registry
from bnb_core.cli.commands import bnb_core as group


@pytest.fixture(scope="module")
def facts():
    result = CliRunner().invoke(group, ["info", "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_json_holds_every_backend_with_a_reason_where_it_cannot_run(facts):
    assert facts["backends"].keys() == registry.backends().keys()
    for backend in facts["backends"].values():
        assert backend["available"] == (backend["unavailable because"] is None)


def test_json_names_the_serving_backend_of_every_primitive(facts):
    assert list(facts["serving"]) == registry.primitive_names()
    assert {name: row["cpu"] for name, row in facts["serving"].items()} == registry.serving("cpu")


def test_json_holds_versions_and_the_processor(facts):
    assert facts["versions"]["bnb_core"] == bnb_core.__version__
    assert facts["cpu"]["model"]


def test_tables_show_backends_and_primitives():
    output = CliRunner().invoke(group, ["info"], env={"COLUMNS": "200"}).output
    for name in (*registry.backends(), *registry.primitive_names()):
        assert name in output


def test_tables_show_the_whole_reason_why_a_backend_is_unavailable():
    reason = "pip install bnb_core[extra]"
    with registry.registered(registry.Backend("absent", (), 0, {}, unavailable=reason)):
        assert reason in CliRunner().invoke(group, ["info"], env={"COLUMNS": "200"}).output


def test_unknown_backend_in_the_environment_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "bnb_core", "info"]
    environment = os.environ | {"BNB_BACKEND": "nonesuch"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nonesuch" in result.stderr


def test_help_lists_every_command():
    result = CliRunner().invoke(group, ["--help"])
    assert result.exit_code == 0
    assert {"info", "demo"} <= set(result.output.split())


def test_unknown_command_is_exit_code_2():
    assert CliRunner().invoke(group, ["nonesuch"]).exit_code == 2


def test_without_the_cli_extra_the_program_says_what_to_install(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'bnb-core needs rich: pip install "bnb_core[cli]"\n'

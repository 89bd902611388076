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
from bnb_core.backend import Backend
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
    with registry.registered(Backend("absent", (), 0, {}, unavailable=reason)):
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nonesuch"], "No such command 'nonesuch'; see `bnb-core --help`"),
        (["--nonesuch"], "No such option"),
        (["info", "--nonesuch"], "see `bnb-core info --help`"),
        (["info", "more"], "unexpected extra argument"),
        (["demo", "--seed"], "'--seed' requires an argument"),
        (["conformance", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["conformance", "--seed", str(2**63)], "'--seed'"),
        (["conformance", "--json", ""], "'--json': expected a path, got ''"),
        (["conformance", "--backend", ""], "registered are"),
        (["conformance", "nonesuch"], "No such command 'nonesuch'; see `bnb-core conformance --help`"),
        (["conformance", "compare", "nonesuch", ""], "'FIRST'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, sentence):
    result = CliRunner().invoke(group, arguments, prog_name="bnb-core")
    assert result.exit_code == 2 and result.output.count("\n") == 1 and result.output.startswith("Error: ")
    assert sentence in result.output


def test_without_a_command_the_program_shows_its_help():
    assert "Commands:" in CliRunner().invoke(group, []).output


def test_help_of_conformance_says_that_a_backend_is_required():
    text = " ".join(CliRunner().invoke(group, ["conformance", "--help"]).output.split())
    assert "`bnb-core info` lists them. [required]" in text
    result = CliRunner().invoke(group, ["conformance"])
    assert result.exit_code == 2 and "--backend: expected one of" in result.output


def program(*arguments, **options):
    command = [sys.executable, "-m", "bnb_core", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--help"], ["bench", "--size", "64"]])
def test_output_to_a_full_disk_is_one_line_and_exit_code_1(arguments):
    with open("/dev/full", "w") as full:
        result = program(*arguments, stdout=full)
    assert result.returncode == 1
    assert result.stderr == "Error: cannot write the output: No space left on device\n"


def test_a_reader_that_has_gone_is_no_error_to_be_told():
    read, write = os.pipe()
    os.close(read)
    result = program("info", "--json", stdout=write)
    os.close(write)
    assert result.returncode == 1 and result.stderr == ""


def test_what_the_output_cannot_encode_is_replaced():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    result = program("info", stdout=subprocess.PIPE, env=environment)
    assert result.returncode == 0 and "Which backend serves" in result.stdout, result.stderr


def test_without_the_cli_extra_the_program_says_what_to_install(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == 'bnb-core needs rich: pip install "bnb_core[cli]"\n'

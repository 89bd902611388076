"""README and docs are true: their code runs, the commands they name exist, the errors they explain are raised."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import documentation
import pytest
from documentation import HUB, OWN_PROCESS, PAGES, ROOT, SEVERAL_PROCESSES, blocks_of, python_blocks

from bnb_core.cli.commands import COMMANDS
from bnb_core.cli.commands import bnb_core as group

WITH_PYTHON = [page for page in PAGES if any(not block.needs for block in python_blocks(page))]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run_in_turn(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documentation.run_blocks(page, [block for block in python_blocks(page) if not block.needs])


def test_blocks_that_change_the_process_run_in_their_own():
    blocks = [(page, block) for page in PAGES for block in python_blocks(page) if block.needs == OWN_PROCESS]
    assert blocks
    for page, block in blocks:
        result = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
        assert result.returncode == 0, f"{page}: {result.stderr}"


def test_what_a_block_needs_is_known():
    needs = {block.needs for page in PAGES for block in blocks_of(page)}
    assert needs <= {"", HUB, OWN_PROCESS, SEVERAL_PROCESSES, "transformers", "peft"}


def commands_of(page):
    lines = [line for block in blocks_of(page) if block.language != "python" for line in block.text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.lstrip().startswith("bnb-core ")]


@pytest.mark.parametrize(
    "page", [page for page in [*PAGES, ROOT / "CONTRIBUTING.md"] if commands_of(page)], ids=name_of
)
def test_commands_have_the_options_that_are_shown(page):
    for _, *arguments in commands_of(page):
        if "compare" in arguments:
            continue
        command = group.get_command(click.Context(group), arguments[0])
        assert command is not None, arguments
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {argument for argument in arguments if argument.startswith("--")} <= known, arguments


def test_the_reference_of_commands_has_each_option():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for name in COMMANDS:
        assert name in text
    for name in ("quantize", "dequantize", "inspect", "chat", "plan"):
        section = re.split(rf"^## bnb-core {name}\b.*$", text, flags=re.M)[1].partition("\n## ")[0]
        for parameter in group.get_command(click.Context(group), name).params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert option.startswith("-") is False or f"`{option}" in section, (name, option)


def text_of(node):
    """Of a string, a formatted value as a space; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else " " for part in node.values)
    return None


def nodes_of_the_library():
    for path in sorted((ROOT / "bnb_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path, node


def messages():
    """All texts of the library."""
    return [text for _, node in nodes_of_the_library() if (text := text_of(node)) is not None]


# What is accepted or, after a semicolon, what to do.
ACCEPTED = re.compile(r"expected|;|\b(needs?|needed|only|takes?|must|give|use|call|load|leave)\b|none of|instead of")
FOR_PROGRAMMERS = ("AttributeError", "NotImplementedError", "AssertionError", "_Stopped", "KeyError")
"""Python's own wording, or what a subclass has to do."""


def raised_messages():
    """Of each raise with words of its own; those that only pass on another message, such as `key: error`, have none."""
    for path, node in nodes_of_the_library():
        if "conformance" in path.parts or not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
            continue
        text = text_of(node.exc.args[0]) if node.exc.args else None
        if text is not None and re.search(r"[A-Za-z_]", text) and not re.search(r":\s+$", text):
            yield f"{path}:{node.lineno}", ast.unparse(node.exc.func), text


def test_every_error_says_what_it_is_about_and_what_is_accepted_or_to_be_done():
    found = list(raised_messages())
    assert len(found) > 200
    for place, kind, text in found:
        assert len(re.findall(r"[A-Za-z_]+", text)) > 1, f"{place}: {text}"
        assert kind in FOR_PROGRAMMERS or ACCEPTED.search(text), f"{place}: {text}"


def test_errors_that_are_explained_are_those_of_the_library():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    titles = re.findall(r"^### (.*)$", page, re.M)
    texts = list(messages())
    assert len(titles) > 15
    assert [title for title in titles if not any(title in text for text in texts)] == []


def test_every_public_name_of_the_reference_exists():
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
            owner, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(owner), last), name


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(Path(page).relative_to(ROOT / "docs")) in navigation


def test_notebooks_are_those_of_the_tutorials(tmp_path):
    script = ROOT / "docs" / "notebooks.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "examples" / "notebooks").iterdir()}
    assert made == kept, f"run {script} examples/notebooks"
    code = [cell for text in kept.values() for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(code) == sum(len(python_blocks(page)) for page in (ROOT / "docs" / "tutorials").glob("*.md"))

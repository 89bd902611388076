"""Every public name of bitsandbytes is here, and takes the same calls, or absences.py says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from ecosystem import surface
from ecosystem.absences import ABSENCES

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Any]:
    """The surface of the real bitsandbytes."""
    folder = os.environ.get("BNB_PEER")
    if not folder:
        pytest.skip("BNB_PEER names no folder with the real bitsandbytes (pip install --no-deps --target)")
    path = os.pathsep.join([str(Path(folder).resolve()), str(TESTS), os.environ.get("PYTHONPATH", "")])
    target = tmp_path_factory.mktemp("surface") / "surface.json"
    command = [sys.executable, "-m", "ecosystem.surface", str(target)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def differences(theirs) -> list[str]:
    """What is not here: names, ``name(argument)`` of calls and ``name=`` of constants."""
    found: list[str] = []
    for name, wanted in theirs.items():
        if not any(is_below(name, absent) for absent in found):
            found += compare(name, wanted)
    return found


def is_below(name: str, owner: str) -> bool:
    return name.startswith((f"{owner}.", f"{owner}()."))


def compare(name: str, wanted: dict[str, Any]) -> list[str]:
    ours = describe(name)
    if ours is None or (is_callable(wanted) and not is_callable(ours)):
        return [name]
    if wanted["kind"] == "operator":
        return [f"{name}="] if ours["schema"] != wanted["schema"] else []
    if wanted.get("signature") is not None:
        return [f"{name}({argument})" for argument in refused_arguments(ours["signature"] or [], wanted["signature"])]
    return [f"{name}="] if differs(ours.get("value"), wanted.get("value")) else []


def describe(name: str) -> dict[str, Any] | None:
    """What is here under that name; a variable of the environment never is."""
    # Through JSON, as what it is compared with.
    return None if name.startswith("$") else json.loads(json.dumps(surface.describe(name)))


def is_callable(description: dict[str, Any]) -> bool:
    return "signature" in description


def differs(ours: Any, wanted: Any) -> bool:
    """Whether a constant has another value. What is computed here cannot be told; a set may have more entries."""
    if ours is None or wanted is None:
        return False
    if isinstance(wanted, list) and isinstance(ours, list):
        return not set(wanted) <= set(ours)
    return bool(ours != wanted)


def refused_arguments(ours: list[list[Any]], wanted: list[list[Any]]) -> list[str]:
    """The arguments of a call that is legal for ``wanted`` and would not be for ``ours``, or would mean another thing.

    More arguments may follow here, if they have defaults.
    """
    here = {name: (position, kind, default) for position, (name, kind, default) in enumerate(map(by_kind, ours))}
    refused = []
    for position, (name, kind, default) in enumerate(map(by_kind, wanted)):
        our_position, our_kind, our_default = here.pop(name, (None, None, None))
        by_position = kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
        if kind == "KEYWORD_ONLY" and our_kind == "POSITIONAL_OR_KEYWORD":
            our_kind = kind
        same_place = our_kind == kind and (our_position == position or not by_position)
        same_default = our_default == default or (default is None and our_kind is not None)
        if not (same_place and same_default):
            refused.append(name)
    needed = [name for name, (_, kind, default) in here.items() if default is None and not kind.startswith("VAR_")]
    return refused + needed


def by_kind(argument: list[Any]) -> list[Any]:
    """``*args`` and ``**kwargs`` by another name are the same."""
    name, kind, default = argument
    return [kind if kind.startswith("VAR_") else name, kind, default]


def test_every_name_is_here_or_its_absence_has_a_reason(differences):
    unexplained = [name for name in differences if not any(fnmatchcase(name, pattern) for pattern in ABSENCES)]
    assert not unexplained, "\n".join(unexplained)


def test_every_reason_is_for_something_that_is_absent(differences):
    stale = [pattern for pattern in ABSENCES if not any(fnmatchcase(name, pattern) for name in differences)]
    assert not stale, "\n".join(stale)


def test_every_private_name_that_somebody_calls_is_one_of_theirs(theirs):
    assert [name for name in surface.CALLED_PRIVATE if name not in theirs] == []


def test_what_is_known_to_be_there_is_found(theirs):
    known = {
        "bitsandbytes.nn.modules.Linear4bit.forward",
        "bitsandbytes.nn.modules.Params4bit().blocksize",
        "bitsandbytes.optim.adam.Adam8bit().non_castable_tensor_keys",
        "torch.ops.bitsandbytes.gemv_4bit.out",
        "$BNB_CUDA_VERSION",
    }
    assert known <= theirs.keys() and len(theirs) > 1000
    assert not [name for name in theirs if name.endswith((".torch", ".np", ".annotations", ".Optional"))]


ONE = [["a", "POSITIONAL_OR_KEYWORD", None], ["b", "POSITIONAL_OR_KEYWORD", "0.0"]]


@pytest.mark.parametrize(
    "ours, refused",
    [
        (ONE, []),
        ([*ONE, ["c", "POSITIONAL_OR_KEYWORD", "None"], ["more", "VAR_KEYWORD", None]], []),
        ([["a", "POSITIONAL_OR_KEYWORD", "1.0"], ONE[1]], []),
        (ONE[:1], ["b"]),
        (ONE[::-1], ["a", "b"]),
        ([ONE[0], ["b", "POSITIONAL_OR_KEYWORD", "1.0"]], ["b"]),
        ([ONE[0], ["b", "KEYWORD_ONLY", "0.0"]], ["b"]),
        ([*ONE, ["c", "KEYWORD_ONLY", None]], ["c"]),
        ([["args", "VAR_POSITIONAL", None], ["kwargs", "VAR_KEYWORD", None]], ["a", "b"]),
    ],
)
def test_calls_are_told_apart(ours, refused):
    assert refused_arguments(ours, ONE) == refused


def test_a_name_that_is_taken_away_is_noticed(theirs, monkeypatch):
    import bitsandbytes

    name = "bitsandbytes.nn.modules.Linear4bit.set_compute_type"
    assert compare(name, theirs[name]) == []
    monkeypatch.delattr(bitsandbytes.nn.Linear4bit, "set_compute_type")
    assert compare(name, theirs[name]) == [name]

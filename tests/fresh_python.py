"""Code in an interpreter of its own, outside the checkout.

It is a fork of one that has imported torch, and nothing of this package: that import takes longer than most of what is
asked here.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = Path(__file__).parent / "packages"
QUANTIZE = "import torch, bnb_core; bnb_core.functional.quantize_4bit(torch.ones(64)); print('served')"
TIMEOUT = 120
"""Seconds, after which the code is ended by a signal."""


def run_python(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the packages of a folder, if one is given."""
    variables = {**os.environ, **environment}
    if folder is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory() as outputs:
        files = [str(Path(outputs, name)) for name in ("stdout", "stderr")]
        server = _server()
        server.stdin.write(json.dumps((code, variables, files)) + "\n")
        server.stdin.flush()
        returncode = int(server.stdout.readline())
        stdout, stderr = (Path(file).read_text() for file in files)
    return subprocess.CompletedProcess(["python", "-c", code], returncode, stdout, stderr)


@cache
def _server() -> Any:
    """Ends with this process, which closes its input."""
    command = [sys.executable, str(Path(__file__))]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables, cwd=PACKAGES)


def _serve() -> None:
    del sys.path[0]  # this folder
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_execute(*json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _execute(code: str, variables: dict[str, str], files: list[str]) -> int:
    """What `python -c` does; gives the exit code."""
    signal.alarm(TIMEOUT)
    for descriptor, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = ["", *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-c"]
    main = sys.modules["__main__"] = ModuleType("__main__")
    result = 0
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        result = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        result = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return result


if __name__ == "__main__":
    _serve()

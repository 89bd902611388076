"""The real bitsandbytes in a process of its own, which does tasks that it is told line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


class Peer:
    """Starts the process; attributes are the functions of tasks.py.

    Args:
        folder: where pip has put the real bitsandbytes; it comes first on the path, and so does its metadata.
    """

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join([str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ecosystem.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            cwd=folder,
        )

    def __getattr__(self, task: str) -> Any:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin is not None and self.process.stdout is not None
            print(json.dumps([task, arguments]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            assert answer, f"the peer ended in {task}{arguments}; its own output says why"
            error, result = json.loads(answer)
            assert error is None, f"the peer's {task}{arguments}: {error}"
            return result

        return call

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def main() -> None:
    """Do every task that a line of standard input names; standard output holds the answers and nothing else."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        from ecosystem import tasks

        for line in sys.stdin:
            task, arguments = json.loads(line)
            try:
                answer = [None, getattr(tasks, task)(*arguments)]
            except Exception as error:
                answer = [f"{type(error).__name__}: {error}", None]
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

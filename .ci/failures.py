"""Prints the end of what each failed command printed: `failures.py RESULTS`, the file that tox --result-json wrote."""

import json
import sys
from pathlib import Path

LINES = 60

for name, environment in json.loads(Path(sys.argv[1]).read_text())["testenvs"].items():
    for step in [*environment.get("setup", []), *environment.get("test", [])]:
        if step["retcode"] != 0:
            print(f"\n{name}: exit {step['retcode']} of", *step["command"])
            print(*(step["output"] + step["err"]).splitlines()[-LINES:], sep="\n")

"""What a wheel is made of, as CycloneDX 1.6 has it; wheels keep it in sboms/ of their dist-info (PEP 770)."""

from __future__ import annotations

import json
import subprocess

PACKAGE = "pkg:pypi/bnb-core"


def bill_of_materials(version: str, compilers: dict[str, list[str]], linked_in: dict[str, str]) -> str:
    """The text of the file, the same for the same wheel: it has no time and no serial number.

    Args:
        version: the package's.
        compilers: by name, the command that tells a compiler's version, in the first line that has a digit.
        linked_in: libraries that are part of the wheel's own, their versions by their names.
    """
    tools = [
        {"type": "application", "name": name, "version": _told(command)} for name, command in sorted(compilers.items())
    ]
    reference = f"{PACKAGE}@{version}"
    package = {
        "type": "library",
        "bom-ref": reference,
        "name": "bnb_core",
        "version": version,
        "purl": reference,
        "licenses": [{"license": {"id": "MIT"}}],
    }
    parts = [
        {"type": "library", "bom-ref": f"{name}@{number}", "name": name, "version": number}
        for name, number in sorted(linked_in.items())
    ]
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": package, "tools": {"components": tools}},
        "components": parts,
        "dependencies": [{"ref": reference, "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    return json.dumps(bill, indent=2, sort_keys=True) + "\n"


def _told(command: list[str]) -> str:
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next((line.strip() for line in report.splitlines() if any(map(str.isdigit, line))), "unknown")

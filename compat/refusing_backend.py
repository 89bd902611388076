"""setuptools, but for an environment that has a real bitsandbytes: pip would uninstall that without asking."""

import sysconfig
from importlib.metadata import distributions
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OURS = "+bnb.core"


def refuse_to_replace() -> None:
    """End the build if the environment of this interpreter has another bitsandbytes.

    A build that pip isolates runs on the interpreter of the environment that it installs into. One that uv isolates
    does not, and cannot know which environment that is (README.md).
    """
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    for found in distributions(name="bitsandbytes", path=folders):
        if not found.version.endswith(OURS):
            raise SystemExit(
                f"bitsandbytes {found.version} is installed in {found.locate_file('')} and would be replaced. "
                "Run `pip uninstall bitsandbytes` first, or use another environment; in one process "
                "bnb_core.install_as_bitsandbytes() needs neither."
            )


def build_wheel(*arguments: Any, **options: Any) -> str:
    refuse_to_replace()
    return build_meta.build_wheel(*arguments, **options)


def build_editable(*arguments: Any, **options: Any) -> str:
    refuse_to_replace()
    return build_meta.build_editable(*arguments, **options)

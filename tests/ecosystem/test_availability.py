"""Every library that looks for bitsandbytes finds it, in the version that it wants."""

from __future__ import annotations

from pathlib import Path

import accelerate.utils
import diffusers.utils
import diffusers.utils.import_utils
import peft.import_utils
import pytest
import transformers.utils
from ecosystem.upstream import CANNOT

CHECKS = {
    "transformers": transformers.utils.is_bitsandbytes_available,
    "accelerate": accelerate.utils.is_bnb_available,
    "accelerate with a version": lambda: accelerate.utils.is_bnb_available(min_version="0.48.0"),
    "accelerate, 4-bit": accelerate.utils.is_4bit_bnb_available,
    "accelerate, 8-bit": accelerate.utils.is_8bit_bnb_available,
    "accelerate, several backends": accelerate.utils.is_bitsandbytes_multi_backend_available,
    "peft": peft.import_utils.is_bnb_available,
    "peft, 4-bit": peft.import_utils.is_bnb_4bit_available,
    "diffusers": diffusers.utils.is_bitsandbytes_available,
    "diffusers with a version": lambda: diffusers.utils.import_utils.is_bitsandbytes_version(">=", "0.48.0"),
}


@pytest.mark.parametrize("check", CHECKS)
def test_bitsandbytes_is_available(check):
    assert CHECKS[check]()


def test_the_migration_page_gives_the_reason_for_every_failure_that_is_expected():
    page = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
    assert [case.reason for case in CANNOT.values() if case.reason not in page] == []

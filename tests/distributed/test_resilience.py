"""A rank is killed in the middle of a checkpoint; the one before it loads on another number of ranks."""

from __future__ import annotations

from pathlib import Path

import resilience


def test_a_run_goes_on_from_the_checkpoint_before_a_kill(tmp_path: Path):
    result = resilience.experiment(tmp_path, ranks=3, resume_ranks=2, steps=16, every=4)
    assert result["checkpoint that was being written"] == 8
    assert result["checkpoint that was loaded"] == 4
    assert result["steps"] == [16, 16]
    first, last = result["first and last loss, undisturbed"]
    assert last < first
    assert result["largest difference"] < 2e-3

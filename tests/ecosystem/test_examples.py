"""Each example runs, and says what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from documentation import ROOT
from ecosystem.upstream import FACE

pytestmark = pytest.mark.skipif(FACE == "real", reason="examples name bnb_core")


def output_of(name, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_8_bit_adam_reaches_the_same_loss_with_less_state():
    rows = re.findall(r"^(\S+): loss ([\d.]+), ([\d,]+) bytes", output_of("adam_8bit.py"), re.M)
    (_, loss, nbytes), *ours = [(name, float(loss), int(size.replace(",", ""))) for name, loss, size in rows]
    assert [name for name, _, _ in ours] == ["bnb_core.Adam8bit", "bnb_core.PagedAdam8bit"]
    for _, our_loss, our_bytes in ours:
        assert our_loss == pytest.approx(loss, rel=0.1) and our_bytes < 0.3 * nbytes


def test_a_fitted_codebook_beats_the_others():
    rows = re.findall(r"^(\w+): ([\d.]+) dB", output_of("own_codebook.py"), re.M)
    found = {name: float(sqnr) for name, sqnr in rows}
    assert found["fitted"] > max(found["dynamic"], found["linear"]) + 3


def test_all_requests_are_served_in_batches():
    served, steps, tokens = map(
        int, re.match(r"(\d+) requests in (\d+) steps: (\d+) tokens", output_of("serving.py")).groups()
    )
    assert served == 24 and tokens > 4 * steps


def test_transformers_writes_from_a_quantized_folder():
    output = output_of("transformers_inference.py")
    assert "bytes became" in output and len(re.search(r"tokens: \[(.*)\]", output)[1].split(",")) == 16

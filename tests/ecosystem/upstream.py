"""What the libraries above cannot do with bitsandbytes, real or not; docs/migration.md lists the same reasons.

`BNB_FACE=real pytest tests/ecosystem -m xfail`, with the real one on the path, shows that it fails in the same way.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest

FACE = os.environ.get("BNB_FACE", "process")


class Upstream(NamedTuple):
    """Why something fails and with which error; with the real one another where its name is given."""

    reason: str
    error: Any
    error_of_the_real: Any = None


_NO_MERGING_OF_PACKED = (
    # What PEFT hands over as packed codes are values. With the real one a forward takes them for codes all the same.
    pytest.RaisesExc(ValueError, match="^[AB]: expected [0-9]+ bytes for [0-9]+ elements of 4 bits"),
    pytest.RaisesExc(RuntimeError, match="is invalid for input of size"),
)

CANNOT = {
    "AdaLoRA": Upstream("PEFT has no merging of AdaLoRA into quantized weights", NotImplementedError),
    "IA3": Upstream(
        "PEFT refuses to merge IA3 into quantized weights",
        # merge_adapter() says nothing, merge_and_unload() says it.
        pytest.RaisesExc((NotImplementedError, ValueError), match="^$|^Cannot merge ia3 layers"),
    ),
    "RandLoRA, 4-bit": Upstream(
        "PEFT rebuilds the merged weight of RandLoRA without asking for its quantization", *_NO_MERGING_OF_PACKED
    ),
    "RandLoRA, 8-bit": Upstream(
        "PEFT's forward of RandLoRA on 8-bit weights is not the product that it merges", AssertionError
    ),
    "PVeRA, 4-bit": Upstream(
        "PEFT rebuilds the merged weight of PVeRA without asking for its quantization", *_NO_MERGING_OF_PACKED
    ),
    "dequantize": Upstream(
        "Transformers takes the dtype from the configuration as text, which a tensor does not convert to",
        pytest.RaisesExc(RuntimeError, match="^Invalid device string: 'float32'"),
    ),
}


def cannot(what: str, condition: bool = True) -> pytest.MarkDecorator:
    """The mark of a test that fails for the reason of CANNOT, and in no other way."""
    reason, error, error_of_the_real = CANNOT[what]
    raises = error_of_the_real if FACE == "real" and error_of_the_real else error
    return pytest.mark.xfail(condition, strict=True, reason=reason, raises=raises)

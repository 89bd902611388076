"""In one process bnb_core answers to the name bitsandbytes, unless something else does already."""

from __future__ import annotations

from test_registry import run_python

SAME_OBJECTS = """
import bnb_core
bnb_core.install_as_bitsandbytes()
bnb_core.install_as_bitsandbytes()
import importlib.util
import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from bitsandbytes.optim import AdamW8bit
from bitsandbytes.utils import replace_linear
assert bnb is bnb_core and F is bnb_core.functional and Linear4bit is bnb_core.nn.Linear4bit
assert AdamW8bit is bnb_core.optim.AdamW8bit and replace_linear is bnb_core.utils.replace_linear
assert replace_parameter_4bit is bnb_core.nn.parametrize.replace_parameter_4bit
assert importlib.util.find_spec("bitsandbytes") is not None
import torch
layer = bnb.nn.Linear4bit(64, 8, quant_type="nf4").to("cpu")
print(tuple(layer(torch.ones(2, 64)).shape), type(layer.weight).__name__)
"""

OTHER_LIBRARY = """
import sys, types
sys.modules["bitsandbytes"] = types.ModuleType("bitsandbytes")
import bnb_core
try:
    bnb_core.install_as_bitsandbytes()
except RuntimeError as error:
    print(error)
"""


def test_the_modules_are_the_same_objects_under_both_names():
    result = run_python(SAME_OBJECTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 8) Params4bit"


def test_another_bitsandbytes_is_not_replaced():
    assert "already imported" in run_python(OTHER_LIBRARY).stdout


def test_importing_bnb_core_alone_claims_no_name():
    code = "import sys, bnb_core; print([m for m in sys.modules if m.startswith('bitsandbytes')])"
    assert run_python(code).stdout.strip() == "[]"

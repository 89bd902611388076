"""torch.export: a program of quantized layers computes the bits that the layers do, saved and loaded, for any batch."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearFP4, LinearNF4

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "double-quantized": lambda: LinearNF4(64, 48),
    "plain": lambda: LinearFP4(64, 48, compress_statistics=False),
    "8-bit": lambda: Linear8bitLt(64, 48, has_fp16_weights=False),
    "8-bit with outliers": lambda: Linear8bitLt(64, 48, has_fp16_weights=False, threshold=2.0),
    "4-bit embedding": lambda: EmbeddingNF4(48, 64),
    "4-bit embedding whose rows share blocks": lambda: EmbeddingNF4(48, 65),
    "8-bit embedding": lambda: Embedding8bit(48, 64),
}


@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["any batch", "one batch"])
def test_an_exported_program_computes_what_the_layer_does(build, strict, dynamic):
    torch._dynamo.reset()
    model = nn.Sequential(build()).to("cpu")
    x = torch.arange(40) if isinstance(model[0], nn.Embedding) else torch.randn(40, 64)
    with torch.no_grad():
        shapes = ({0: Dim("batch", min=2)},) if dynamic else None
        program = export(model, (x,), strict=strict, dynamic_shapes=shapes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for exported in (program, torch.export.load(file)):
            same_bits("y", exported.module()(x), model(x))
            if dynamic:
                same_bits("y of a part", exported.module()(x[:7]), model(x[:7]))

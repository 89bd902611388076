"""Which tensors of a checkpoint are quantized, by their names and shapes: linear layers, as Transformers does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from bnb_core.checkpoints.experts import STORED_OTHERWISE, Experts
from bnb_core.checkpoints.headers import DTYPES, StoredTensor
from bnb_core.checks import FLOAT_DTYPES
from bnb_core.quantize import QuantizationConfig

WEIGHT = ".weight"

KEPT = {
    "embedding": r"(^|.*\.)(\w*embed\w*|wte|wpe|shared|emb|relative_attention_bias)",
    "output head": r"(.*\.)?lm_head|cls\..*|(model\.)?(proj_out|output(_projection)?|head|score|classifier|qa_outputs)",
    "router": r".*\b(gate|router|shared_expert_gate)|.*\brouter\.(classifier|layer|proj)",
    "norm": r".*norm\d*",
}
"""Why a matrix is kept: a regular expression of its module's name. Routers are small, and what they choose is not."""

FLOAT32_MODULES = dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct"), ("wo",))
"""By model type: what Transformers keeps in f32 whatever the quantization."""

TRANSPOSED = dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), ("c_attn", "c_proj", "c_fc"))
"""By model type: layers that store their weight as [in, out], Transformers' Conv1D. Quantized, it is [out, in]."""

RETRIEVED = {"doge": (r".*\.mlp$",)}
"""By model type: modules whose embeddings are experts, as an expression for Transformers; they stay as they are."""

HEADS = ("lm_head", "embed_out", "proj_out", "output_projection", "score", "classifier", "cls")
"""Layers that a model may have without a tensor of their own, as they are tied or made for a task."""


class Choice(NamedTuple):
    """What is to become of a tensor."""

    kept_because: str | None
    """None: it is quantized."""
    transposed: bool = False
    """Stored as [in, out]."""
    worth_a_word: bool = False
    """Kept, though somebody may expect otherwise."""


def choose(tensor: StoredTensor, skip: Sequence[str], model_type: str | None) -> Choice:
    """Whether a tensor is the weight of a linear layer that is to be quantized.

    Args:
        skip: patterns (fnmatch) of module or tensor names that are kept; one without a dot also means the last part.
        model_type: of config.json.
    """
    module, dot, _ = tensor.name.rpartition(WEIGHT)
    if len(tensor.shape) == 3 and DTYPES.get(tensor.dtype) in FLOAT_DTYPES and "conv" not in tensor.name:
        return Choice("three dimensions", worth_a_word=True)
    if len(tensor.shape) != 2 or not dot or not tensor.name.endswith(WEIGHT):
        return Choice("not the weight of a linear layer")
    if DTYPES.get(tensor.dtype) not in FLOAT_DTYPES:
        return Choice(f"dtype {tensor.dtype}", worth_a_word=True)
    if not tensor.numel:
        return Choice("empty")
    last = module.rpartition(".")[2]
    for pattern in skip:
        if fnmatchcase(tensor.name, pattern) or fnmatchcase(module, pattern) or fnmatchcase(last, pattern):
            return Choice(f"skip {pattern}")
    for reason, expression in KEPT.items():
        if re.fullmatch(expression, module):
            return Choice(reason)
    if last in FLOAT32_MODULES.get(model_type or "", ()):
        return Choice(f"float32 in {model_type}")
    return Choice(None, transposed=is_transposed(tensor.name, model_type))


def choose_experts(each: Experts, config: QuantizationConfig, model_type: str | None) -> Choice:
    """Whether a projection of all experts of a layer is to be quantized as one tensor."""
    pattern = each.skipped_by(config.skip_modules)
    if pattern is not None:
        return Choice(f"skip {pattern}")
    if model_type in STORED_OTHERWISE:
        return Choice(f"experts as {model_type} stores them", worth_a_word=True)
    if config.method == "int8":
        return Choice("experts, which int8 leaves as they are", worth_a_word=True)
    if each.blocksize(config.blocksize) is None:
        return Choice("experts whose elements no block size divides", worth_a_word=True)
    return Choice(None)


def is_transposed(name: str, model_type: str | None) -> bool:
    """Whether the weight of this name is that of a layer which stores it as [in, out] unless it is quantized."""
    return name.removesuffix(WEIGHT).rpartition(".")[2] in TRANSPOSED.get(model_type or "", ())


def skipped_modules(
    choices: Mapping[str, Choice], tensors: Iterable[StoredTensor], experts: Sequence[Experts], model_type: str | None
) -> list[str]:
    """What Transformers has to leave as it is, for config.json: each kept matrix's module, and the heads.

    Transformers replaces every linear layer that is not named; a name there also means all names that end so. Experts
    are given as they are quantized, in one tensor for all of a layer's.
    """
    quantized = [name.removesuffix(WEIGHT) for name, choice in choices.items() if choice.kept_because is None]
    of_experts = {part.name for each in experts for part in each.parts}
    kept = [
        tensor.name.removesuffix(WEIGHT)
        for tensor in tensors
        if choices[tensor.name].kept_because and len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT)
        if tensor.name not in of_experts
    ]
    heads = [head for head in HEADS if not any(_names(head, module) for module in quantized)]
    retrieved = RETRIEVED.get(model_type or "", ())
    return list(dict.fromkeys([*heads, *kept, *retrieved, *_skipped_experts(choices, experts)]))


def _skipped_experts(choices: Mapping[str, Choice], experts: Sequence[Experts]) -> list[str]:
    """The modules of those that --skip names; Transformers quantizes others when it loads them."""
    skipped = [each for each in experts if str(choices[each.parts[0].name].kept_because).startswith("skip ")]
    if skipped and len(skipped) == len(experts):
        return [".experts"]
    return [name for each in skipped for name in (each.owner, each.owner.replace(".block_sparse_moe.", ".mlp."))]


def _names(key: str, module: str) -> bool:
    """Whether Transformers 4 or 5 takes this key for this module."""
    return module.endswith(key) or f"{key}." in f"{module}."


def model_type_of(config: Mapping[str, Any] | None) -> str | None:
    """That of config.json, if it says one."""
    found = (config or {}).get("model_type")
    return found if isinstance(found, str) else None

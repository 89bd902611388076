"""Quantized modules and their parameters."""

from bnb_core.nn import parametrize
from bnb_core.nn.checked_load import load_state_dict
from bnb_core.nn.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from bnb_core.nn.expert_cache import ExpertCache
from bnb_core.nn.expert_parallel import parallelize_experts
from bnb_core.nn.experts import Experts4bit, GroupedLinear4bit
from bnb_core.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from bnb_core.nn.linear8bit import Int8Params, Linear8bitLt
from bnb_core.nn.offload import OffloadedLinear4bit, offload_experts
from bnb_core.nn.outlier import OutlierAwareLinear
from bnb_core.nn.params4bit import Params4bit
from bnb_core.nn.sharded_load import load_from_rank_0

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "ExpertCache",
    "Experts4bit",
    "GroupedLinear4bit",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OffloadedLinear4bit",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "load_from_rank_0",
    "load_state_dict",
    "offload_experts",
    "parallelize_experts",
    "parametrize",
]

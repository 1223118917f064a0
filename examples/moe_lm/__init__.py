"""A small mixture-of-experts language model whose experts run in one process or are spread over a mesh."""

from .experts import (
    ExpertBackend,
    Experts,
    LocalExperts,
    MeshExperts,
    RoutedExperts,
    ServedExperts,
    linear_share,
    run_expert_rows,
)
from .generate import Decoder, Generation, Sampler, encode_prompts, generate
from .model import NO_TOKEN, KeyValueCache, MoeConfig, MoeLanguageModel
from .tokenizer import Tokenizer
from .weights import WEIGHTS, load, load_config, load_experts_share, load_tokenizer

__all__ = [
    "NO_TOKEN",
    "WEIGHTS",
    "Decoder",
    "ExpertBackend",
    "Experts",
    "Generation",
    "KeyValueCache",
    "LocalExperts",
    "MeshExperts",
    "MoeConfig",
    "MoeLanguageModel",
    "RoutedExperts",
    "Sampler",
    "ServedExperts",
    "Tokenizer",
    "encode_prompts",
    "generate",
    "linear_share",
    "load",
    "load_config",
    "load_experts_share",
    "load_tokenizer",
    "run_expert_rows",
]

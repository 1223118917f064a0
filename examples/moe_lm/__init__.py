"""A small mixture-of-experts language model whose experts run in one process or are spread over a mesh.

Names are looked up when they are used, so that `config`, `tokenizer` and `numpy_model` serve processes without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import NO_TOKEN, WEIGHTS, MoeConfig, load_config
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
    from .generation import Decoder, Generation, Sampler, generate
    from .model import KeyValueCache, MoeLanguageModel
    from .numpy_model import NumpyModel
    from .tokenizer import Tokenizer, encode_prompts, load_tokenizer
    from .weights import load, load_experts_share

_HOME = {
    "NO_TOKEN": "config",
    "WEIGHTS": "config",
    "Decoder": "generation",
    "ExpertBackend": "experts",
    "Experts": "experts",
    "Generation": "generation",
    "KeyValueCache": "model",
    "LocalExperts": "experts",
    "MeshExperts": "experts",
    "MoeConfig": "config",
    "MoeLanguageModel": "model",
    "NumpyModel": "numpy_model",
    "RoutedExperts": "experts",
    "Sampler": "generation",
    "ServedExperts": "experts",
    "Tokenizer": "tokenizer",
    "encode_prompts": "tokenizer",
    "generate": "generation",
    "linear_share": "experts",
    "load": "weights",
    "load_config": "config",
    "load_experts_share": "weights",
    "load_tokenizer": "tokenizer",
    "run_expert_rows": "experts",
}

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
    "NumpyModel",
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


def __getattr__(name: str) -> Any:
    """Imports the module that has `name`."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

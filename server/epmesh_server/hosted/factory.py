"""Finds what a serving rank computes: ``package.module:factory``, where ``factory(comm)`` returns the experts.

The experts are a callable ``experts(layer, hidden_states, topk_weights, topk_ids) -> hidden_states``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from epmesh.communicator import Communicator
from epmesh.errors import InvalidRequest

Experts = Callable[..., Any]
Factory = Callable[[Communicator], Experts]


def split_name(name: str) -> tuple[str, str]:
    """Module and attribute of ``package.module:factory``.

    Raises:
        InvalidRequest: it is something else.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise InvalidRequest(f"--experts is {name!r}; write package.module:factory")
    return module, attribute


def load_factory(name: str) -> Factory:
    """The factory that `name` stands for.

    Raises:
        InvalidRequest: there is none, its module cannot be imported, or it cannot be called.
    """
    module_name, attribute = split_name(name)
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        raise InvalidRequest(
            f"experts {name!r}: importing {module_name} failed with {type(exc).__name__}: {exc}; modules are "
            f"looked for in the current directory and where Python finds them"
        ) from exc
    try:
        factory = functools.reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise InvalidRequest(
            f"experts {name!r}: module {module_name} ({getattr(module, '__file__', None)}) has no {attribute!r}"
        ) from None
    if not callable(factory):
        raise InvalidRequest(f"experts {name!r}: it is {factory!r:.80}, not a function that takes the communicator")
    return factory

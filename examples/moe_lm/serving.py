"""The experts of a rank that a node service hosts: ``epmesh serve --experts examples.moe_lm.serving:experts``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .config import WEIGHTS
from .experts import ServedExperts
from .weights import load_experts_share

if TYPE_CHECKING:
    import epmesh


def experts(comm: epmesh.Communicator) -> ServedExperts:
    """Read those experts, and no others, that the placement gives to this rank.

    Raises:
        ValueError: nothing was placed here; `epmesh serve` needs ``--num-experts 16``.
    """
    placement = comm.view.placement(None)
    if placement is None:
        raise ValueError("no experts are placed; start the ranks with --num-experts 16")
    return ServedExperts(load_experts_share(WEIGHTS, placement.experts_of[comm.global_rank]))

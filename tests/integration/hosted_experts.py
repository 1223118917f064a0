"""Experts for hosted ranks: what ``--experts tests.integration.hosted_experts:...`` names."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import torch

from epmesh import Communicator

Experts = Callable[[int | None, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
NOT_CALLABLE = 7
_log = logging.getLogger(__name__)


def plus_id(comm: Communicator) -> Experts:
    """Expert e adds e to every element: what a row gets is the sum of ``weight * (row + id)``."""

    def experts(
        layer: int | None, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        weights = torch.where(topk_ids >= 0, topk_weights, 0).to(hidden_states.dtype)
        shifts = (weights * topk_ids).sum(1, keepdim=True)
        return hidden_states * weights.sum(1, keepdim=True) + shifts

    return experts


def slow(comm: Communicator) -> Experts:
    """As `plus_id`, but every call takes its time."""
    experts = plus_id(comm)

    def slowly(layer: int | None, *tensors: torch.Tensor) -> torch.Tensor:
        _log.info("computing")
        time.sleep(1.0)  # what is tested: that somebody waits for it
        return experts(layer, *tensors)

    return slowly


def stuck(comm: Communicator) -> Experts:
    """Never answers."""

    def waits(layer: int | None, *tensors: torch.Tensor) -> torch.Tensor:
        _log.info("computing")
        threading.Event().wait()
        return tensors[0]

    return waits


def without_weights(comm: Communicator) -> Experts:
    """Cannot be made."""
    raise FileNotFoundError("weights.safetensors is not there")


def nothing(comm: Communicator) -> None:
    """Makes no experts."""


def ends_the_process(comm: Communicator) -> Experts:
    """Is in the mesh for a moment."""
    if comm.global_rank == 1:
        os._exit(3)
    return plus_id(comm)

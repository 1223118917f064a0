"""Devices a rank may name when it joins."""

from __future__ import annotations

import re

import pytest
import torch

from epmesh import InvalidRequest
from epmesh.view import RankMode
from epmesh_server.ranks.join import RankOptions


def refused(device: str, words: str, **options: object) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        RankOptions(address="127.0.0.1:7400", device=device, **options)  # type: ignore[arg-type]


def test_a_device_that_is_none_is_refused() -> None:
    refused("gpu", "device 'gpu'")
    refused("meta", "use 'cpu', or 'cuda:N'")


def test_a_gpu_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused("cuda:0", "there is no CUDA device here; use device='cpu'")


def test_a_gpu_is_named_by_a_number_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("cuda", "name one of cuda:0 to cuda:1")
    refused("cuda:2", "name one of cuda:0 to cuda:1")


def test_ranks_that_serve_have_no_gpu_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused("cuda:0", "mode 'serve'", mode=RankMode.SERVE)


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("cuda:0", "pip install triton")

"""Which implementations of `Communicator` the contract suite runs on, and how each is started.

Another one is an `Implementation` in `IMPLEMENTATIONS`: a function that starts its ranks in some shape, the shapes it
is tried in, and what of the contract it leaves out, with the reason. Tests ask for `target`, which gives them every
implementation in every shape; `on` asks for some shapes, and for all implementations that are tried in them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from epmesh import Communicator
from epmesh.testing import LocalMesh
from tests.integration.contract import MAX_TOKENS, Feature, Shape
from tests.integration.flat_ranks import start_flat_ranks
from tests.integration.on_device import on_device
from tests.integration.targets import Runner

EXCHANGE_TIMEOUT_S = 20.0

Start = Callable[[Shape], contextlib.AbstractContextManager[Runner]]


@dataclass(frozen=True, eq=False)
class Implementation:
    """One way to get hold of communicators.

    Attributes:
        name: in test ids.
        start: starts ranks of some shape, with room for `MAX_TOKENS` in static mode, and no placement declared.
        shapes: what `target` tries.
        tensor_parallel_shapes: what the tests of tensor parallelism try besides.
        lacks: features that are not there, and why; tests that need one are skipped with that reason.
    """

    name: str
    start: Start
    shapes: tuple[Shape, ...]
    tensor_parallel_shapes: tuple[Shape, ...] = ()
    lacks: Mapping[Feature, str] = field(default_factory=dict)


Case = tuple[Implementation, Shape]


@contextlib.contextmanager
def start_local_mesh(shape: Shape, **options: Any) -> Iterator[Runner]:
    """Ranks that joined a mesh of real processes."""
    with LocalMesh(
        shape.nodes,
        shape.ranks_per_node,
        tensor_parallel_size=shape.tensor_parallel_size,
        exchange_timeout_s=EXCHANGE_TIMEOUT_S,
        max_tokens_per_rank=MAX_TOKENS,
        **options,
    ) as mesh:
        yield mesh.run


def attached(
    transport: str, *shapes: Shape, tensor_parallel: tuple[Shape, ...] = (), tls: bool = False
) -> Implementation:
    """Hosted ranks, each with a driver in a process of its own."""
    return Implementation(
        name=f"attach-{transport}{'-tls' if tls else ''}",
        start=functools.partial(start_local_mesh, hosted=True, transport=transport, tls=tls),
        shapes=shapes,
        tensor_parallel_shapes=tensor_parallel,
        lacks={Feature.PROCESS_GROUPS: "an attached rank's process groups are in the process that hosts it"},
    )


@contextlib.contextmanager
def start_on_gpu(shape: Shape) -> Iterator[Runner]:
    """Ranks that joined with this machine's first GPU, all of them; works see CPU tensors."""
    with LocalMesh(
        shape.nodes,
        shape.ranks_per_node,
        device="cuda:0",
        tensor_parallel_size=shape.tensor_parallel_size,
        exchange_timeout_s=2 * EXCHANGE_TIMEOUT_S,  # the first call of a kind compiles its kernels
        max_tokens_per_rank=MAX_TOKENS,
    ) as mesh:
        yield lambda work, *args: mesh.run(on_device, work, *args)


def claim_own_host(_: Communicator) -> None:
    """Has NCCL take this rank's process for a host of its own, so that it lets several ranks onto one GPU; before
    the first call."""
    alone = {"NCCL_HOSTID": f"epmesh-{os.getpid()}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NVLS_ENABLE": "0"}
    os.environ.update({**alone, "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"})


@contextlib.contextmanager
def start_on_gpu_with_nccl(shape: Shape) -> Iterator[Runner]:
    """As `start_on_gpu`, with collectives by NCCL over sockets."""
    with start_on_gpu(shape) as run:
        run(claim_own_host)
        yield run


ON_GPU = Implementation("join-cuda", start_on_gpu, shapes=(Shape(1, 1), Shape(1, 3), Shape(2, 1), Shape(2, 2)))
ON_GPU_WITH_NCCL = Implementation("join-cuda-nccl", start_on_gpu_with_nccl, shapes=(Shape(1, 2), Shape(1, 3)))

IMPLEMENTATIONS = (
    Implementation(
        name="join",
        start=start_local_mesh,
        shapes=(Shape(1, 1), Shape(1, 4), Shape(2, 1), Shape(2, 2), Shape(4, 2)),
        tensor_parallel_shapes=(Shape(1, 4, 2), Shape(2, 2, 2), Shape(2, 4, 2)),
    ),
    Implementation(
        name="device",
        start=start_flat_ranks,
        shapes=(Shape(1, 1), Shape(2, 2)),
        tensor_parallel_shapes=(Shape(2, 2, 2),),
        lacks={
            Feature.GROUPS: "a DeviceCommunicator is over the groups that its caller made",
            Feature.NODES: "a DeviceCommunicator does not know which ranks share a host",
            Feature.VIEWS: "there is no mesh behind a DeviceCommunicator",
        },
    ),
    Implementation(
        name="join-tls",
        start=functools.partial(start_local_mesh, tls=True),
        shapes=(Shape(2, 1), Shape(2, 2)),
    ),
    attached("shm", Shape(2, 2), tensor_parallel=(Shape(2, 2, 2),)),
    # Whatever is refused is refused alike over these two: test_attach.py compares every refusal with that of join.
    attached("zmq", Shape(2, 1)),
    attached("grpc", Shape(2, 1)),
    attached("zmq", Shape(2, 1), tls=True),
    *((ON_GPU, ON_GPU_WITH_NCCL) if torch.cuda.is_available() else ()),
)


def cases(*shapes: Shape) -> list[Case]:
    """Every implementation in those of `shapes` that it is tried in; without `shapes`, in all that `target` tries."""
    return [
        (implementation, shape)
        for implementation in IMPLEMENTATIONS
        for shape in (*implementation.shapes, *implementation.tensor_parallel_shapes)
        if (shape in shapes if shapes else shape in implementation.shapes)
    ]


def case_id(case: Case) -> str:
    """As in test ids: "join-2x2"."""
    implementation, shape = case
    return f"{implementation.name}-{shape.name}"


def on(*shapes: Shape) -> pytest.MarkDecorator:
    """Has a test run in `shapes` alone."""
    return pytest.mark.parametrize("target", cases(*shapes), indirect=True, ids=case_id)

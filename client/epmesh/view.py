"""The view: who is in the mesh. Immutable, numbered by its epoch; decided by the coordinator, the same everywhere."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from epmesh.errors import InvalidRequest
from epmesh.placement import Placement
from epmesh.v1 import view_pb2


class RankMode(enum.Enum):
    """What a rank's process is there for."""

    EXCHANGE = view_pb2.RANK_MODE_EXCHANGE
    SERVE = view_pb2.RANK_MODE_SERVE


@dataclass(frozen=True)
class RankInfo:
    """One device's data-plane process. `rank` is global: slot x stride + local rank.

    `link_endpoint` is where other ranks send frames, `front_endpoint` where stubs and routers send requests; empty
    where it takes none. `curve_key` is the public key of both, 32 bytes; empty in a mesh without CURVE.
    """

    rank: int
    incarnation: int
    device: str
    mode: RankMode
    link_endpoint: str
    front_endpoint: str = ""
    curve_key: bytes = b""


@dataclass(frozen=True)
class NodeInfo:
    """One host or container and its living ranks, ascending."""

    slot: int
    node_id: str
    incarnation: int
    address: str
    ranks: tuple[RankInfo, ...] = ()


@dataclass(frozen=True)
class GroupInfo:
    """A named set of ranks.

    Attributes:
        name: ``world``, ``ep``, ``tp:0`` or a user's.
        group_id: its number in frames and control pages.
        ranks: living members as global ranks; a rank's place in the group is its position here.
        declared_ranks: members as declared, living or not.
        sequence: the cut of this view's commit; every member goes on with the number after it.
        completed: the last exchange that every surviving member completed.
    """

    name: str
    group_id: int
    ranks: tuple[int, ...]
    declared_ranks: tuple[int, ...]
    sequence: int = 0
    completed: int = 0

    @property
    def complete(self) -> bool:
        """Whether every declared member is alive."""
        return len(self.ranks) == len(self.declared_ranks)


@dataclass(frozen=True)
class View:
    """One committed view.

    Attributes:
        epoch: its number; 0 means no view was committed yet.
        membership_epoch: the epoch in which the set of ranks last changed.
        stride: most ranks a node may have.
        nodes: ascending by slot.
        groups: ascending by id.
        placements: expert placements by layer; key `None` serves every layer without its own.
        tensor_parallel_size: members of a ``tp:k`` group; 0 or 1 means there are none.
    """

    mesh_id: str
    epoch: int
    membership_epoch: int
    stride: int
    nodes: tuple[NodeInfo, ...] = ()
    groups: tuple[GroupInfo, ...] = ()
    placements: Mapping[int | None, Placement] = field(default_factory=dict)
    tensor_parallel_size: int = 0

    @cached_property
    def ranks(self) -> dict[int, RankInfo]:
        """All living ranks by global rank, ascending."""
        return {info.rank: info for node in self.nodes for info in node.ranks}

    @cached_property
    def _groups_by_name(self) -> dict[str, GroupInfo]:
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> GroupInfo:
        """The group called `name`.

        Raises:
            InvalidRequest: there is none.
        """
        group = self._groups_by_name.get(name)
        if group is None:
            known = ", ".join(sorted(self._groups_by_name)) or "none"
            raise InvalidRequest(f"no group {name!r} in epoch {self.epoch}; there are: {known}")
        return group

    def has_group(self, name: str) -> bool:
        """Whether there is a group called `name`."""
        return name in self._groups_by_name

    def node_of(self, rank: int) -> NodeInfo:
        """The node that a living global rank belongs to.

        Raises:
            InvalidRequest: no such rank is in the view.
        """
        node = self._nodes_by_rank.get(rank)
        if node is None:
            raise InvalidRequest(f"no rank {rank} in epoch {self.epoch}; there are: {list(self.ranks)}")
        return node

    @cached_property
    def _nodes_by_rank(self) -> dict[int, NodeInfo]:
        return {info.rank: node for node in self.nodes for info in node.ranks}

    def slot_of(self, rank: int) -> int:
        """The slot of the node a global rank belongs to."""
        return rank // self.stride

    def placement(self, layer: int | None) -> Placement | None:
        """The placement for `layer`, or the one for all layers, or `None` where nothing was declared."""
        return self.placements.get(layer, self.placements.get(None))

    def to_proto(self) -> view_pb2.View:
        """The view as it crosses a wire."""
        message = view_pb2.View(
            mesh_id=self.mesh_id,
            epoch=self.epoch,
            membership_epoch=self.membership_epoch,
            stride=self.stride,
            tensor_parallel_size=self.tensor_parallel_size,
        )
        message.nodes.extend(_node_to_proto(node) for node in self.nodes)
        message.groups.extend(_group_to_proto(group) for group in self.groups)
        for layer in sorted(self.placements, key=lambda key: -1 if key is None else key):
            message.placements.append(self.placements[layer].to_proto(layer))
        return message

    @classmethod
    def from_proto(cls, message: view_pb2.View) -> View:
        """The view a message carries.

        Raises:
            InvalidRequest: it contradicts itself.
        """
        return cls(
            mesh_id=message.mesh_id,
            epoch=message.epoch,
            membership_epoch=message.membership_epoch,
            stride=message.stride,
            nodes=tuple(_node_from_proto(node) for node in message.nodes),
            groups=tuple(_group_from_proto(group) for group in message.groups),
            placements=dict(Placement.from_proto(placement) for placement in message.placements),
            tensor_parallel_size=message.tensor_parallel_size,
        )


def is_newer(view: View | view_pb2.View, epoch: int, mesh_id: str) -> bool:
    """Whether `view` comes after the one that `epoch` numbers in the mesh `mesh_id`.

    A committed view of another mesh does, whatever its number, for every mesh counts anew. An empty `mesh_id` stands
    for the mesh of `view`.
    """
    return view.epoch > epoch or (view.epoch > 0 and mesh_id not in {"", view.mesh_id})


def rank_to_proto(info: RankInfo) -> view_pb2.Rank:
    """One rank as it crosses a wire."""
    return view_pb2.Rank(
        rank=info.rank,
        incarnation=info.incarnation,
        device=info.device,
        mode=info.mode.value,
        link_endpoint=info.link_endpoint,
        front_endpoint=info.front_endpoint,
        curve_key=info.curve_key,
    )


def rank_from_proto(message: view_pb2.Rank) -> RankInfo:
    """The rank a message carries.

    Raises:
        InvalidRequest: its mode is not known here.
    """
    try:
        mode = RankMode(message.mode)
    except ValueError:
        raise InvalidRequest(f"rank {message.rank} has mode {message.mode}, unknown to this version") from None
    return RankInfo(
        message.rank,
        message.incarnation,
        message.device,
        mode,
        message.link_endpoint,
        message.front_endpoint,
        message.curve_key,
    )


def _node_to_proto(node: NodeInfo) -> view_pb2.Node:
    return view_pb2.Node(
        slot=node.slot,
        node_id=node.node_id,
        incarnation=node.incarnation,
        address=node.address,
        ranks=[rank_to_proto(info) for info in node.ranks],
    )


def _node_from_proto(message: view_pb2.Node) -> NodeInfo:
    ranks = tuple(rank_from_proto(rank) for rank in message.ranks)
    return NodeInfo(message.slot, message.node_id, message.incarnation, message.address, ranks)


def _group_to_proto(group: GroupInfo) -> view_pb2.Group:
    return view_pb2.Group(
        name=group.name,
        id=group.group_id,
        ranks=group.ranks,
        declared_ranks=group.declared_ranks,
        sequence=group.sequence,
        completed=group.completed,
    )


def _group_from_proto(message: view_pb2.Group) -> GroupInfo:
    return GroupInfo(
        message.name,
        message.id,
        tuple(message.ranks),
        tuple(message.declared_ranks),
        message.sequence,
        message.completed,
    )

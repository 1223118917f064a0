"""What the ranks of a group called, and whether they agree. Pure: the same calls give the same error on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from epmesh import errors
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.v1 import frame_pb2

Call = frame_pb2.CallDescriptor


def describe(method: str, arguments: str = "", numbers: Sequence[int] = (), refusal: EpmeshError | None = None) -> Call:
    """What this rank calls.

    Args:
        arguments: what must be the same on all ranks, as text.
        numbers: this rank's own; not compared.
        refusal: why this rank's input was refused, if it was.
    """
    call = Call(method=method, arguments=arguments, numbers=numbers)
    if refusal is not None:
        call.refusal.CopyFrom(refusal.to_proto())
    return call


def verdict(calls: Mapping[int, Call]) -> EpmeshError | None:
    """The error that all ranks raise for `calls` (by global rank), or `None` where they agree."""
    if len({id(call) for call in calls.values()}) == 1 and not next(iter(calls.values())).HasField("refusal"):
        return None  # the same to the byte
    for rank in sorted(calls):
        if calls[rank].HasField("refusal"):
            return _refused(rank, calls[rank])
    methods = _by_value({rank: call.method for rank, call in calls.items()})
    if len(methods) > 1:
        return InvalidRequest(f"ranks called different methods: {_listing(methods)}; call the same, in the same order")
    arguments = _by_value({rank: call.arguments for rank, call in calls.items()})
    if len(arguments) > 1:
        method = next(iter(methods))
        return InvalidRequest(f"{method}: ranks disagree: {_listing(arguments)}; they must be the same on all ranks")
    return None


def _refused(rank: int, call: Call) -> EpmeshError:
    error = frame_pb2.CallDescriptor.FromString(call.SerializeToString()).refusal
    error.message = f"{call.method} on rank {rank}: {error.message}"
    return errors.from_proto(error)


def _by_value(values: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank in sorted(values):
        found.setdefault(values[rank], []).append(rank)
    return found


def _listing(found: Mapping[str, Sequence[int]]) -> str:
    parts = []
    for value, ranks in list(found.items())[:4]:
        named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        parts.append(f"{value or 'nothing'} on rank{'s' if len(ranks) > 1 else ''} {named}")
    return "; ".join(parts)

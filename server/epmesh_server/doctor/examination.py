"""Puts probes and checks together: facts about this host and its mesh, then what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from epmesh.errors import InvalidRequest
from epmesh.tls import tls_files
from epmesh_server.doctor.checks.addresses import check_addresses, check_given
from epmesh_server.doctor.checks.certificates import check_certificates
from epmesh_server.doctor.checks.directories import check_directories
from epmesh_server.doctor.checks.gpu import check_gpus
from epmesh_server.doctor.checks.host import check_host
from epmesh_server.doctor.checks.limits import check_limits
from epmesh_server.doctor.checks.ports import check_ports
from epmesh_server.doctor.checks.services import check_services
from epmesh_server.doctor.facts import Asked, Facts
from epmesh_server.doctor.findings import Finding, Severity, error, warning
from epmesh_server.doctor.probes.certificates import look_at_certificates
from epmesh_server.doctor.probes.directories import look_at_directories
from epmesh_server.doctor.probes.gpu import look_at_gpus
from epmesh_server.doctor.probes.host import look_at_host
from epmesh_server.doctor.probes.limits import look_at_limits
from epmesh_server.doctor.probes.network import look_at_network
from epmesh_server.doctor.probes.services import look_at_mesh
from epmesh_server.doctor.probes.together import run_together
from epmesh_server.node.settings import NodeSettings

WITHIN_S = 6.0

Check = Callable[[Asked, Facts], Iterator[Finding]]
_CHECKS: tuple[Check, ...] = (
    check_given,
    check_addresses,
    check_ports,
    check_services,
    check_certificates,
    check_limits,
    check_directories,
    check_host,
    check_gpus,
)
_LOCAL_CHECKS: tuple[Check, ...] = (check_given, check_limits, check_directories, check_certificates)


def find_out(asked: Asked) -> Facts:
    """Everything about this host and its mesh; all probes at once, done within `WITHIN_S`."""
    probes: dict[str, Callable[[], Any]] = {
        "network": lambda: look_at_network(asked),
        "mesh": lambda: look_at_mesh(asked),
        "limits": look_at_limits,
        "directories": lambda: look_at_directories(asked),
        "host": look_at_host,
    }
    if (tls_dir := asked.tls_dir) is not None:
        probes["certificates"] = lambda: look_at_certificates(tls_dir)
    if asked.on_gpu:
        probes["gpu"] = look_at_gpus
    found, missing = run_together(probes, WITHIN_S)
    unanswered = {
        name: f"{type(exc).__name__}: {exc}" if exc else f"no answer within {WITHIN_S:g} s"
        for name, exc in missing.items()
    }
    return Facts(**found, refused=_refused(asked), unanswered=unanswered)


def judge(asked: Asked, facts: Facts) -> tuple[Finding, ...]:
    """What the facts mean: errors first, then warnings, then what is well."""
    return _sorted([*_general(facts), *(finding for check in _CHECKS for finding in check(asked, facts))])


def local_errors(asked: Asked) -> tuple[Finding, ...]:
    """Errors that a look at this process alone shows, in a few milliseconds: for the log of a service that starts."""
    certificates = None if asked.tls_dir is None else look_at_certificates(asked.tls_dir)
    facts = Facts(limits=look_at_limits(), directories=look_at_directories(asked), certificates=certificates)
    found = [finding for check in _LOCAL_CHECKS for finding in check(asked, facts)]
    return tuple(finding for finding in found if finding.severity is Severity.ERROR)


def _sorted(findings: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(findings, key=lambda finding: -finding.severity))


def _general(facts: Facts) -> Iterator[Finding]:
    if facts.refused:
        yield error("options-refused", facts.refused, "`epmesh serve` ends at once with this.", "as the text says")
    for name, reason in facts.unanswered.items():
        yield warning(
            "not-looked-at",
            f"{name} could not be looked at: {reason}",
            "What is wrong there stays unseen.",
            "run the doctor again; if it stays, say so in an issue with the output of --json",
        )


def _refused(asked: Asked) -> str:
    """Why the node service would refuse its options."""
    try:
        tls = tls_files(asked.tls_dir)
    except InvalidRequest:
        return ""  # the checks of certificates say it
    try:
        NodeSettings(
            host=asked.host,
            port=asked.port,
            node_id=asked.node_id,
            coordinator=asked.coordinator_address,
            runtime_dir=asked.runtime_dir,
            buffer_bytes=asked.buffer_bytes,
            advertise=asked.advertise,
            link_host=asked.link_host,
            tls=tls,
            insecure=asked.insecure,
        )
    except InvalidRequest as exc:
        return str(exc)
    return ""

"""Certificates of this node, and what services make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from epmesh_server.access import Identity, Role, identities
from epmesh_server.doctor.facts import Asked, CertificateFacts, Facts, Service
from epmesh_server.doctor.findings import Finding, error, ok, warning

_DAY_S = 86_400.0
_SOON_S = 7 * _DAY_S
_MAKE = (
    "`epmesh certs init` for a test mesh, or your authority; in compose a volume or secret, in a pod a secret's volume"
)


def check_certificates(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    if facts.certificates is not None:
        yield from _own(asked, facts, facts.certificates)
    services = (facts.mesh.coordinator, facts.mesh.node) if facts.mesh else ()
    for service in services:
        if service is not None:
            yield from _met(asked, service)


def _own(asked: Asked, facts: Facts, own: CertificateFacts) -> Iterator[Finding]:
    if own.problem:
        yield error(
            "certificate-unreadable",
            f"TLS directory {own.directory}: {own.problem}",
            "The service cannot start.",
            f"files of this user, `chmod 600` the key; in a pod `defaultMode: 0440` and `fsGroup`: {_MAKE}",
        )
    elif own.doubt:
        yield _doubted(own)
    else:
        yield from _names(asked, facts, own)
        yield _lasting(own)


def _doubted(own: CertificateFacts) -> Finding:
    seen = f"the certificate in {own.directory} is not to be believed: {own.doubt_text}"
    if own.doubt == "expired":
        return error(
            "certificate-expired", seen, "Everybody refuses it.", f"a new one, files are read anew at once: {_MAKE}"
        )
    if own.doubt == "early":
        return error(
            "certificate-early",
            seen,
            "Everybody whose clock is like this one's refuses it.",
            "this host's clock: `timedatectl`; or a certificate that is valid from now on",
        )
    return error(
        "certificate-untrusted",
        seen,
        "Its authority is not in ca.crt, so nobody who has the same ca.crt believes it.",
        f"ca.crt, tls.crt and tls.key of one set: {_MAKE}",
    )


def node_id(asked: Asked, facts: Facts) -> str:
    """The id under which the node would register: the one that was given, its certificate's, or hostname:port."""
    shown = identities(facts.certificates.names) if facts.certificates is not None else ()
    certified = [found.name for found in shown if found.role is Role.NODE]
    hostname = facts.network.hostname if facts.network else ""
    return asked.node_id or (certified[0] if certified else f"{hostname}:{asked.port}")


def _names(asked: Asked, facts: Facts, own: CertificateFacts) -> Iterator[Finding]:
    """A node's must be this node's. Others are no node's, but of a coordinator or client that asks."""
    wanted = Identity(Role.NODE, node_id(asked, facts))
    shown = identities(own.names)
    nodes = [found for found in shown if found.role is Role.NODE]
    if not shown or (nodes and wanted not in nodes):
        yield error(
            "certificate-names",
            f"the certificate in {own.directory} is for {_listed(shown)}, and this would be {wanted}",
            "A node service does not start with another's certificate, and the coordinator would refuse it.",
            "--node-id (EPMESH_NODE_ID) as in the certificate, or `epmesh certs add DIR --node NAME`",
        )
    elif not nodes:
        yield ok("certificate-names", f"the certificate in {own.directory} is for {_listed(shown)}, no node")


def _listed(shown: Sequence[Identity]) -> str:
    return ", ".join(map(str, shown)) or "nobody"


def _lasting(own: CertificateFacts) -> Finding:
    left_s = own.seconds_left
    if left_s < _SOON_S:
        return warning(
            "certificate-ends-soon",
            f"the certificate in {own.directory} ends in {left_s / _DAY_S:.1f} days",
            "From then on everybody refuses it.",
            f"a new one in its place, while services run: {_MAKE}",
        )
    return ok("certificate", f"the certificate in {own.directory} is good for {left_s / _DAY_S:.0f} days")


def _met(asked: Asked, service: Service) -> Iterator[Finding]:
    """What came of calls."""
    if service.role_refusal:
        yield warning(
            "role-refused",
            f"{service.address} lets nobody ask with the certificate in {asked.tls_dir}: {service.role_refusal}",
            "What the service knows stays unseen.",
            "run the doctor with the certificate of a node or of a client",
        )
    elif service.tls_refusal and asked.tls_dir is None:
        yield error(
            "tls-expected",
            f"{service.address}: {service.tls_refusal}",
            "It takes no calls from those who show no certificate.",
            f"--tls-dir (EPMESH_TLS_DIR): {_MAKE}",
        )
    elif service.tls_refusal:
        yield error(
            "tls-refused",
            f"{service.address}: {service.tls_refusal}",
            "Calls to it fail.",
            "--tls-dir on both sides, with the same ca.crt, certificates in their time, and clocks that agree",
        )

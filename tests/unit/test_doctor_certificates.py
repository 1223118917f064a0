"""What the doctor makes of the certificates of this node, and of services that mind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.doctor import Asked, Facts, Finding, Severity, judge, local_errors
from epmesh_server.doctor.facts import CertificateFacts, MeshFacts, NetworkFacts, NodeSeen
from epmesh_server.doctor.probes.certificates import look_at_certificates
from tests.unit.test_doctor import ASKED, COORDINATOR, WELL, found

NODE = Identity(Role.NODE, "a")


def issued(directory: Path, *identities: Identity, days: float = 30) -> Path:
    """A TLS directory with a certificate of an authority of its own."""
    place = directory / "issued"
    Authority.make(directory / "authority").issue(place, identities or [NODE], days=days)
    return place


def told(directory: Path, node_id: str | None = "a") -> dict[str, Finding]:
    """What is wrong with a TLS directory, by cause."""
    facts = Facts(certificates=look_at_certificates(directory), network=NetworkFacts(hostname="box"))
    findings = judge(Asked(tls_dir=directory, node_id=node_id), facts)
    about = [finding for finding in findings if finding.cause.startswith("certificate")]
    return {finding.cause: finding for finding in about if finding.severity is not Severity.OK}


def test_a_good_certificate_is_well(tmp_path: Path) -> None:
    directory = issued(tmp_path)
    assert told(directory) == {}
    facts = look_at_certificates(directory)
    assert facts.seconds_left == pytest.approx(30 * 86_400, abs=600)
    assert NODE.uri in facts.names


@pytest.mark.parametrize("role", [Role.COORDINATOR, Role.ROUTER, Role.OBSERVER])
def test_certificates_that_are_no_nodes_are_believed_too(role: Role, tmp_path: Path) -> None:
    directory = issued(tmp_path, Identity(role, "" if role is Role.COORDINATOR else "web"))
    assert told(directory) == {}


def test_a_node_without_an_id_has_its_certificates(tmp_path: Path) -> None:
    directory = issued(tmp_path)
    assert told(directory, node_id=None) == {}
    seen = (NodeSeen(slot=0, node_id="a", incarnation=5, address="10.0.0.9:7400"),)
    mesh = MeshFacts(coordinator=replace(COORDINATOR, nodes=seen))
    facts = replace(WELL, mesh=mesh, certificates=look_at_certificates(directory))
    assert "node-id-taken" in found(facts, replace(ASKED, insecure=False, tls_dir=directory))


def test_files_that_are_missing_open_or_of_another_key_are_told(tmp_path: Path) -> None:
    directory = issued(tmp_path)
    (directory / "tls.key").chmod(0o644)
    assert "0644" in told(directory)["certificate-unreadable"].seen
    (directory / "tls.key").chmod(0o600)
    other = tmp_path / "other"
    other.mkdir()
    (directory / "tls.crt").write_bytes((issued(other) / "tls.crt").read_bytes())
    assert "do not fit together" in told(directory)["certificate-unreadable"].seen
    (directory / "ca.crt").unlink()
    assert "ca.crt" in told(directory)["certificate-unreadable"].seen


@pytest.mark.parametrize(("days", "cause"), [(-1, "certificate-expired"), (2, "certificate-ends-soon")])
def test_a_certificate_that_ends_is_told(days: float, cause: str, tmp_path: Path) -> None:
    assert set(told(issued(tmp_path, days=days))) == {cause}


def test_a_certificate_that_is_not_valid_yet_is_told_as_a_clock() -> None:
    early = CertificateFacts(directory=Path("/tls"), doubt="early", doubt_text="certificate is not yet valid")
    assert "clock" in found(replace(WELL, certificates=early))["certificate-early"].mend


def test_a_certificate_of_another_authority_is_told(tmp_path: Path) -> None:
    directory = issued(tmp_path)
    other = Authority.make(tmp_path / "other")
    (directory / "ca.crt").write_bytes((other.directory / "ca.crt").read_bytes())
    assert set(told(directory)) == {"certificate-untrusted"}


def test_a_certificate_of_another_node_is_told(tmp_path: Path) -> None:
    finding = told(issued(tmp_path), node_id="b")["certificate-names"]
    assert "is for node 'a', and this would be node 'b'" in finding.seen


def test_a_service_that_starts_tells_of_a_certificate_that_is_over(tmp_path: Path) -> None:
    causes = {finding.cause for finding in local_errors(Asked(node_id="a", tls_dir=issued(tmp_path, days=-1)))}
    assert "certificate-expired" in causes


def test_what_tls_minds_is_told_by_what_there_is_here() -> None:
    mesh = WELL.mesh
    assert mesh is not None
    minding = replace(WELL, mesh=replace(mesh, coordinator=replace(COORDINATOR, tls_refusal="it minds")))
    assert set(found(minding)) == {"tls-expected"}
    assert "tls-refused" in found(minding, replace(ASKED, insecure=False, tls_dir=Path("/tls")))
    asked = replace(WELL, mesh=replace(mesh, coordinator=replace(COORDINATOR, role_refusal="for nodes alone")))
    assert found(asked)["role-refused"].severity is Severity.WARNING

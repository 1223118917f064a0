"""`epmesh certs`: what it makes, what it refuses, and what stands in a certificate."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles, node_name, tls_files
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority, directory_name
from epmesh_server.cli.certs import app
from epmesh_server.secure_server import check_own_certificate

NODE = Identity(Role.NODE, "host:7400")


def run(*arguments: str) -> str:
    """Runs the command; returns what it printed, raises what it raised."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def names(files: TlsFiles) -> set[str]:
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    return {name.value for name in certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value}


def test_init_makes_a_set_that_services_start_with(tmp_path: Path) -> None:
    text = run("init", str(tmp_path / "mesh"), "--node", "a", "--node", "b", "--router", "web", "--days", "3")
    for name, role in (("coordinator", Role.COORDINATOR), ("node-a", Role.NODE), ("node-b", Role.NODE)):
        files = TlsFiles.from_directory(tmp_path / "mesh" / name)
        assert check_own_certificate(files, role) == ("" if role is Role.COORDINATOR else name[-1])
        assert str(tmp_path / "mesh" / name) in text
    assert "epmesh serve --host 0.0.0.0 --coordinator HOST:7401" in text
    assert tls_files(tmp_path / "mesh" / "router-web")


def test_secrets_are_this_users_alone(tmp_path: Path) -> None:
    run("init", str(tmp_path / "mesh"), "--node", "a")
    keys = [*tmp_path.rglob("*.key")]
    assert len(keys) == 3
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "mesh").stat().st_mode) == 0o700


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    mesh = str(tmp_path / "mesh")
    run("init", mesh, "--node", "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(InvalidRequest, match="is there already"):
        run("init", mesh)
    with pytest.raises(InvalidRequest, match="certs add --replace"):
        run("add", mesh, "--node", "a")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    run("add", mesh, "--node", "a", "--replace")
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"tls.crt", "tls.key"}
    TlsFiles.from_directory(tmp_path / "mesh" / "node-a")


@pytest.mark.parametrize("name", ["../x", ".", "a/b", ".hidden"])
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot name a directory"):
        run("init", str(tmp_path / "mesh"), "--node", name)
    assert not (tmp_path / "mesh").exists()


def test_add_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="say for whom"):
        run("add", str(tmp_path))
    with pytest.raises(InvalidRequest, match="epmesh certs init"):
        run("add", str(tmp_path), "--node", "a")


def test_a_certificate_names_role_and_id_and_no_address(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path)
    assert names(authority.issue(tmp_path / "n", [NODE])) == {
        "service.epmesh",
        "node.epmesh",
        node_name("host:7400"),
        "epmesh://node/host%3A7400",
    }
    assert names(authority.issue(tmp_path / "c", [Identity(Role.COORDINATOR)])) == {
        "service.epmesh",
        "coordinator.epmesh",
        "epmesh://coordinator",
    }
    assert names(authority.issue(tmp_path / "r", [Identity(Role.ROUTER, "web")])) == {"epmesh://router/web"}


def test_a_client_cannot_pass_for_a_service(tmp_path: Path) -> None:
    files = Authority.make(tmp_path).issue(tmp_path / "r", [Identity(Role.ROUTER, "web")])
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_key_shows_in_no_text(tmp_path: Path) -> None:
    files = Authority.make(tmp_path).issue(tmp_path / "n", [NODE])
    assert "PRIVATE" not in repr(files.read()) + str(files.read()) + repr(files)


def test_directories_are_told_apart_by_role() -> None:
    same = [Identity(role, "x") for role in (Role.NODE, Role.ROUTER, Role.DRIVER, Role.OBSERVER)]
    assert len({directory_name(identity) for identity in same}) == 4

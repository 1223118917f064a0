"""Revoked certificates: what a list must be to be believed, and what `epmesh certs revoke` puts into it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh.tls import CERTIFICATE_NAME, TlsFiles
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.cli.certs import app
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.revocation import CertificateId, Revocations, certificate_id, revoked_by
from epmesh_server.secure_server import check_own_certificate

NODE, ROUTER = Identity(Role.NODE, "a"), Identity(Role.ROUTER, "web")


def run(*arguments: str) -> str:
    """Runs `epmesh certs`; returns what it printed, raises what it raised."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def id_of(files: TlsFiles) -> CertificateId:
    return certificate_id(files.certificate.read_bytes())


def openssl_serial(files: TlsFiles) -> str:
    return f"{x509.load_pem_x509_certificate(files.certificate.read_bytes()).serial_number:X}"


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    run("init", str(tmp_path / "mesh"), "--node", "a", "--router", "web")
    return tmp_path / "mesh"


def files_of(mesh: Path, name: str) -> TlsFiles:
    return TlsFiles.from_directory(mesh / name)


# Lists ----------------------------------------------------------------------------------------------------------


def test_a_list_counts_for_the_certificates_of_its_authority_alone(tmp_path: Path) -> None:
    one, other = Authority.make(tmp_path / "one"), Authority.make(tmp_path / "other")
    mine, theirs = (made.issue(made.directory / "x", [ROUTER]) for made in (one, other))
    one.revoke([id_of(mine).serial, id_of(theirs).serial])
    both = b"".join((made.directory / "ca.crt").read_bytes() for made in (one, other))
    found = revoked_by(one.list_path.read_bytes(), both)
    assert id_of(mine) in found
    # Authorities that `epmesh certs` makes have one name, so theirs is told apart by its number alone.
    assert len(found) == 2
    other.revoke([1])
    together = one.list_path.read_bytes() + other.list_path.read_bytes()
    assert {each.serial for each in revoked_by(together, both)} == {id_of(mine).serial, id_of(theirs).serial, 1}


def test_a_list_with_another_signature_is_refused(tmp_path: Path) -> None:
    one, other = Authority.make(tmp_path / "one"), Authority.make(tmp_path / "other")
    other.revoke([1])
    forged = Authority(tmp_path / "other", one.certificate, other.private_key)
    forged.list_path.unlink()
    forged.revoke([1])
    with pytest.raises(InvalidRequest, match="not signed by that authority"):
        revoked_by(forged.list_path.read_bytes(), (one.directory / "ca.crt").read_bytes())


@pytest.mark.parametrize("left", [1, 20, 0.5])
def test_a_list_that_was_cut_off_behind_a_whole_one_is_refused(tmp_path: Path, left: float) -> None:
    one, other = Authority.make(tmp_path / "one"), Authority.make(tmp_path / "other")
    one.revoke([1])
    other.revoke([2])
    whole, cut = one.list_path.read_bytes(), other.list_path.read_bytes()
    both = b"".join((made.directory / "ca.crt").read_bytes() for made in (one, other))
    cut = cut[: int(left * len(cut)) if left < 1 else int(left)]
    with pytest.raises(InvalidRequest, match="cut off"):
        revoked_by(whole + cut, both)
    assert len(revoked_by(b"Certificate Revocation List (CRL):\n" + whole, both)) == 1


@pytest.mark.parametrize(
    "data",
    [b"", b"nothing", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"],
    ids=["empty", "text", "bytes"],
)
def test_what_is_no_list_is_refused_at_the_start(mesh: Path, data: bytes) -> None:
    files = files_of(mesh, "node-a")
    files.revoked.write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"crl\.pem: "):
        Revocations(files)


def test_a_list_that_cannot_be_used_or_is_gone_leaves_what_is_known(
    mesh: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, web = files_of(mesh, "node-a"), id_of(files_of(mesh, "router-web"))
    revocations, heard = Revocations(files), [0]
    revocations.on_change(lambda: heard.append(1))
    revocations.check(web, "router 'web'")
    run("revoke", str(mesh), "--router", "web")
    revocations.look()
    with pytest.raises(Unauthenticated, match=f"{web} of router 'web' was revoked"):
        revocations.check(web, "router 'web'")
    for broken in (b"nothing", None):
        files.revoked.unlink() if broken is None else files.revoked.write_bytes(broken)
        revocations.look()
        revocations.look()
        assert web in revocations
    assert sum(heard) == 1
    assert len([each for each in caplog.messages if "1 certificates stay revoked" in each]) == 2


def test_a_list_counts_once_its_authority_is_believed_and_for_as_long_as_the_service_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Authority.make(tmp_path / "old"), Authority.make(tmp_path / "new")
    files = old.issue(tmp_path / "node", [NODE])
    web = id_of(new.issue(tmp_path / "web", [ROUTER]))
    old.revoke([1])
    new.revoke([web.serial])
    files.revoked.write_bytes(old.list_path.read_bytes() + new.list_path.read_bytes())
    revocations = Revocations(files)
    assert web not in revocations
    assert "it is no authority here" in caplog.text
    authorities = [(made.directory / "ca.crt").read_bytes() for made in (old, new)]
    for believed in (b"".join(authorities), authorities[1]):
        files.ca.write_bytes(believed)
        revocations.look()
        assert web in revocations
    # Whoever connected while the old one was believed may be connected still.
    assert CertificateId(web.issuer, 1) in revocations
    assert CertificateId(web.issuer, 1) not in Revocations(files)


def test_a_service_does_not_start_with_a_revoked_certificate(mesh: Path) -> None:
    files = files_of(mesh, "node-a")
    assert check_own_certificate(files, Role.NODE) == "a"
    run("revoke", str(mesh), "--node", "a")
    with pytest.raises(InvalidRequest, match="was revoked"):
        check_own_certificate(files, Role.NODE)


# The command ----------------------------------------------------------------------------------------------------


def test_revoking_by_name_takes_every_certificate_of_that_name(mesh: Path) -> None:
    before = files_of(mesh, "router-web")
    first = id_of(before)
    run("add", str(mesh), "--router", "web", "--replace")
    second, node = id_of(files_of(mesh, "router-web")), files_of(mesh, "node-a")
    text = run("revoke", str(mesh), "--router", "web")
    assert f"{first}: router 'web'" in text
    assert f"{second}: router 'web'" in text
    revocations = Revocations(node)
    assert first in revocations
    assert second in revocations
    assert id_of(node) not in revocations


def test_revoking_what_was_replaced_leaves_the_present_one_good(mesh: Path) -> None:
    with pytest.raises(InvalidRequest, match="none was replaced"):
        run("revoke", str(mesh), "--router", "web", "--replaced")
    first = id_of(files_of(mesh, "router-web"))
    run("add", str(mesh), "--router", "web", "--replace")
    run("revoke", str(mesh), "--router", "web", "--replaced")
    revocations = Revocations(files_of(mesh, "coordinator"))
    assert first in revocations
    assert id_of(files_of(mesh, "router-web")) not in revocations


def test_the_list_grows_and_goes_to_every_service_and_to_services_made_later(mesh: Path) -> None:
    web, node = files_of(mesh, "router-web"), files_of(mesh, "node-a")
    run("revoke", str(mesh), "--serial", openssl_serial(web))
    text = run("revoke", str(mesh), "--serial", "0aBc", "--serial", "serial=0D")
    assert str(node.revoked) in text
    run("add", str(mesh), "--node", "b")
    for name in ("coordinator", "node-a", "node-b"):
        revocations = Revocations(files_of(mesh, name))
        for serial in (id_of(web).serial, 0xABC, 0xD):
            assert CertificateId(id_of(web).issuer, serial) in revocations
    assert not web.revoked.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say which"),
        (["--router", "nobody"], "no certificate of router 'nobody'"),
        (["--serial", "xyz"], "'xyz'"),
        (["--serial", "0"], "'0'"),
    ],
)
def test_what_cannot_be_revoked_is_said(mesh: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        run("revoke", str(mesh), *arguments)
    assert not (mesh / "crl.pem").exists()


def test_certificates_of_a_set_without_copies_are_found_by_name(mesh: Path) -> None:
    for path in (mesh / "issued").iterdir():
        path.unlink()
    text = run("revoke", str(mesh), "--router", "web")
    assert str(id_of(files_of(mesh, "router-web"))) in text
    assert (mesh / "router-web" / CERTIFICATE_NAME).exists()


# Keys -----------------------------------------------------------------------------------------------------------


def test_leases_end_with_the_certificate_that_renewed_them_last() -> None:
    old, new = CertificateId(b"authority", 1), CertificateId(b"authority", 2)
    keys = {name: bytes([number]) * 32 for number, name in enumerate(("stays", "renewed", "stolen"), start=65)}
    table = ClientKeyTable()
    table.lease(keys["stays"], "a", "router 'a'", new)
    table.lease(keys["renewed"], "a", "router 'a'", old)
    table.lease(keys["renewed"], "a", "router 'a'", new)
    table.lease(keys["stolen"], "a", "router 'a'", old)
    change = table.next_change
    table.end_revoked({old})
    assert change.is_set()
    assert {name for name, key in keys.items() if table.users(key)} == {"stays", "renewed"}
    change = table.next_change
    table.end_revoked({old})
    assert not change.is_set()

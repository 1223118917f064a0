"""``/metrics`` over TLS: for those who have a certificate of the mesh, and for nobody else."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from epmesh.errors import InvalidRequest
from epmesh.tls import SERVICE_NAME, TlsContents, TlsFiles
from epmesh_server import metrics_guard
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.metrics_guard import MetricsGuard
from epmesh_server.metrics_server import serve_metrics
from epmesh_server.node import NodeSettings
from epmesh_server.revocation import Revocations, certificate_id
from tests.integration.security_matrix import record

TIMEOUT_S = 10.0
HTTP = "metrics"
NODE, OBSERVER = Identity(Role.NODE, "a"), Identity(Role.OBSERVER, "prometheus")


class Scraper:
    """Asks the port of one test."""

    def __init__(self, address: str, folder: Path, authority: Authority, revocations: Revocations) -> None:
        self.address, self.folder, self.authority, self.revocations = address, folder, authority, revocations

    def issue(self, name: str, *identities: Identity) -> TlsFiles:
        return self.authority.issue(self.folder / name, identities)

    async def status(self, tls: TlsFiles | None, ca: Path | None = None) -> tuple[int, str]:
        """What came back: a status and a text; 0 where TLS refused."""
        context = ssl.create_default_context(cafile=str(ca or self.authority.directory / "ca.crt"))
        context.check_hostname = False  # urllib has no name but the address
        if tls is not None:
            context.load_cert_chain(tls.certificate, tls.private_key)
        return await asyncio.to_thread(self._get, context)

    def _get(self, context: ssl.SSLContext) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"https://{self.address}/metrics", timeout=TIMEOUT_S, context=context
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:  # what TLS says of it differs with the version
            return 0, str(error)


def scraping(folder: Path, test: Callable[[Scraper], Any]) -> None:
    async def run() -> None:
        authority = Authority.make(folder / "authority")
        tls = authority.issue(folder / "node", [NODE])
        revocations = Revocations(tls)
        async with serve_metrics("127.0.0.1", 0, CollectorRegistry(), MetricsGuard(tls, revocations)) as address:
            await test(Scraper(address, folder, authority, revocations))

    asyncio.run(run())


def test_who_may_look_at_the_mesh_reads_its_metrics_and_nobody_else_does(tmp_path: Path) -> None:
    async def test(scraper: Scraper) -> None:
        good = scraper.issue("good", OBSERVER)
        assert (await scraper.status(good))[0] == 200
        assert (await scraper.status(None))[0] == 0
        record("scrape without a certificate", HTTP, "connection refused by TLS")
        stranger = Authority.make(tmp_path / "stranger").issue(tmp_path / "strange", [OBSERVER])
        assert (await scraper.status(stranger))[0] == 0
        record("scrape with a certificate of another authority", HTTP, "connection refused by TLS")
        scraper.authority.revoke([certificate_id(good.certificate.read_bytes()).serial])
        (tmp_path / "node" / "crl.pem").write_bytes(scraper.authority.list_path.read_bytes())
        scraper.revocations.look()
        status, text = await scraper.status(good)
        assert status == 403
        assert "was revoked" in text
        record("scrape with a revoked certificate", HTTP, f"403: {text}")
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            await asyncio.to_thread(urllib.request.urlopen, f"http://{scraper.address}/metrics", None, 5.0)
        record("scrape in plain HTTP", HTTP, "connection closed")

    scraping(tmp_path, test)


def test_certificates_and_authorities_are_replaced_while_it_runs(tmp_path: Path) -> None:
    async def test(scraper: Scraper) -> None:
        old, new = scraper.issue("old", OBSERVER), Authority.make(tmp_path / "new")
        newer = new.issue(tmp_path / "newer", [OBSERVER])
        assert (await scraper.status(old))[0] == 200
        new.issue(tmp_path / "node", [NODE], replace=True)
        assert (await scraper.status(newer, newer.ca))[0] == 200
        assert (await scraper.status(old, newer.ca))[0] == 0

    scraping(tmp_path, test)


def test_strangers_who_connect_while_files_do_not_fit_cost_the_service_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The event loop is that of heartbeats, and reading files that are being replaced waits a moment."""
    reads: list[TlsFiles] = []

    def read(self: TlsFiles) -> TlsContents:
        reads.append(self)
        raise InvalidRequest("they do not fit")

    async def test(scraper: Scraper) -> None:
        good, other = scraper.issue("good", OBSERVER), scraper.issue("other", NODE)
        strange = Authority.make(tmp_path / "stranger").issue(tmp_path / "strange", [OBSERVER])
        other.certificate.rename(tmp_path / "node" / "tls.crt")
        with monkeypatch.context() as broken:
            broken.setattr(TlsFiles, "read", read)
            broken.setattr(metrics_guard, "_RETRY_S", 1000.0)
            for _ in range(10):
                assert (await scraper.status(strange))[0] == 0
            assert (await scraper.status(good))[0] == 200
            assert len(reads) == len([each for each in caplog.messages if "tls.failed" in each]) == 1
            broken.setattr(metrics_guard, "_RETRY_S", 0.0)
            assert (await scraper.status(good))[0] == 200
            assert len(reads) == 2

    scraping(tmp_path, test)


def test_the_port_shows_the_name_of_a_service(tmp_path: Path) -> None:
    async def test(scraper: Scraper) -> None:
        tls = scraper.issue("good", OBSERVER)
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.load_cert_chain(tls.certificate, tls.private_key)
        host, _, port = scraper.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=SERVICE_NAME)
        writer.close()

    scraping(tmp_path, test)


def test_tls_for_metrics_needs_certificates() -> None:
    with pytest.raises(InvalidRequest, match="--tls-dir"):
        NodeSettings(metrics_port=0, metrics_tls=True)

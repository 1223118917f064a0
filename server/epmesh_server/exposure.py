"""Who may reach a port: beyond this host only where callers are authenticated, or somebody said that this is fine."""

from __future__ import annotations

import logging

from epmesh.addresses import is_loopback
from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles

_log = logging.getLogger(__name__)


def check_exposure(host: str, tls: TlsFiles | None, *, insecure: bool) -> None:
    """Refuses to listen where strangers could call.

    Raises:
        InvalidRequest: `host` is not loopback and nothing authenticates callers; or `insecure` contradicts `tls`.
    """
    if insecure and tls is not None:
        raise InvalidRequest("--insecure and --tls-dir contradict each other; leave --insecure out")
    if tls is None and not insecure and not is_loopback(host):
        raise InvalidRequest(
            f"host {host} is reachable from other machines, and nothing would authenticate callers there; make "
            "certificates with `epmesh certs init` and give them with --tls-dir, listen on 127.0.0.1, or say "
            "--insecure on a private network for tests"
        )


def warn_if_exposed(what: str, host: str, tls: TlsFiles | None) -> None:
    """Says so in the log where `insecure` lets strangers in."""
    if tls is None and not is_loopback(host):
        _log.warning("%s listens on %s without authentication (--insecure): whoever reaches it may join", what, host)

"""Serve text over HTTP: python -m examples.router_service --mesh node-0:7400,node-1:7400

SIGTERM and Ctrl-C let requests under way end, and take no more.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys

import uvicorn

from epmesh import EpmeshError, InvalidRequest
from epmesh.addresses import join_address, parse_addresses
from examples.router_service.options import ServiceOptions
from examples.router_service.service import TextService

_BACKLOG = 128


def main() -> None:
    """Command line."""
    args = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        mesh = parse_addresses(args.mesh.split(","), "--mesh") if args.mesh else ()
        options = ServiceOptions(
            mesh=mesh,
            max_tokens=args.max_tokens,
            max_open=args.max_open,
            timeout_s=args.timeout,
            drain_s=args.drain,
            tls_dir=args.tls_dir or None,
        )
        with _listen(args.host, args.port) as listener:
            serve(options, listener)
    except EpmeshError as error:
        sys.exit(f"router service: {error}")


def serve(options: ServiceOptions, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT."""
    host, port = listener.getsockname()[:2]
    print(f"router service listens at {join_address(host, port)}", flush=True)
    config = uvicorn.Config(
        TextService(options).application(),
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=round(options.drain_s),
    )
    # uvicorn repeats the signal once it has drained, for whoever had a handler before: nobody may, or we end by it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        raise InvalidRequest(f"cannot listen at {join_address(host, port)}: {exc}; choose --host or --port") from exc


def _arguments() -> argparse.Namespace:
    env = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default=env("ROUTER_HOST", "127.0.0.1"), help="or ROUTER_HOST")
    parser.add_argument("--port", type=int, default=int(env("ROUTER_PORT", "8080")), help="or ROUTER_PORT")
    parser.add_argument("--mesh", default=env("EPMESH_MESH", ""), metavar="HOST:PORT[,...]", help="or EPMESH_MESH")
    parser.add_argument(
        "--tls-dir", default=env("EPMESH_TLS_DIR", ""), help="or EPMESH_TLS_DIR: a router's certificate"
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="most tokens a request may ask for")
    parser.add_argument("--max-open", type=int, default=64, help="most requests under way at once")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for a whole request")
    parser.add_argument("--drain", type=float, default=20.0, help="seconds for requests under way after SIGTERM")
    return parser.parse_args()


if __name__ == "__main__":
    main()

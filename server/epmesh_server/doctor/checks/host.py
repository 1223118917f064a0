"""Versions, environment, and the first process."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh_server.doctor.facts import Asked, Facts, HostFacts, NetworkFacts
from epmesh_server.doctor.findings import Finding, error, ok, warning

_SHELLS = ("sh", "bash", "dash", "ash", "busybox")
_MANY_ZOMBIES = 8
_LAUNCHER = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
_SERVICE_LINKS = ("EPMESH_SERVICE_HOST", "EPMESH_COORDINATOR_SERVICE_HOST")
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check_host(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    host = facts.host
    if host is None:
        return
    shown = [f"{name} {version}" for name, version in host.versions.items() if version]
    yield ok("versions", ", ".join(shown))
    yield from _torch(asked, host)
    yield from _proxy(host)
    if facts.network is not None and not facts.network.interfaces_problem:
        yield from _interface_variables(facts.network, host)
    yield from _left_over(asked, host)
    yield from _service_links(host)
    yield from _first(host)


def _torch(asked: Asked, host: HostFacts) -> Iterator[Finding]:
    if asked.ranks and not host.versions.get("torch"):
        yield error(
            "torch-missing",
            f"--ranks is {asked.ranks}, and torch is not installed",
            "Ranks hold tensors; the node service alone needs no torch.",
            "`pip install 'epmesh[server]'`, or the image for nodes instead of the one for routers",
        )


def _proxy(host: HostFacts) -> Iterator[Finding]:
    names = [name for name in host.environment if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy")]
    if not names:
        return
    shown = ", ".join(f"{name}={host.environment[name]}" for name in names)
    if host.proxy_used:
        yield error(
            "proxy",
            f"{shown}, and channels use it",
            "Calls between nodes go to the proxy, which does not know them.",
            "no_proxy with the nodes' names and networks, or unset it",
        )
    else:
        yield ok("proxy", f"{shown}: epmesh's own connections take no proxy")


def _interface_variables(network: NetworkFacts, host: HostFacts) -> Iterator[Finding]:
    known = {interface.name for interface in network.interfaces}
    for name in _INTERFACES:
        value = host.environment.get(name, "")
        wanted = [part for part in value.lstrip("=").split(",") if part]
        given = wanted and not value.startswith("^")  # "^docker0" leaves one out
        if given and not any(interface.startswith(tuple(wanted)) for interface in known):
            yield error(
                "interface-variable",
                f"{name}={value}, and there is no such interface; there are: {', '.join(sorted(known))}",
                "Device groups cannot be formed: every rank fails in its first collective call.",
                f"unset {name} (epmesh's device groups stay inside the node), or name an interface that exists",
            )


def _left_over(asked: Asked, host: HostFacts) -> Iterator[Finding]:
    left = [f"{name}={host.environment[name]}" for name in _LAUNCHER if host.environment.get(name)]
    if left:
        yield warning(
            "launcher-variables",
            f"{', '.join(left)} from another launcher",
            "epmesh does not read them; code of yours that calls torch.distributed.init_process_group does, and waits "
            "for that address.",
            "leave them out of the container's environment",
        )
    if host.environment.get("NCCL_P2P_DISABLE") == "1" and asked.on_gpu:
        yield warning(
            "p2p-disabled",
            "NCCL_P2P_DISABLE=1",
            "NCCL copies through host memory although devices could reach each other.",
            "unset it",
        )


def _service_links(host: HostFacts) -> Iterator[Finding]:
    links = [name for name in _SERVICE_LINKS if name in host.environment]
    if links:
        yield warning(
            "service-links",
            f"Kubernetes sets {' and '.join(links)}, and so a variable of epmesh's port beside each",
            "The variable of an option is taken by a service of the same name; epmesh passes it over.",
            "`enableServiceLinks: false` in the pod's spec, or another name for the service",
        )


def _first(host: HostFacts) -> Iterator[Finding]:
    if not host.container or not host.first_process:
        return
    name = host.first_process[0].rpartition("/")[2].lstrip("-")
    if name in _SHELLS and len(host.first_process) > 1:
        yield warning(
            "shell-first",
            f"process 1 is `{' '.join(' '.join(host.first_process).split())[:60]}`",
            "A shell passes no signals on: at `docker stop` the node is killed after 10 s instead of leaving.",
            "the exec form, `command: [epmesh, serve]`, or `exec epmesh serve` in the script",
        )
    if host.zombies >= _MANY_ZOMBIES:
        yield warning(
            "zombies",
            f"{host.zombies} dead processes were never waited for",
            "They take process numbers until there are none.",
            "compose `init: true`, docker `--init`, in a pod `shareProcessNamespace: true`",
        )

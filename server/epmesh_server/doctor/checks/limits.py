"""Limits of the process and its container, and memory that processes share."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh_server.doctor.facts import Asked, Facts, LimitFacts
from epmesh_server.doctor.findings import Finding, error, ok, warning

_FEW_FILES, _TOO_FEW_FILES = 1024, 256
_FILES_BASE, _FILES_A_PEER = 128, 4
# What processes hold before any row: node service and coordinator, torch once for all ranks, then each rank.
_SERVICES_BYTES, _TORCH_BYTES, _RANK_BYTES = 160 << 20, 256 << 20, 128 << 20
_TASKS_BASE, _TASKS_A_RANK = 64, 48
_SHM_BYTES = 1 << 30  # NCCL takes some 10 MiB for every pair of ranks and channel
_LOCKED_BYTES = 64 << 20


def check_limits(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    limits = facts.limits
    if limits is None:
        return
    yield from _sharing(limits)
    yield from _shm(asked, limits)
    yield from _memory(asked, limits, running=facts.mesh is not None and facts.mesh.here is not None)
    peers = sum(endpoint.what == "links" for endpoint in facts.mesh.endpoints) if facts.mesh else 0
    yield _files(limits, peers)
    yield from _cpus(asked, limits)
    yield from _tasks(asked, limits)
    yield from _locked(asked, limits)


def _sharing(limits: LimitFacts) -> Iterator[Finding]:
    filtered = "; a seccomp filter is on" if limits.seccomp else ""
    for cause, what, problem in (
        ("memfd-refused", "memfd_create", limits.memfd_problem),
        ("passing-refused", "passing descriptors over a unix socket", limits.passing_problem),
        ("eventfd-refused", "eventfd", limits.eventfd_problem),
    ):
        if problem:
            yield error(
                cause,
                f"{what} does not work here: {problem}{filtered}",
                "The ranks of a node share memory that way: none can be opened.",
                "the engine's default seccomp profile (compose `security_opt:` without one of your own), or one that "
                "allows memfd_create, eventfd2 and sendmsg",
            )
    if not (limits.memfd_problem or limits.passing_problem or limits.eventfd_problem):
        yield ok("shared-memory", "memfd, eventfd and passing descriptors work")


def _shm(asked: Asked, limits: LimitFacts) -> Iterator[Finding]:
    """epmesh itself uses none of it; NCCL does."""
    if not asked.on_gpu:
        yield ok("shm", f"/dev/shm has {size(limits.shm_bytes)}; epmesh uses memfds instead")
    elif limits.shm_free_bytes < _SHM_BYTES:
        yield error(
            "shm-small",
            f"/dev/shm has {size(limits.shm_bytes)}, {size(limits.shm_free_bytes)} of it free",
            "NCCL keeps its buffers between the ranks of a node there, and fails or dies of SIGBUS without room.",
            "compose `shm_size: 2gb`, docker `--shm-size=2g` or `--ipc=host`; in a pod an emptyDir with "
            "`medium: Memory` at /dev/shm",
        )
    else:
        yield ok("shm", f"/dev/shm has {size(limits.shm_bytes)}, {size(limits.shm_free_bytes)} of it free")


def _memory(asked: Asked, limits: LimitFacts, *, running: bool) -> Iterator[Finding]:
    limit = limits.memory_limit_bytes
    if not limit:
        return
    by = limits.memory_limited_by
    seen = f"{by} is {size(limit)}, {size(limits.memory_used_bytes)} of it in use"
    needed = _SERVICES_BYTES + bool(asked.ranks) * _TORCH_BYTES + asked.ranks * _RANK_BYTES
    more = "compose `mem_limit:` (`deploy.resources.limits.memory`), Kubernetes `resources.limits.memory`"
    if limit < needed:
        yield error(
            "memory-limit",
            f"{seen}; a node service and {asked.ranks} ranks take some {size(needed)} before any row",
            "The kernel kills one of them (exit code 137, OOMKilled), again and again.",
            f"{more}, or fewer --ranks",
        )
        return
    if limit - limits.memory_used_bytes < needed and not running:
        yield warning(
            "memory-used",
            f"{seen}; a node service and {asked.ranks} ranks take some {size(needed)} before any row",
            "Somebody else in this container or host has the rest, and the kernel may kill either.",
            f"{more}, or end what else runs",
        )
    buffers = asked.buffer_bytes * max(1, asked.ranks)
    if limit < needed + buffers:
        yield warning(
            "buffers-beyond-memory",
            f"{seen}; --buffer-bytes {size(asked.buffer_bytes)} lets one exchange touch {size(buffers)} or more here",
            "Shared memory counts once it is touched: instead of an error for an exchange that is too large, "
            "the kernel kills a rank.",
            f"--buffer-bytes (EPMESH_BUFFER_BYTES) below {size((limit - needed) // max(1, asked.ranks))}, or {more}",
        )
    else:
        yield ok("memory", seen)


def _files(limits: LimitFacts, peers: int) -> Finding:
    soft, hard = limits.open_files
    needed = max(_FEW_FILES, _FILES_BASE + _FILES_A_PEER * peers)
    if soft < 0 or soft >= needed:
        return ok("open-files", f"{'no limit' if soft < 0 else soft} a process")
    make = error if soft < _TOO_FEW_FILES else warning
    return make(
        "open-files",
        f"a process may have {soft} descriptors (hard limit {hard})",
        f"Every connection and shared memory takes one; this mesh wants {needed}.",
        f"compose `ulimits: {{nofile: 65536}}`, docker `--ulimit nofile=65536`, systemd `LimitNOFILE=`, "
        f"or `ulimit -n {needed}` before",
    )


def _cpus(asked: Asked, limits: LimitFacts) -> Iterator[Finding]:
    have = min(filter(None, (limits.cpu_quota, float(limits.cpus))))
    wanted = max(1, asked.ranks * asked.threads)
    by = f"a quota of {limits.cpu_quota:g} CPUs" if 0 < limits.cpu_quota < limits.cpus else f"{limits.cpus} CPUs"
    if have >= wanted:
        yield ok("cpus", f"{by} for {asked.ranks} ranks of {asked.threads} threads")
        return
    yield warning(
        "cpu-quota",
        f"there are {by} for {asked.ranks} ranks of {asked.threads} threads",
        "Whoever used up the quota stands still for the rest of its period, and everybody waits for the slowest rank.",
        "compose `cpus:`, Kubernetes `resources.limits.cpu`, or fewer --ranks or --threads",
    )


def _tasks(asked: Asked, limits: LimitFacts) -> Iterator[Finding]:
    needed = _TASKS_BASE + _TASKS_A_RANK * asked.ranks
    if limits.pids_limit and limits.pids_limit - limits.pids_used < needed:
        yield warning(
            "pids-limit",
            f"the container may have {limits.pids_limit} tasks, {limits.pids_used} are in use, and {needed} are wanted",
            "Threads cannot be started, and libraries end the process for it.",
            "compose `pids_limit:`, docker `--pids-limit`, the kubelet's `podPidsLimit`",
        )


def _locked(asked: Asked, limits: LimitFacts) -> Iterator[Finding]:
    soft, _ = limits.locked_bytes
    if asked.on_gpu and 0 <= soft < _LOCKED_BYTES:
        yield warning(
            "locked-memory",
            f"a process may lock {size(soft)}",
            "Pinned memory for GPUs and network cards has to be locked.",
            "compose `ulimits: {memlock: -1}`, docker `--ulimit memlock=-1`, systemd `LimitMEMLOCK=infinity`",
        )


def size(count: int) -> str:
    """Bytes as a person reads them: ``64 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"

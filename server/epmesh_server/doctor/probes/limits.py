"""Limits: of the process, of its cgroup, of memory that processes share."""

from __future__ import annotations

import array
import mmap
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from epmesh_server.doctor.facts import LimitFacts
from epmesh_server.shared_memory import PAGE_BYTES, sealed_memfd

_NO_LIMIT = 1 << 60  # cgroup v1 says "no limit" as the largest multiple of a page


def look_at_limits(root: Path = Path("/")) -> LimitFacts:
    """Reads the limits; `root` is where /proc and /sys are looked for."""
    groups = list(_cgroups(root))
    limit, used, by = _memory(root, groups)
    shm_bytes, shm_free = _shm()
    tasks = [(most, _number(group / "pids.current")) for group in groups if (most := _number(group / "pids.max"))]
    most_tasks, used_tasks = min(tasks, default=(0, 0))
    status = (root / "proc/self/status").read_text()
    return LimitFacts(
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK),
        memory_limit_bytes=limit,
        memory_used_bytes=used,
        memory_limited_by=by,
        cpus=len(os.sched_getaffinity(0)),
        cpu_quota=min(filter(None, map(_cpu_quota, groups)), default=0.0),
        pids_limit=most_tasks,
        pids_used=used_tasks,
        shm_bytes=shm_bytes,
        shm_free_bytes=shm_free,
        memfd_problem=_problem_of(_try_memfd),
        passing_problem=_problem_of(_try_passing),
        eventfd_problem=_problem_of(lambda: os.close(os.eventfd(0))),
        seccomp="\nSeccomp:\t2" in status,
    )


# Of the cgroup -----------------------------------------------------------------------------------------------------


def _cgroups(root: Path) -> Iterator[Path]:
    """Directories of this process' cgroups and of all above them, version 1 and 2.

    In a container without a cgroup namespace the path that the kernel tells is the host's, and the directory that is
    mounted is the container's own: then that one is taken.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else [""]:
            mount = root / "sys/fs/cgroup" / name
            group = mount / path.lstrip("/")
            if not group.exists():
                group = mount
            while group != mount.parent and mount.exists():
                yield group
                group = group.parent


def _memory(root: Path, groups: list[Path]) -> tuple[int, int, str]:
    """The tightest limit, what is used of it, and the file that says so."""
    found = []
    for group in groups:
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _number(group / limit_file)
            if limit:
                used = max(0, _number(group / used_file) - _droppable(group))
                found.append((limit, used, f"/{(group / limit_file).relative_to(root)}"))
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    total, available = (int(meminfo[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    return min([*found, (total, total - available, "MemTotal")])


def _droppable(group: Path) -> int:
    """Bytes of page cache that the kernel gives up before it kills anybody."""
    path = group / "memory.stat"
    stat = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _cpu_quota(group: Path) -> float:
    """CPUs' worth of time a period; 0 where there is no quota."""
    if (group / "cpu.max").exists():
        quota, period = (group / "cpu.max").read_text().split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    quota_us, period_us = _signed(group / "cpu.cfs_quota_us"), _signed(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us > 0 and period_us > 0 else 0.0


def _signed(path: Path) -> int:
    return int(path.read_text()) if path.exists() else 0


def _number(path: Path) -> int:
    """The number in a file; 0 where it is missing, or says that there is no limit."""
    text = path.read_text().strip() if path.exists() else "max"
    return 0 if text == "max" or int(text) >= _NO_LIMIT else int(text)


# Of memory that is shared ------------------------------------------------------------------------------------------


def _shm() -> tuple[int, int]:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _try_memfd() -> None:
    fd = sealed_memfd("epmesh-doctor", PAGE_BYTES)
    try:
        with mmap.mmap(fd, PAGE_BYTES) as memory:
            memory[0] = 1
    finally:
        os.close(fd)


def _try_passing() -> None:
    """Passes a descriptor as the node service does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [ours.fileno()]))])
        theirs.settimeout(1.0)
        _, received, _, _ = socket.recv_fds(theirs, 1, 1)
        for fd in received:
            os.close(fd)
        if len(received) != 1:
            raise OSError("the descriptor did not arrive")


def _problem_of(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except OSError as exc:
        return str(exc)
    return ""

"""What the doctor's checks make of facts that no test can make for real, and what its probes read from files."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from epmesh_server.doctor import Asked, Facts, Finding, Severity, judge
from epmesh_server.doctor.facts import (
    Dial,
    Dialled,
    Directory,
    Endpoint,
    GpuFacts,
    HostFacts,
    Interface,
    Kind,
    LimitFacts,
    Lookup,
    MeshFacts,
    NetworkFacts,
    NodeSeen,
    Port,
    Resolver,
    Service,
)
from epmesh_server.doctor.probes.gpu import driver_version
from epmesh_server.doctor.probes.interfaces import default_interface, read_interfaces
from epmesh_server.doctor.probes.limits import look_at_limits
from epmesh_server.doctor.probes.names import read_resolver
from epmesh_server.doctor.probes.ports import look_at_port, reserved_ports
from epmesh_server.doctor.probes.together import run_together

GIB = 1 << 30
OPEN = Dial(address="10.0.0.1", port=7401, outcome=Dialled.OPEN, source="10.0.0.2", segment_bytes=1448)
COORDINATOR = Service(
    address="coordinator:7401",
    lookup=Lookup(name="coordinator", addresses=("10.0.0.1",)),
    dials=(OPEN,),
    kind=Kind.COORDINATOR,
    version="0.1.0",
    clock_ahead_s=0.0,
    epoch=3,
)
NODE = replace(
    COORDINATOR,
    address="node:7400",
    kind=Kind.NODE,
    node_id="a",
    incarnation=5,
    coordinator_address="coordinator:7401",
    coordinator_reachable=True,
)
NETWORK = NetworkFacts(
    hostname="box",
    interfaces=(Interface(name="eth0", addresses=("10.0.0.2",), mtu=1500),),
    advertised="10.0.0.2:7400",
    own_names={"10.0.0.2": Lookup(name="10.0.0.2", addresses=("10.0.0.2",))},
)
ASKED = Asked(host="0.0.0.0", coordinator="coordinator:7401", insecure=True)
WELL = Facts(
    network=NETWORK,
    mesh=MeshFacts(coordinator=COORDINATOR),
    limits=LimitFacts(memory_limit_bytes=64 * GIB, memory_limited_by="MemTotal", shm_bytes=GIB, shm_free_bytes=GIB),
    directories=(Directory(what="runtime directory", path=Path("/run/epmesh"), file_system="tmpfs"),),
    host=HostFacts(versions={"torch": "2.13.0"}),
)


def found(facts: Facts, asked: Asked = ASKED) -> dict[str, Finding]:
    """Errors and warnings, by cause."""
    return {finding.cause: finding for finding in judge(asked, facts) if finding.severity is not Severity.OK}


def test_nothing_is_found_where_all_is_well() -> None:
    assert found(WELL) == {}


def test_findings_come_worst_first() -> None:
    facts = replace(WELL, limits=replace(WELL.limits or LimitFacts(), open_files=(100, 100), cpus=1))
    severities = [finding.severity for finding in judge(replace(ASKED, ranks=4), facts)]
    assert severities == sorted(severities, reverse=True)
    assert {Severity.ERROR, Severity.WARNING, Severity.OK} <= set(severities)


# Limits ------------------------------------------------------------------------------------------------------------


def cgroup(root: Path, membership: str, files: dict[str, str]) -> Path:
    """A root directory with the files that a kernel shows of a cgroup."""
    for name, text in {
        "proc/self/cgroup": membership,
        "proc/self/status": "Name:\tpython\nSeccomp:\t2\n",
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n",
        **files,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_tightest_limit_of_cgroup_2_is_the_one_that_counts_without_cache_that_can_be_dropped(
    tmp_path: Path,
) -> None:
    below, above = "sys/fs/cgroup/pod/box", "sys/fs/cgroup/pod"
    files = {
        f"{below}/memory.max": "max",
        f"{above}/memory.max": str(GIB),
        f"{above}/memory.current": str(700 << 20),
        f"{above}/memory.stat": f"anon 1\ninactive_file {200 << 20}\n",
        f"{below}/cpu.max": "150000 100000",
        f"{above}/pids.max": "100",
        f"{above}/pids.current": "90",
    }
    limits = look_at_limits(cgroup(tmp_path, "0::/pod/box\n", files))
    assert (limits.memory_limit_bytes, limits.memory_used_bytes) == (GIB, 500 << 20)
    assert limits.memory_limited_by == "/sys/fs/cgroup/pod/memory.max"
    assert limits.cpu_quota == 1.5
    assert (limits.pids_limit, limits.pids_used) == (100, 90)
    assert limits.seccomp
    assert {"pids-limit", "cpu-quota", "buffers-beyond-memory"} <= set(
        found(replace(WELL, limits=limits), replace(ASKED, ranks=2))
    )


def test_the_limit_of_cgroup_1_is_read_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu"
    files = {
        f"{memory}/memory.limit_in_bytes": str(512 << 20),
        f"{memory}/memory.usage_in_bytes": str(100 << 20),
        f"{memory}/memory.stat": "total_inactive_file 0\n",
        f"{cpu}/cpu.cfs_quota_us": "50000",
        f"{cpu}/cpu.cfs_period_us": "100000",
    }
    limits = look_at_limits(cgroup(tmp_path, "4:memory:/docker/0123\n3:cpu:/docker/0123\n", files))
    assert (limits.memory_limit_bytes, limits.memory_used_bytes) == (512 << 20, 100 << 20)
    assert limits.cpu_quota == 0.5
    assert found(replace(WELL, limits=limits), replace(ASKED, ranks=4))["memory-limit"].severity is Severity.ERROR


def test_without_a_cgroup_limit_the_hosts_memory_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    limits = look_at_limits(cgroup(tmp_path, "4:memory:/\n3:cpu:/\n", files))
    assert (limits.memory_limit_bytes, limits.memory_limited_by) == (16 * GIB, "MemTotal")
    assert limits.memory_used_bytes == 8 * GIB
    assert limits.cpu_quota == 0


def test_memory_that_others_use_is_told_only_before_the_node_runs() -> None:
    limits = LimitFacts(memory_limit_bytes=8 * GIB, memory_used_bytes=8 * GIB - 1, memory_limited_by="memory.max")
    assert "memory-used" in found(replace(WELL, limits=limits))
    running = MeshFacts(
        coordinator=replace(COORDINATOR, nodes=(NodeSeen(slot=0, node_id="a", incarnation=5, address=""),)), here=NODE
    )
    assert "memory-used" not in found(replace(WELL, limits=limits, mesh=running))


def test_a_large_mesh_wants_more_descriptors() -> None:
    limits = LimitFacts(open_files=(1024, 4096), memory_limit_bytes=64 * GIB)
    links = tuple(
        Endpoint(what="links", owner=f"rank {rank}", address="10.0.0.1:1", outcome=Dialled.OPEN) for rank in range(512)
    )
    assert "open-files" not in found(replace(WELL, limits=limits))
    crowded = found(replace(WELL, limits=limits, mesh=MeshFacts(coordinator=COORDINATOR, endpoints=links)))
    assert "1024 descriptors (hard limit 4096)" in crowded["open-files"].seen


# Addresses and ports -----------------------------------------------------------------------------------------------


def test_addresses_of_an_interface_are_those_that_the_kernel_tells() -> None:
    (loopback,) = (interface for interface in read_interfaces() if interface.loopback)
    assert "127.0.0.1" in loopback.addresses
    assert loopback.mtu > 0


def test_addresses_are_not_judged_where_interfaces_are_hidden() -> None:
    hidden = replace(NETWORK, interfaces=(), interfaces_problem="Address family not supported by protocol")
    assert set(found(replace(WELL, network=hidden))) == {"interfaces-hidden"}


def test_the_default_route_with_the_lowest_metric_is_the_one(tmp_path: Path) -> None:
    table = tmp_path / "route"
    table.write_text(
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
        "wlan0 00000000 0102A8C0 0003 0 0 600 00000000 0 0 0\n"
        "eth0 00000000 0102A8C0 0003 0 0 100 00000000 0 0 0\n"
        "docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0\n"
    )
    assert default_interface(table) == "eth0"
    assert default_interface(tmp_path / "missing") == ""


@pytest.mark.parametrize(
    ("state", "cause"), [("denied", "port-denied"), ("foreign", "host-foreign"), ("unknown", "port-unknown")]
)
def test_a_port_that_cannot_be_bound_is_told_with_its_reason(state: str, cause: str) -> None:
    port = Port(what="node service", host="10.0.0.9", number=80, state=state)
    assert "10.0.0.9:80" in found(replace(WELL, network=replace(NETWORK, ports=(port,))))[cause].seen


def test_a_port_that_epmesh_itself_has_is_well() -> None:
    port = Port(what="node service", host="0.0.0.0", number=7400, state="taken", pid=7, command="epmesh serve")
    network = replace(NETWORK, ports=(port,))
    assert "port-taken" in found(replace(WELL, network=network))
    here = MeshFacts(
        coordinator=replace(COORDINATOR, nodes=(NodeSeen(slot=0, node_id="box:7400", incarnation=5, address=""),)),
        here=NODE,
    )
    assert found(replace(WELL, network=network, mesh=here)) == {}


def test_a_port_whose_owner_is_hidden_may_be_outside_the_container() -> None:
    port = Port(what="node service", host="0.0.0.0", number=7400, state="taken")
    finding = found(replace(WELL, network=replace(NETWORK, ports=(port,))))["port-taken"]
    assert "cannot see" in finding.seen
    assert "network_mode: host" in finding.mend


def test_who_has_a_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        taken = look_at_port("node service", "127.0.0.1", number)
    assert taken.state == "taken"
    assert taken.pid > 0
    assert "pytest" in taken.command
    assert look_at_port("node service", "127.0.0.1", number).state == "free"


def test_reserved_ports_are_read_as_spans(tmp_path: Path) -> None:
    path = tmp_path / "reserved"
    path.write_text("80,7400-7402\n")
    assert reserved_ports(path) == {80, 7400, 7401, 7402}
    path.write_text("\n")
    assert reserved_ports(path) == frozenset()


# Names -------------------------------------------------------------------------------------------------------------


def test_the_resolver_is_read_as_it_is_set(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# a pod's\nnameserver 10.96.0.10\nsearch a.svc b c\noptions ndots:5 timeout:1\n")
    assert read_resolver(path) == Resolver(nameservers=("10.96.0.10",), search=("a.svc", "b", "c"), ndots=5)
    assert read_resolver(tmp_path / "missing") == Resolver()


def unknown(container: str, nameserver: str) -> Finding:
    nobody = replace(COORDINATOR, lookup=Lookup(name="coordinator", problem="unknown"), dials=(), kind=Kind.NOBODY)
    facts = replace(
        WELL,
        mesh=MeshFacts(coordinator=nobody),
        network=replace(NETWORK, resolver=Resolver(nameservers=(nameserver,))),
        host=HostFacts(container=container),
    )
    return found(facts)["name-unknown"]


def test_the_mend_of_an_unknown_name_is_that_of_the_place() -> None:
    assert "coordinator.NAMESPACE.svc.cluster.local" in unknown("kubernetes", "10.96.0.10").mend
    assert "default bridge has no names" in unknown("docker", "8.8.8.8").mend
    assert "compose's service name" in unknown("docker", "127.0.0.11").mend
    assert "getent hosts" in unknown("", "8.8.8.8").mend


def test_a_name_that_goes_through_search_domains_is_told_so() -> None:
    late = replace(COORDINATOR, lookup=Lookup(name="coordinator.x", addresses=("10.0.0.1",), took_s=1.2))
    network = replace(NETWORK, resolver=Resolver(search=("a", "b", "c"), ndots=5))
    finding = found(replace(WELL, mesh=MeshFacts(coordinator=late), network=network))["name-late"]
    assert "coordinator.x." in finding.mend
    assert "3 search domains" in finding.mend


# Services ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "error_s", "severity"),
    [
        (0.9, 0.0, None),
        (-1.5, 0.0, Severity.WARNING),
        (1.5, 1.0, None),
        (-61.0, 0.1, Severity.ERROR),
        (None, 0.0, None),
    ],
)
def test_a_clock_is_off_only_where_the_round_trip_cannot_explain_it(
    ahead_s: float | None, error_s: float, severity: Severity | None
) -> None:
    service = replace(COORDINATOR, clock_ahead_s=ahead_s, clock_error_s=error_s)
    finding = found(replace(WELL, mesh=MeshFacts(coordinator=service))).get("clock-skew")
    assert (finding.severity if finding else None) == severity


def test_a_node_of_another_mesh_is_told() -> None:
    facts = replace(WELL, mesh=MeshFacts(coordinator=COORDINATOR, node=NODE))
    assert set(found(facts)) == {"node-elsewhere"}
    member = replace(COORDINATOR, nodes=(NodeSeen(slot=0, node_id="a", incarnation=5, address="node:7400"),))
    assert found(replace(WELL, mesh=MeshFacts(coordinator=member, node=NODE))) == {}


def test_a_node_that_runs_here_has_its_own_id() -> None:
    seen = (NodeSeen(slot=0, node_id="box:7400", incarnation=5, address="10.0.0.2:7400"),)
    coordinator = replace(COORDINATOR, nodes=seen)
    assert found(replace(WELL, mesh=MeshFacts(coordinator=coordinator, here=NODE))) == {}
    stranger = replace(NODE, incarnation=6)
    assert "node-id-taken" in found(replace(WELL, mesh=MeshFacts(coordinator=coordinator, here=stranger)))


def test_pairs_that_cannot_reach_each_other_are_named_and_too_many_are_counted() -> None:
    endpoints = tuple(
        Endpoint(what="links", owner=f"rank {rank} of b", address="10.0.0.3:9", outcome=Dialled.SILENT)
        for rank in range(20)
    )
    findings = [
        finding
        for finding in judge(ASKED, replace(WELL, mesh=MeshFacts(coordinator=COORDINATOR, endpoints=endpoints)))
        if finding.cause == "endpoint-unreachable"
    ]
    assert len(findings) == 8
    assert findings[0].seen == "from here to rank 0 of b: links at 10.0.0.3:9 is silent"
    assert "20 endpoints in all" in findings[0].mend


def test_a_service_that_listens_on_loopback_in_its_own_container_is_told_with_the_option() -> None:
    refused = replace(
        COORDINATOR, dials=(Dial(address="10.0.0.1", port=7401, outcome=Dialled.REFUSED),), kind=Kind.NOBODY
    )
    assert "EPMESH_COORDINATOR_HOST" in found(replace(WELL, mesh=MeshFacts(coordinator=refused)))["refused"].mend


# Directories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"socket_problem": "Operation not permitted", "socket_path_bytes": 30}, "no-unix-sockets"),
        ({"write_problem": "Permission denied", "owner": 1000, "mode": 0o755}, "not-writable"),
        ({"write_problem": "No space left on device", "free_bytes": 0}, "disk-full"),
        ({"owner": 1000, "socket_path_bytes": 30}, "runtime-dir-open"),
    ],
)
def test_a_directory_that_cannot_be_used_is_told(changes: dict[str, Any], cause: str) -> None:
    directory = Directory(what="runtime directory", path=Path("/run/epmesh"), file_system="9p")
    facts = replace(WELL, directories=(replace(directory, **changes),))
    finding = found(facts, replace(ASKED, runtime_dir=directory.path))[cause]
    assert "/run/epmesh" in finding.seen


def test_a_directory_of_another_user_may_be_the_services_whose_user_the_doctor_is_not() -> None:
    directory = Directory(
        what="runtime directory", path=Path("/run/epmesh"), file_system="tmpfs", owner=1000, socket_path_bytes=30
    )
    finding = found(replace(WELL, directories=(directory,)), replace(ASKED, runtime_dir=directory.path))
    assert "runuser -u USER -- epmesh doctor" in finding["runtime-dir-open"].mend


def test_a_log_in_a_containers_own_layer_is_forgotten() -> None:
    data = Directory(what="data directory", path=Path("/data"), file_system="overlay")
    assert "volumes:" in found(replace(WELL, directories=(data,)))["log-forgotten"].mend
    assert found(replace(WELL, directories=(replace(data, file_system="ext4"),))) == {}


# This host ---------------------------------------------------------------------------------------------------------


def test_ranks_want_torch_and_a_node_alone_does_not() -> None:
    facts = replace(WELL, host=HostFacts(versions={"torch": ""}))
    assert found(facts) == {}
    assert "torch-missing" in found(facts, replace(ASKED, ranks=1))


def test_a_proxy_is_wrong_only_where_channels_would_take_it() -> None:
    host = HostFacts(environment={"http_proxy": "http://proxy:3128"})
    assert found(replace(WELL, host=host)) == {}
    assert "http://proxy:3128" in found(replace(WELL, host=replace(host, proxy_used=True)))["proxy"].seen


@pytest.mark.parametrize(
    ("value", "wrong"), [("eth", False), ("=eth0", False), ("^docker0", False), ("ib0,eth0", False), ("ib", True)]
)
def test_an_interface_may_be_named_by_its_beginning_or_left_out(value: str, wrong: bool) -> None:
    host = HostFacts(environment={"NCCL_SOCKET_IFNAME": value})
    assert ("interface-variable" in found(replace(WELL, host=host))) == wrong


@pytest.mark.parametrize(
    ("first", "wrong"),
    [(("/bin/sh", "-c", "epmesh serve"), True), (("epmesh", "serve"), False), (("/sbin/tini", "--", "sh"), False)],
)
def test_a_shell_with_a_command_as_process_1_passes_no_signals(first: Sequence[str], wrong: bool) -> None:
    host = HostFacts(container="docker", first_process=tuple(first))
    assert ("shell-first" in found(replace(WELL, host=host))) == wrong
    assert found(replace(WELL, host=replace(host, container=""))) == {}


def test_zombies_want_an_init() -> None:
    host = HostFacts(container="docker", first_process=("epmesh", "serve"), zombies=40)
    assert "--init" in found(replace(WELL, host=host))["zombies"].mend


# GPUs --------------------------------------------------------------------------------------------------------------

GPUS = GpuFacts(driver="580.65", cuda=13000, names=("H100", "H100"), torch_cuda="13.0", multicast=True)


@pytest.mark.parametrize(
    ("gpu", "cause", "word"),
    [
        (replace(GPUS, problem="no library", driver=""), "gpu-missing", "no NVIDIA driver"),
        (replace(GPUS, problem="CUDA_ERROR_NO_DEVICE"), "gpu-missing", "was given no device"),
        (
            replace(GPUS, problem="libcuda.so.1: no such file", device_files=("/dev/nvidia0",)),
            "gpu-missing",
            "library is missing",
        ),
        (replace(GPUS, names=("H100",)), "gpu-number", "cannot start"),
        (replace(GPUS, torch_cuda=""), "torch-without-cuda", "cannot use"),
        (replace(GPUS, cuda=12080), "driver-old", "finds no device"),
        (replace(GPUS, no_peer_access=((0, 1),)), "no-peer-access", "arena"),
    ],
)
def test_what_is_wrong_with_gpus_is_told(gpu: GpuFacts, cause: str, word: str) -> None:
    cuda = replace(ASKED, device="cuda", ranks=2)
    finding = found(replace(WELL, gpu=gpu), cuda)[cause]
    assert word in finding.why
    assert found(replace(WELL, gpu=gpu)) == {}  # no rank uses one


def test_devices_that_a_variable_hides_are_told_so() -> None:
    gpu = replace(GPUS, problem="cuInit says CUDA_ERROR_NO_DEVICE (100)", device_files=("/dev/nvidia0",))
    host = HostFacts(environment={"CUDA_VISIBLE_DEVICES": ""}, versions={"torch": "2"})
    finding = found(replace(WELL, gpu=gpu, host=host), replace(ASKED, device="cuda"))["gpu-missing"]
    assert "CUDA_VISIBLE_DEVICES= hides" in finding.why


def test_the_drivers_version_is_not_that_of_the_processor() -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 15.3.0\n"
    assert driver_version(text) == "580.159.04"
    assert driver_version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue\n") == "535.54"
    assert driver_version("") == ""


def test_gpus_that_work_are_well() -> None:
    limits = replace(WELL.limits or LimitFacts(), cpus=8)
    assert found(replace(WELL, gpu=GPUS, limits=limits), replace(ASKED, device="cuda", ranks=2)) == {}
    p2p = HostFacts(environment={"NCCL_P2P_DISABLE": "1"}, versions={"torch": "2"})
    disabled = found(replace(WELL, gpu=GPUS, limits=limits, host=p2p), replace(ASKED, device="cuda", ranks=2))
    assert set(disabled) == {"p2p-disabled"}


# Probes that fail --------------------------------------------------------------------------------------------------


def test_a_probe_that_hangs_or_raises_keeps_nobody_and_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def hang() -> str:
            return theirs.recv(1).decode()

        def fail() -> str:
            raise OSError("broken")

        done, missing = run_together({"well": lambda: "well", "hangs": hang, "fails": fail}, 1.0)
        assert done == {"well": "well"}
        assert missing["hangs"] is None
        assert isinstance(missing["fails"], OSError)
        ours.send(b"x")  # lets the thread end
    told = found(Facts(unanswered={"gpu": "no answer within 6 s"}))
    assert "gpu could not be looked at: no answer within 6 s" in told["not-looked-at"].seen

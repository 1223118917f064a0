"""`epmesh doctor` finds each cause where it is made for real, names the value and the mend, and nothing else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.integration.places import Place, Report, examine, run_there, why_no_places

NET = "net eth0 10.9.0.1/24"
HERE = f"{NET}; coordinator --host 10.9.0.1 --insecure; listens 10.9.0.1:7401"
SECURED = "epmesh certs init $PLACE/certs --node a > /dev/null"
AWAY = "--host 0.0.0.0 --insecure --coordinator 10.9.0.1:7401"
SIX_S = 6.0  # as the doctor promises
_AT_ONCE = 3
# On a small machine a default node does not fit by the numbers; that is no fault of the place.
MACHINE = ("buffers-beyond-memory", "memory-used", "cpu-quota")
WITH_TIME = (
    "import time, sys; now = time.time; time.time = lambda: now() + 120; from epmesh_server.cli import main; main()"
)
WITH_VERSION = "import epmesh.version; epmesh.version.VERSION = '9.8.7'; from epmesh_server.cli import main; main()"

PLACES = (
    Place("well", (), HERE, f"{AWAY} --advertise 10.9.0.1", ("10.9.0.1 (--advertise) of eth0",)),
    # Addresses
    Place(
        "hostname_is_loopback",
        ("hostname-loopback",),
        f"{HERE}; hostname box; named '127.0.1.1 box'",
        f"{AWAY} --advertise box",
        ("/etc/hosts gives box the address 127.0.1.1",),
    ),
    Place(
        "route_tells_the_address_where_the_host_name_is_loopback",
        (),
        f"{HERE}; net docker0 172.17.0.1/16; hostname box; named '127.0.1.1 box'",
        AWAY,
        ("10.9.0.1 (by its routes) of eth0",),
    ),
    Place(
        "route_to_the_outside_is_a_containers_bridge",
        ("advertised-bridge",),
        f"{HERE}; net docker0 172.17.0.1/16; ip route add default dev docker0",
        "--host 0.0.0.0 --insecure --coordinator 127.0.0.1:7401 --port 7410",
        ("172.17.0.1 (by its routes), of docker0, a bridge",),
        may=("refused", "coordinator-loopback"),
    ),
    Place(
        "no_route_leads_out",
        ("no-route-out",),
        NET,
        "--host 0.0.0.0 --insecure",
        ("would advertise 127.0.0.1 (by its routes): no route leads out of this host, though it has 10.9.0.1",),
    ),
    Place(
        "advertised_is_loopback",
        ("advertised-loopback",),
        HERE,
        f"{AWAY} --advertise 127.0.0.1",
        ("would advertise 127.0.0.1",),
    ),
    Place(
        "advertised_is_link_local",
        ("advertised-link-local",),
        f"{HERE}; net eth1 169.254.7.7/16",
        f"{AWAY} --advertise 169.254.7.7",
        ("169.254.7.7",),
    ),
    Place(
        "advertised_is_of_no_interface",
        ("advertised-foreign", "link-host-foreign"),
        HERE,
        f"{AWAY} --advertise 10.99.0.1",
        ("10.99.0.1 (--advertise), which no interface here has", "links of ranks would listen on 10.99.0.1"),
    ),
    Place(
        "advertised_is_a_containers_bridge",
        ("advertised-bridge",),
        f"{HERE}; net docker0 172.17.0.1/16",
        f"{AWAY} --advertise 172.17.0.1",
        ("of docker0, a bridge",),
    ),
    Place(
        "advertised_is_of_another_interface",
        ("advertised-wrong-interface", "silent"),
        f"{NET}; net pod0 10.44.0.5/16; nobody pod0 10.44.9.9; ip route add default dev eth0",
        "--host 0.0.0.0 --insecure --coordinator 10.44.9.9:7401 --advertise 10.9.0.1",
        ("of eth0; the coordinator is reached by pod0 (10.44.0.5)", "eth0 (default route) 10.9.0.1"),
    ),
    Place(
        "advertised_is_unknown",
        ("advertised-unknown",),
        HERE,
        f"{AWAY} --advertise nowhere.invalid",
        ("nowhere.invalid (--advertise), which does not resolve here",),
    ),
    Place(
        "listens_on_loopback_alone",
        ("listens-on-loopback",),
        HERE,
        "--coordinator 10.9.0.1:7401",
        ("listens on 127.0.0.1, and its coordinator is 10.9.0.1:7401",),
    ),
    Place(
        "ipv6_alone",
        ("ipv6-only",),
        "net eth0 fd00::9/64; coordinator --host '[::]' --insecure; listens ::1:7401",
        "--host 0.0.0.0 --insecure --coordinator '[fd00::9]:7401' --advertise '[fd00::9]'",
        ("IPv6 addresses alone",),
    ),
    Place(
        "host_is_of_another_machine",
        ("host-foreign", "advertised-foreign", "link-host-foreign"),
        HERE,
        "--host 10.77.0.1 --insecure --coordinator 10.9.0.1:7401",
        ("10.77.0.1:7400, which is no address of this host",),
    ),
    Place(
        "mtus_differ",
        ("mtu-mismatch",),
        """
        ip link add eth0 mtu 9000 type veth peer name far0 mtu 1500
        ip address add 10.9.0.1/24 dev eth0; ip link set eth0 up
        unshare --net sleep 60 & there=$!
        until [ "$(readlink /proc/$there/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
        ip link set far0 netns $there
        inside() { nsenter --net=/proc/$there/ns/net "$@"; }
        inside ip address add 10.9.0.2/24 dev far0; inside ip link set far0 up
        inside python -m epmesh_server.cli coordinator --host 10.9.0.2 --insecure --data-dir "$PLACE/log" &
        listens 10.9.0.2:7401
        """,
        "--host 0.0.0.0 --insecure --coordinator 10.9.0.2:7401 --advertise 10.9.0.1",
        ("eth0 sends packets of 9000 bytes, the other end at 10.9.0.2 takes segments of 1448",),
    ),
    # Ports
    Place(
        "port_is_taken",
        ("port-taken",),
        "stranger 7400",
        "",
        ("127.0.0.1:7400 is taken by process ", "http.server 7400"),
    ),
    Place(
        "coordinators_port_is_taken",
        ("port-taken", "not-epmesh"),
        "stranger 7401",
        "",
        ("127.0.0.1:7401 is taken by process ", "127.0.0.1:7401 is no service of epmesh"),
    ),
    Place(
        "port_is_among_the_ephemeral_ones_and_those_are_few",
        ("port-ephemeral", "few-ports"),
        "sysctl -qw net.ipv4.ip_local_port_range='7400 7899'",
        "",
        ("port 7400,7401 is among", "500 ports"),
    ),
    Place(
        "port_is_among_the_ephemeral_ones_and_reserved",
        (),
        "sysctl -qw net.ipv4.ip_local_port_range='7000 9999' net.ipv4.ip_local_reserved_ports=7400-7401",
    ),
    # Names
    Place(
        "name_is_unknown",
        ("name-unknown",),
        "",
        "--coordinator coordinator:7401 --advertise 127.0.0.1",
        ("coordinator, the coordinator's name, does not resolve",),
        may=("advertised-loopback", "listens-on-loopback"),
    ),
    Place(
        "name_server_is_silent",
        ("name-unknown",),
        f"{NET}; nobody eth0 10.9.0.53; asks 'nameserver 10.9.0.53'",
        "--coordinator coordinator:7401 --advertise 127.0.0.1",
        ("no answer within", "asked 10.9.0.53"),
        may=("advertised-loopback", "listens-on-loopback"),
    ),
    Place(
        "name_comes_late",
        ("name-late",),
        f"{HERE}; asks 'nameserver 127.0.0.1'; python -m tests.integration.name_server 10.9.0.1 3 & "
        'read -r < <(tail -F "$PLACE/ready" 2> /dev/null)',
        "--host 0.0.0.0 --insecure --coordinator coordinator.test:7401 --advertise 10.9.0.1",
        ("coordinator.test resolved at try ",),
    ),
    Place(
        "name_has_several_addresses",
        ("several-addresses", "half-reachable"),
        f"{HERE}; net eth1 10.10.0.1/24; named '10.9.0.1 coordinator' '10.10.0.1 coordinator'",
        "--host 0.0.0.0 --insecure --coordinator coordinator:7401 --advertise 10.9.0.1",
        ("coordinator has 2 IPv4 addresses: 10.9.0.1, 10.10.0.1", "is refused at 10.10.0.1"),
    ),
    # Connections
    Place("coordinator_refuses", ("refused",), NET, f"{AWAY} --advertise 10.9.0.1", ("10.9.0.1:7401 refuses",)),
    Place(
        "coordinator_is_the_container_itself",
        ("coordinator-loopback",),
        "",
        "--coordinator 127.0.0.1:7401",
        ("127.0.0.1:7401, and nothing listens there",),
        environment={"container": "podman"},
        may=("shell-first",),
    ),
    Place(
        "packets_are_dropped",
        ("silent",),
        f"{NET}; nobody eth0 10.9.0.9",
        "--host 0.0.0.0 --insecure --coordinator 10.9.0.9:7401 --advertise 10.9.0.1",
        ("10.9.0.9:7401 does not answer at all",),
    ),
    Place(
        "there_is_no_route",
        ("unreachable",),
        NET,
        "--host 0.0.0.0 --insecure --coordinator 10.88.0.1:7401 --advertise 10.9.0.1",
        ("10.88.0.1:7401 cannot be reached: Network is unreachable",),
    ),
    # Who answers
    Place(
        "coordinator_and_node_are_mixed_up",
        ("coordinator-is-a-node", "node-is-a-coordinator"),
        'epmesh serve --runtime-dir "$PLACE/run" & listens 127.0.0.1:7400; listens 127.0.0.1:7401',
        "--coordinator 127.0.0.1:7400 --node 127.0.0.1:7401 --port 7410",
        ("at 127.0.0.1:7400 is a node service", "its coordinator is 127.0.0.1:7401"),
    ),
    Place(
        "coordinator_stands_still",
        ("no-answer",),
        "coordinator; listens 127.0.0.1:7401; kill -STOP $!",
        "--coordinator 127.0.0.1:7401",
        ("127.0.0.1:7401 takes connections and answers no call",),
    ),
    Place(
        "versions_differ",
        ("version-skew",),
        f'python -c "{WITH_VERSION}" coordinator --data-dir "$PLACE/state" & listens 127.0.0.1:7401',
        "--coordinator 127.0.0.1:7401",
        ("'9.8.7'",),
    ),
    Place(
        "clocks_differ",
        ("clock-skew",),
        f'python -c "{WITH_TIME}" coordinator --data-dir "$PLACE/state" & listens 127.0.0.1:7401',
        "--coordinator 127.0.0.1:7401",
        ("s ahead of this one",),
    ),
    Place(
        "node_does_not_reach_its_coordinator",
        ("node-cut-off",),
        'epmesh serve --port 7410 --coordinator 127.0.0.1:7499 --runtime-dir "$PLACE/run" & listens 127.0.0.1:7410',
        "--node 127.0.0.1:7410",
        ("does not reach its coordinator at 127.0.0.1:7499",),
    ),
    Place(
        "node_id_is_taken",
        ("node-id-taken",),
        'epmesh serve --node-id a --runtime-dir "$PLACE/run" & registered 127.0.0.1:7400',
        "--node-id a --port 7410 --coordinator 127.0.0.1:7401",
        ("a live node at 127.0.0.1:7400 has the id a",),
    ),
    Place(
        "a_node_of_the_view_is_out_of_reach",
        ("endpoint-unreachable",),
        f"{NET}; nobody eth0 10.9.0.9; "
        'epmesh serve --host 0.0.0.0 --insecure --advertise 10.9.0.9 --node-id far --runtime-dir "$PLACE/run" & '
        "registered 127.0.0.1:7400",
        "--host 0.0.0.0 --insecure --port 7410 --coordinator 10.9.0.1:7401 --advertise 10.9.0.1",
        ("from here to far: node service at 10.9.0.9:7400 is silent",),
    ),
    # Certificates
    Place(
        "certificates_are_well",
        (),
        f"{SECURED}; coordinator --tls-dir $PLACE/certs/coordinator; listens 127.0.0.1:7401",
        "--coordinator 127.0.0.1:7401 --node-id a --tls-dir $PLACE/certs/node-a",
        ("127.0.0.1:7401 answers", "is good for 36"),
    ),
    Place(
        "coordinator_wants_tls",
        ("tls-expected",),
        f"{SECURED}; coordinator --tls-dir $PLACE/certs/coordinator; listens 127.0.0.1:7401",
        "--coordinator 127.0.0.1:7401",
        ("the service wants TLS",),
    ),
    Place(
        "coordinator_has_no_tls",
        ("tls-refused",),
        f"{SECURED}; coordinator; listens 127.0.0.1:7401",
        "--coordinator 127.0.0.1:7401 --node-id a --tls-dir $PLACE/certs/node-a",
        ("the service speaks no TLS",),
    ),
    Place(
        "coordinator_has_another_authority",
        ("tls-refused",),
        f"{SECURED}; epmesh certs init $PLACE/others > /dev/null; "
        "coordinator --tls-dir $PLACE/others/coordinator; listens 127.0.0.1:7401",
        "--coordinator 127.0.0.1:7401 --node-id a --tls-dir $PLACE/certs/node-a",
        ("the service's certificate is refused here",),
    ),
    Place(
        "certificate_is_another_nodes",
        ("certificate-names",),
        SECURED,
        "--node-id b --tls-dir $PLACE/certs/node-a",
        ("is for node 'a', and this would be node 'b'",),
    ),
    Place(
        "private_key_is_open_to_others",
        ("certificate-unreadable",),
        f"{SECURED}; chmod 644 $PLACE/certs/node-a/tls.key",
        "--node-id a --tls-dir $PLACE/certs/node-a",
        ("tls.key has mode 0644",),
    ),
    Place(
        "certificate_is_a_coordinators",
        (),  # it may look, as its own health check does
        f"{SECURED}; coordinator --tls-dir $PLACE/certs/coordinator; listens 127.0.0.1:7401",
        "--coordinator 127.0.0.1:7401 --tls-dir $PLACE/certs/coordinator",
        ("is for a coordinator, no node",),
    ),
    # Limits
    Place("few_descriptors", ("open-files",), "ulimit -n 200", seen=("a process may have 200 descriptors",)),
    *(
        Place(
            f"{call}_is_refused",
            (cause,),
            seen=("not permitted; a seccomp filter is on",),
            wrapper=f"python -m tests.integration.without_call {call}",
        )
        for call, cause in (
            ("memfd_create", "memfd-refused"),
            ("eventfd2", "eventfd-refused"),
            ("sendmsg", "passing-refused"),
        )
    ),
    Place("few_processors", ("cpu-quota",), "", "--ranks 2", ("there are 1 CPUs for 2 ranks",), "taskset -c 0"),
    # Directories
    Place(
        "runtime_directory_is_read_only",
        ("read-only",),
        'mkdir "$PLACE/run"; mount -t tmpfs -o ro,mode=700 none "$PLACE/run"',
        '--runtime-dir "$PLACE/run"',
        ("on a read-only file system",),
    ),
    Place(
        "everything_is_read_only",
        ("read-only",),
        "mount --bind /tmp /tmp; mount -o remount,ro,bind /tmp; mount -o remount,ro,bind /; cd /",
        seen=("runtime directory", "data directory"),
    ),
    Place(
        "data_directory_is_full",
        ("disk-full", "log-forgotten"),
        'mkdir "$PLACE/data"; mount -t tmpfs -o size=1m none "$PLACE/data"',
        '--data-dir "$PLACE/data"',
        ("has 1 MiB left",),
    ),
    Place(
        "data_directory_that_an_image_sets_and_a_node_does_not_need",
        (),
        f'{HERE}; mkdir "$PLACE/data"; mount -t tmpfs -o size=1m none "$PLACE/data"',
        f'{AWAY} --advertise 10.9.0.1 --data-dir "$PLACE/data"',
        ("10.9.0.1 (--advertise) of eth0",),
    ),
    Place(
        "log_is_lost_with_the_container",
        ("log-forgotten",),
        'mkdir "$PLACE/data"; mount -t tmpfs none "$PLACE/data"',
        '--data-dir "$PLACE/data"',
        ("is on tmpfs",),
    ),
    Place(
        "runtime_directory_is_open_to_others",
        ("runtime-dir-open",),
        'mkdir -m 755 "$PLACE/run"',
        '--runtime-dir "$PLACE/run"',
        ("mode 0755",),
    ),
    Place(
        "user_may_nothing",
        ("not-writable", "port-denied"),
        'mkdir -m 700 "$PLACE/run"; chown 1000 "$PLACE/run"',
        '--runtime-dir "$PLACE/run/epmesh" --port 80',
        ("cannot be written by user 0 (owner 1000, mode 0", "127.0.0.1:80, which only root may"),
        wrapper="setpriv --bounding-set=-all --inh-caps=-all",
    ),
    Place(
        "sockets_paths_are_long",
        ("socket-path-long",),
        "",
        f'--runtime-dir "$PLACE/{"x" * 90}"',
        ("would have paths of 1",),
    ),
    # Environment
    Place(
        "a_proxy_is_set_and_not_used",
        (),
        HERE,
        f"{AWAY} --advertise 10.9.0.1",
        ("epmesh's own connections take no proxy", "10.9.0.1:7401 answers"),
        environment={"http_proxy": "http://user:secret@127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    ),
    Place(
        "an_interface_is_named_that_is_not_there",
        ("interface-variable",),
        NET,
        seen=("GLOO_SOCKET_IFNAME=ib0, and there is no such interface",),
        environment={"GLOO_SOCKET_IFNAME": "ib0"},
    ),
    Place(
        "another_launcher_left_its_variables",
        ("launcher-variables",),
        seen=("MASTER_ADDR=10.0.0.1",),
        environment={"MASTER_ADDR": "10.0.0.1"},
    ),
    Place(
        "kubernetes_sets_variables_for_services_of_our_name",
        ("service-links",),
        HERE,
        f"{AWAY} --advertise 10.9.0.1",
        ("Kubernetes sets EPMESH_SERVICE_HOST and EPMESH_COORDINATOR_SERVICE_HOST", "10.9.0.1:7401 answers"),
        environment={
            "EPMESH_SERVICE_HOST": "10.96.0.7",
            "EPMESH_PORT": "tcp://10.96.0.7:7400",
            "EPMESH_COORDINATOR_SERVICE_HOST": "10.96.0.8",
            "EPMESH_COORDINATOR_PORT": "tcp://10.96.0.8:7401",
        },
    ),
    Place(
        "a_shell_is_process_1",
        ("shell-first",),
        seen=("process 1 is `bash -c ",),
        environment={"container": "podman"},
    ),
    # GPUs
    Place(
        "there_is_no_gpu_and_little_shared_memory",
        ("gpu-missing", "shm-small", "locked-memory"),
        "mount -t tmpfs -o size=64m none /dev/shm; ulimit -l 64; mount -t tmpfs none /proc/driver 2> /dev/null || :",
        "--device cuda",
        ("/dev/shm has 64 MiB", "no /dev/nvidia*", "may lock 64 KiB"),
    ),
    Place("options_are_refused", ("options-refused",), NET, "--host 10.9.0.1", ("is reachable from other machines",)),
)


def selected(session: pytest.Session) -> list[Place]:
    """The places of the tests that are to run."""
    calls = [item.callspec for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec")]
    places: list[object] = [call.params.get("place") for call in calls]
    return [place for place in places if isinstance(place, Place)]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[Callable[[Place], Report]]:
    """What the doctor says in each place. Three at a time: it mostly waits for what does not answer."""
    if why_no_places():
        pytest.skip(why_no_places())
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = {place.name: pool.submit(examine, place) for place in selected(request.session)}
        try:
            yield lambda place: running[place.name].result()
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_the_doctor_finds(place: Place, reports: Callable[[Place], Report]) -> None:
    report = reports(place)
    wrong = report.causes("error", "warning")
    # Only what the place has, beside what this machine may lack, is found.
    beside = {*MACHINE, *place.may} - set(place.causes)
    if "container" not in place.environment:
        beside.add("shell-first")  # of the place itself, where the tests run in a container
    assert wrong - beside == set(place.causes), report.text
    assert report.code == int(bool(report.causes("error")))
    for text in place.seen:
        assert text in report.text
    for finding in report.document["findings"]:
        assert finding["severity"] == "ok" or (finding["why"] and finding["mend"])
    assert "user:secret" not in json.dumps(report.document)
    assert report.took_s < 4 * SIX_S


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A memory cgroup of 300 MiB, version 1 or 2."""
    root = Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory").exists() else Path("/sys/fs/cgroup")
    group = root / f"epmesh-doctor-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"no cgroup can be made here: {exc}")
    try:
        limits = [group / name for name in ("memory.limit_in_bytes", "memory.max") if (group / name).exists()]
        if not limits:
            pytest.skip("cgroups here do not limit memory")
        limits[0].write_text(str(300 << 20))
        yield group
    finally:
        group.rmdir()


def test_the_doctor_finds_that_ranks_do_not_fit_into_the_containers_memory(little_memory: Path) -> None:
    enter = f"echo $$ > {little_memory}/cgroup.procs"
    place = Place("little_memory", ("memory-limit",), enter, "--ranks 2")
    report = examine(place)
    assert "memory-limit" in report.causes("error"), report.text
    assert re.search(rf"{little_memory}/memory\S+ is 300 MiB, .* in use; .* 2 ranks take", report.text)


def test_a_service_logs_at_its_start_what_is_wrong_with_it() -> None:
    if why_no_places():
        pytest.skip(why_no_places())
    serve = 'ulimit -n 200; epmesh serve --advertise 127.0.0.1 --coordinator 10.9.0.1:7401 2> "$PLACE/log" &'
    logged = run_there('until grep -q "listens at" "$PLACE/log"; do sleep 0.05; done; cat "$PLACE/log"', serve).stdout
    assert "ERROR epmesh_server.cli.serving: listens-on-loopback: the node listens on 127.0.0.1" in logged
    assert "ERROR epmesh_server.cli.serving: advertised-loopback: the node would advertise 127.0.0.1" in logged
    assert "ERROR epmesh_server.cli.serving: open-files: a process may have 200 descriptors" in logged

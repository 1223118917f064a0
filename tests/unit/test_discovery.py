"""A mesh seen from outside: who is asked, what is believed, and that nothing is left when it is closed."""

from __future__ import annotations

import asyncio
import gc
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import epmesh
from epmesh import InvalidRequest, MeshUnavailable, NotReady, View, channels, view_reader
from tests.processes import eventually
from tests.unit.fake_discovery import WAIT_S, FakeService, view
from tests.unit.silent_proxy import SilentProxy


@pytest.fixture
def service() -> Iterator[FakeService]:
    with FakeService(view(3)) as service:
        yield service


@pytest.fixture
def other() -> Iterator[FakeService]:
    with FakeService(view(3)) as service:
        yield service


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that is bound, so that nobody else takes it, and where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread


def at_epoch(epoch: int) -> Callable[[View], bool]:
    return lambda view: view.epoch == epoch


# Connecting ------------------------------------------------------------------------------------------------------


def test_connect_returns_with_what_the_service_knows(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        assert mesh.view == View.from_proto(view(3))
        assert (mesh.address, mesh.connected, mesh.problems) == (service.address, True, {})
        assert list(mesh.groups) == ["w", "ep"]
        assert mesh.groups["ep"].ranks == (16,)
        assert mesh.placement() is mesh.placement(layer=4) is None
        assert mesh.node_of(16).node_id == "node-2"
        with pytest.raises(InvalidRequest, match="no rank 17 in epoch 3"):
            mesh.node_of(17)
        assert "connected, epoch 3" in repr(mesh)


def test_connect_returns_before_the_first_view_and_wait_view_waits_for_it() -> None:
    with FakeService() as service, epmesh.connect(service.address) as mesh:
        assert mesh.view.epoch == 0
        with pytest.raises(NotReady, match="no view was committed"):
            mesh.wait_view(timeout_s=0.05)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(mesh.wait_view, timeout_s=WAIT_S)
            service.publish(view(1))
            assert waiting.result(WAIT_S).epoch == 1


def test_the_first_address_that_answers_is_used(service: FakeService, other: FakeService, nobody: str) -> None:
    with epmesh.connect([nobody, service.address, other.address]) as mesh:
        assert mesh.address == service.address
        assert "refused" in str(mesh.problems[nobody])
    assert other.asked == 0


def test_when_none_answers_the_error_names_every_address_and_its_problem(nobody: str) -> None:
    with pytest.raises(MeshUnavailable) as caught:
        epmesh.connect([nobody, "late.invalid:7400"], timeout_s=1.0)
    text = str(caught.value)
    assert f"{nobody} (Connection refused)" in text
    assert "late.invalid:7400 (" in text
    assert "1 s" in text


def test_a_service_that_says_nothing_is_left_for_the_next(service: FakeService, monkeypatch: Any) -> None:
    monkeypatch.setattr(view_reader, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with epmesh.connect([address, service.address], timeout_s=WAIT_S) as mesh:
            assert mesh.address == service.address
            assert address in mesh.problems


def test_a_name_that_cannot_be_resolved_yet_is_looked_up_again(service: FakeService, monkeypatch: Any) -> None:
    targets: list[str] = []

    def late(target: str, options: channels.Options, tls: None) -> grpc.Channel:
        targets.append(target)
        return channels.open_channel(service.address if len(targets) > 3 else target, options)

    monkeypatch.setattr(view_reader, "open_channel", late)
    with epmesh.connect("late.invalid:7400", timeout_s=WAIT_S) as mesh:
        assert mesh.address == "late.invalid:7400"
        assert mesh.view.epoch == 3
    assert targets == ["late.invalid:7400"] * 4


@pytest.mark.parametrize("address", ["", "h", "h:0", "http://h:1", [], None, 7400, b"h:1", ["h:1", "h"], [None]])
def test_malformed_addresses_are_refused(address: Any) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        epmesh.connect(address)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), True, "1", None])
def test_a_timeout_that_is_none_is_refused(service: FakeService, timeout_s: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout_s"):
        epmesh.connect(service.address, timeout_s=timeout_s)
    assert service.asked == 0


def test_arguments_of_waits_and_watches_are_checked_at_once(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        with pytest.raises(InvalidRequest, match="timeout_s"):
            mesh.wait_view(timeout_s=0)
        for epoch in (-1, 1.5, None):
            with pytest.raises(InvalidRequest, match="after_epoch"):
                mesh.watch(epoch)  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest, match="after_epoch"):
                mesh.watch_async(epoch)  # type: ignore[arg-type]


# Versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["9.9.0", ""])
def test_services_of_another_version_are_refused_at_once_with_both_named(version: str) -> None:
    with FakeService(view(1), version=version) as service, pytest.raises(InvalidRequest) as caught:
        epmesh.connect(service.address, timeout_s=WAIT_S)
    assert all(part in str(caught.value) for part in (service.address, repr(version), repr(epmesh.__version__)))


def test_one_of_another_version_is_passed_over_where_the_next_fits(service: FakeService) -> None:
    with (
        FakeService(view(9), version="9.9.0") as strange,
        epmesh.connect([strange.address, service.address]) as mesh,
    ):
        assert mesh.address == service.address
        assert mesh.view.epoch == 3
        assert isinstance(mesh.problems[strange.address], InvalidRequest)


def test_what_is_no_discovery_service_is_refused_at_once() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(InvalidRequest, match="UNIMPLEMENTED"):
            epmesh.connect(f"127.0.0.1:{port}", timeout_s=WAIT_S)
    finally:
        server.stop(None).wait()


# Going on --------------------------------------------------------------------------------------------------------


def test_later_views_replace_earlier_ones(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        service.publish(view(4))
        assert mesh.wait_view(at_epoch(4), WAIT_S) is mesh.view


def test_when_a_service_goes_away_the_next_takes_over(service: FakeService, other: FakeService) -> None:
    other.publish(view(5))
    with epmesh.connect([service.address, other.address]) as mesh:
        service.stop()
        mesh.wait_view(at_epoch(5), WAIT_S)
        assert mesh.address == other.address
        assert service.address in mesh.problems
        service.start()
        service.publish(view(6))
        other.stop()
        mesh.wait_view(at_epoch(6), WAIT_S)
        assert mesh.address == service.address


def test_a_service_that_restarts_on_its_port_is_found_again(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        service.stop()
        assert eventually(lambda: not mesh.connected)
        with pytest.raises(MeshUnavailable, match=service.address):
            mesh.wait_view(lambda _: not mesh.connected and mesh.view.epoch > 3, 0.5)
        assert mesh.view.epoch == 3
        assert "reconnecting" in repr(mesh)
        service.view = view(4)
        service.start()
        mesh.wait_view(at_epoch(4), WAIT_S)
        assert "connected" in repr(mesh)
        assert mesh.problems == {}


def test_a_connection_that_falls_silent_is_given_up(service: FakeService, other: FakeService) -> None:
    other.publish(view(5))
    with SilentProxy(service.address) as proxy, epmesh.connect([proxy.address, other.address]) as mesh:
        service.wait(lambda: service.watches)
        proxy.fall_silent()
        mesh.wait_view(at_epoch(5), 10)
        assert mesh.address == other.address


def test_epochs_never_fall_where_the_next_service_lags_behind(service: FakeService, other: FakeService) -> None:
    other.publish(view(2))
    with epmesh.connect([service.address, other.address]) as mesh:
        seen: list[int] = []
        mesh.on_view(lambda view: seen.append(view.epoch))
        service.stop()
        other.wait(lambda: other.watches)
        assert mesh.view.epoch == 3
        other.publish(view(3))
        other.publish(view(7))
        mesh.wait_view(at_epoch(7), WAIT_S)
        assert seen == [7]
    assert (other.watches[0].after_epoch, other.watches[0].mesh_id) == (3, "m")


def test_another_mesh_replaces_the_one_that_is_gone_whatever_its_epoch(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        watch = mesh.watch()
        assert next(watch).epoch == 3
        service.stop()
        service.view = view(1, "another")
        service.start()
        assert (next(watch).mesh_id, mesh.view.epoch) == ("another", 1)
        service.publish(view(3))  # the old one's, again: for whoever runs two meshes at one address
        assert next(watch).mesh_id == "m"


def test_a_service_without_a_view_takes_none_away(service: FakeService) -> None:
    with FakeService() as empty, epmesh.connect([service.address, empty.address]) as mesh:
        service.stop()
        empty.wait(lambda: empty.watches)
        assert mesh.view.epoch == 3


def test_garbage_from_a_service_is_its_problem(service: FakeService, other: FakeService) -> None:
    other.publish(view(5))
    with epmesh.connect([service.address, other.address]) as mesh:
        bad = view(4)
        bad.nodes[0].ranks[0].mode = 77  # type: ignore[assignment]
        service.publish(bad)
        mesh.wait_view(at_epoch(5), WAIT_S)
        assert "mode 77" in str(mesh.problems[service.address])


def test_a_node_that_the_view_names_takes_over_where_no_given_address_is_left(service: FakeService) -> None:
    with FakeService(view(5)) as node, epmesh.connect(service.address) as mesh:
        service.publish(view(4, address=node.address))
        mesh.wait_view(at_epoch(4), WAIT_S)
        service.stop()
        mesh.wait_view(at_epoch(5), WAIT_S)
        assert mesh.address == node.address
        assert list(mesh.problems) == [service.address]
        node.stop()
        service.view = view(6)
        service.start()
        mesh.wait_view(at_epoch(6), WAIT_S)
        assert mesh.address == service.address


@pytest.mark.parametrize("mesh_id", ["another", ""])
def test_a_node_that_the_view_names_is_not_believed_once_it_belongs_elsewhere(
    service: FakeService, mesh_id: str
) -> None:
    with FakeService(view(50, mesh_id)) as node, epmesh.connect(service.address) as mesh:
        service.publish(view(4, address=node.address))
        mesh.wait_view(at_epoch(4), WAIT_S)
        service.stop()
        node.wait(lambda: node.asked >= 2)
        assert (mesh.view.epoch, node.watches) == (4, [])


def test_a_service_that_ends_every_watch_is_not_asked_without_a_pause(service: FakeService) -> None:
    service.ends_watches = True
    began = time.monotonic()
    with epmesh.connect(service.address) as mesh:
        with pytest.raises((NotReady, MeshUnavailable)):
            mesh.wait_view(at_epoch(99), 0.5)
        asked, took_s = service.asked, time.monotonic() - began
        # Pauses of 0.05, 0.1, ... 0.8 s and then 1 s, of which chance takes up to half away.
        assert asked <= 8 + 2 * took_s
        service.ends_watches = False
        service.publish(view(99))
        mesh.wait_view(at_epoch(99), WAIT_S)


# Watching --------------------------------------------------------------------------------------------------------


def test_a_watch_begins_with_the_newest_view_after_the_given_epoch(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        assert next(mesh.watch()).epoch == 3
        assert next(mesh.watch(after_epoch=2)).epoch == 3
        later = mesh.watch(after_epoch=3)
        even_later = mesh.watch(after_epoch=4)
        service.publish(view(4))
        assert next(later).epoch == 4
        service.publish(view(5))
        assert next(even_later).epoch == 5


def test_a_slow_reader_skips_views_and_gets_the_newest(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        watch = mesh.watch()
        assert next(watch).epoch == 3
        for epoch in range(4, 50):
            service.publish(view(epoch))
        mesh.wait_view(at_epoch(49), WAIT_S)
        assert next(watch).epoch == 49


def test_close_ends_every_wait_and_iterator(service: FakeService) -> None:
    async def collect(mesh: epmesh.Mesh) -> list[int]:
        return [view.epoch async for view in mesh.watch_async()]

    with ThreadPoolExecutor(12) as pool:
        mesh = epmesh.connect(service.address)
        started = threading.Barrier(13)

        def run(work: Callable[[], Any]) -> Any:
            started.wait(WAIT_S)
            return work()

        watches = [pool.submit(run, lambda: [view.epoch for view in mesh.watch()]) for _ in range(5)]
        watches += [pool.submit(run, lambda: asyncio.run(collect(mesh))) for _ in range(5)]
        waits = [pool.submit(run, lambda: mesh.wait_view(at_epoch(9), WAIT_S)) for _ in range(2)]
        started.wait(WAIT_S)
        mesh.close()
        mesh.close()
        for each in watches:
            assert each.result(WAIT_S) in ([], [3])  # closed before or after it began
        for wait in waits:
            with pytest.raises(MeshUnavailable, match="closed"):
                wait.result(WAIT_S)
    assert list(mesh.watch()) == []
    assert mesh.view.epoch == 3
    assert not mesh.connected
    with pytest.raises(MeshUnavailable, match="closed"):
        mesh.wait_view(at_epoch(9), 0.1)


def test_async_watches_get_views_and_end_at_close(service: FakeService) -> None:
    async def work() -> list[list[int]]:
        async with await asyncio.to_thread(epmesh.connect, service.address) as mesh:
            first = asyncio.Event()

            async def collect(after_epoch: int = 0) -> list[int]:
                epochs = []
                async for view in mesh.watch_async(after_epoch):
                    epochs.append(view.epoch)
                    first.set()
                    if view.epoch == 5:
                        break
                return epochs

            tasks = [asyncio.create_task(collect()) for _ in range(3)]
            endless = asyncio.create_task(collect(after_epoch=100))
            await first.wait()
            service.publish(view(5))
            collected = await asyncio.gather(*tasks)
        assert await endless == []
        return collected

    assert asyncio.run(asyncio.wait_for(work(), WAIT_S)) == [[3, 5]] * 3


def test_an_event_loop_that_is_gone_disturbs_nobody(service: FakeService) -> None:
    with epmesh.connect(service.address) as mesh:
        loop = asyncio.new_event_loop()
        abandoned = mesh.watch_async()
        assert loop.run_until_complete(anext(abandoned)).epoch == 3
        waiting = asyncio.ensure_future(anext(abandoned), loop=loop)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        service.publish(view(4))
        assert next(mesh.watch(after_epoch=3)).epoch == 4
        assert not waiting.done()
        waiting._log_destroy_pending = False  # type: ignore[attr-defined] # its loop was closed under it, on purpose
        del waiting, abandoned
        gc.collect()


def test_callbacks_get_later_views_until_they_are_taken_back(service: FakeService) -> None:
    first: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
    second: queue.SimpleQueue[int] = queue.SimpleQueue()
    with epmesh.connect(service.address) as mesh:
        take_back = mesh.on_view(lambda view: first.put((threading.current_thread().name, view.epoch)))
        mesh.on_view(lambda view: second.put(view.epoch))
        service.publish(view(4))
        assert second.get(timeout=WAIT_S) == 4
        assert first.get_nowait() == ("epmesh-views", 4)
        take_back()
        take_back()
        service.publish(view(5))
        assert second.get(timeout=WAIT_S) == 5
        assert first.empty()


def test_a_callback_that_fails_is_logged_and_stops_nothing(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(view: View) -> None:
        raise RuntimeError("its own")

    seen: queue.SimpleQueue[int] = queue.SimpleQueue()
    with epmesh.connect(service.address) as mesh:
        mesh.on_view(fail)
        mesh.on_view(lambda view: seen.put(view.epoch))
        service.publish(view(4))
        assert seen.get(timeout=WAIT_S) == 4
        assert mesh.connected
    assert "on_view.failed" in caplog.text
    assert "its own" in caplog.text


# Ending ----------------------------------------------------------------------------------------------------------


def test_a_callback_may_close_the_mesh(service: FakeService) -> None:
    mesh = epmesh.connect(service.address)
    watch = mesh.watch(after_epoch=3)
    mesh.on_view(lambda _: mesh.close())
    service.publish(view(4))
    assert all(view.epoch == 4 for view in watch)  # ends, whoever was first


def test_a_mesh_that_nobody_holds_ends_its_thread(service: FakeService) -> None:
    before = threading.active_count()
    mesh = epmesh.connect(service.address)
    reading = [thread for thread in threading.enumerate() if thread.name == "epmesh-views"]
    assert threading.active_count() > before
    del mesh
    gc.collect()
    for thread in reading:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_closing_leaves_no_descriptor(service: FakeService) -> None:
    epmesh.connect(service.address).close()  # what gRPC keeps for good is there now
    before = connections()
    for _ in range(5):
        epmesh.connect(service.address).close()
    deadline = time.monotonic() + WAIT_S
    while connections() > before:  # gRPC closes them on threads of its own
        assert time.monotonic() < deadline


def connections() -> int:
    return sum(
        link.readlink().name.startswith("socket:") for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


@pytest.mark.parametrize(
    "how",
    [
        "pass",
        "mesh.watch()",
        "del mesh",
        "service_gone()",
        "threading.Thread(target=lambda: list(mesh.watch(99)), daemon=True).start()",
    ],
)
def test_an_interpreter_ends_at_once_with_a_mesh_open(service: FakeService, how: str) -> None:
    code = f"""
import sys, threading, epmesh
mesh = epmesh.connect(sys.argv[1])
def service_gone():
    print("gone", flush=True); sys.stdin.readline()
{how}
"""
    command = [sys.executable, "-W", "error", "-X", "faulthandler", "-c", code, service.address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        if how.startswith("service_gone"):
            assert process.stdout is not None
            assert process.stdout.readline() == "gone\n"
            service.stop()
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert not re.search("Traceback|Exception|Fatal|Warning", errors), errors

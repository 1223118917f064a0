"""Settings of a node service, and the directory of its sockets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from epmesh.errors import InvalidRequest
from epmesh_server.node import NodeSettings
from epmesh_server.node.runtime_dir import runtime_directory


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"port": 70_000}, "port is 70000"),
        ({"port": -1}, "port is -1"),
        ({"buffer_bytes": 0}, "buffer bytes are 0"),
        ({"slot": -2}, "slot is -2"),
        ({"node_id": ""}, "1 to 256 characters"),
        ({"coordinator": "here"}, "coordinator is 'here'"),
        ({"coordinator": "here:no"}, "coordinator is 'here:no'"),
        ({"coordinator": ":7401"}, "coordinator is ':7401'"),
        ({"advertise": "host:99999"}, "advertise is 'host:99999'"),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "10.0.0.1"}, "reachable from other machines"),
        ({"host": "node-7"}, "reachable from other machines"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_with_the_value(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        NodeSettings(**wrong)
    assert said in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert NodeSettings(host=host).host == host


def test_buffers_are_whole_pages() -> None:
    assert NodeSettings(buffer_bytes=1).region_bytes == 4096
    assert NodeSettings(buffer_bytes=8192).region_bytes == 8192
    assert NodeSettings(host="0.0.0.0", insecure=True).region_bytes == 1 << 30


def test_what_killed_nodes_left_is_swept_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old, young, foreign = (tmp_path / f"epmesh-node-{name}" for name in ("old", "young", "foreign"))
    for path in (old, young, foreign):
        path.mkdir(mode=0o700)
    for path in (old, young):
        (path / "lock").touch()
    for path in (old, foreign):
        os.utime(path, (0, 0))
    with runtime_directory(None) as held:
        os.utime(held, (0, 0))
        with runtime_directory(None):
            assert held.exists()
        assert [path.exists() for path in (old, young, foreign)] == [False, True, True]


def test_a_fresh_runtime_directory_is_private_and_goes_away() -> None:
    with runtime_directory(None) as path:
        assert path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


def test_a_runtime_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(InvalidRequest, match="chmod 700"), runtime_directory(tmp_path):
        pass


def test_a_runtime_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="cannot be made"), runtime_directory(tmp_path / "file"):
        pass


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="too long"), runtime_directory(tmp_path / ("d" * 100)):
        pass


def test_a_runtime_directory_is_one_nodes(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with (
        runtime_directory(directory),
        pytest.raises(InvalidRequest, match="in use by another node service"),
        runtime_directory(directory),
    ):
        pass
    with runtime_directory(directory) as path:
        assert path == directory


def test_several_coordinators_stand_with_commas_between() -> None:
    assert NodeSettings(coordinator="a:1,b:2").coordinators == ("a:1", "b:2")
    assert NodeSettings(coordinator="a:1").coordinators == ("a:1",)
    with pytest.raises(InvalidRequest, match="coordinator is ''"):
        NodeSettings(coordinator="a:1,")

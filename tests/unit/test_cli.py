"""The command line without services: options, help, errors, and how a view is shown."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh.placement import Placement
from epmesh.v1 import rank_service_pb2
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View
from epmesh_server.cli import app as app_module
from epmesh_server.cli import main, serving, status
from epmesh_server.cli.app import app
from epmesh_server.cli.health import ready_ranks
from epmesh_server.cli.logs import LogLevel
from epmesh_server.cli.options import parse_size, take_service_links
from epmesh_server.cli.serving import CoordinatorOptions, default_data_dir
from epmesh_server.cli.tables import orphans, ranges, view_as_dict, view_as_tables
from epmesh_server.cli.waits import Waits
from epmesh_server.node import NodeSettings

VIEW = View(
    mesh_id="m",
    epoch=7,
    membership_epoch=5,
    stride=4,
    nodes=(
        NodeInfo(
            0,
            "left",
            1,
            "10.0.0.1:7400",
            (
                RankInfo(0, 1, "cuda:0", RankMode.EXCHANGE, "tcp://10.0.0.1:1"),
                RankInfo(1, 2, "cpu", RankMode.SERVE, ""),
            ),
        ),
        NodeInfo(2, "right", 2, "10.0.0.2:7400"),
    ),
    groups=(GroupInfo("world", 0, (0, 1), (0, 1, 8), sequence=12, completed=11),),
    placements={None: Placement(8, {0: (0, 1, 2, 5), 8: (3, 4)}), 3: Placement(2, {1: (0, 1)})},
)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before[0], before[1]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NodeSettings, CoordinatorOptions | None]]:
    """What `epmesh serve` would have run."""
    calls: list[tuple[NodeSettings, CoordinatorOptions | None]] = []
    monkeypatch.setattr(serving, "serve", lambda settings, beside, hosted: calls.append((settings, beside)))
    return calls


def test_variables_that_kubernetes_makes_of_a_services_name_are_no_options() -> None:
    environment = {"EPMESH_PORT": "tcp://10.96.0.7:7400", "EPMESH_COORDINATOR_PORT": "7411", "PATH": "/bin"}
    assert take_service_links(environment) == {"EPMESH_PORT": "tcp://10.96.0.7:7400"}
    assert environment == {"EPMESH_COORDINATOR_PORT": "7411", "PATH": "/bin"}


def test_a_rank_that_should_serve_and_has_no_front_yet_is_not_ready() -> None:
    assert [ready_ranks(VIEW, incarnation) for incarnation in (1, 2, 3)] == [1, 0, 0]


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)


@pytest.mark.parametrize("command", ["serve", "coordinator", "status", "demo"])
def test_every_command_has_help(command: str) -> None:
    assert command in invoke("--help").output
    assert "Usage" in invoke(command, "--help").output


def test_nothing_but_a_word_is_help_and_a_wrong_option_is_not_a_traceback() -> None:
    assert "Usage" in invoke().output
    assert invoke("serve", "--no-such-thing").exit_code == 2


def test_serve_runs_a_coordinator_beside_it_unless_told_where_one_is(served: list[Any]) -> None:
    invoke("serve", "--port", "0", "--stride", "2")
    (settings, beside) = served.pop()
    assert (settings.host, settings.port, settings.coordinator) == ("127.0.0.1", 0, "127.0.0.1:7401")
    assert (beside.port, beside.stride, beside.min_nodes) == (7401, 2, None)
    invoke("serve", "--coordinator", "10.0.0.9:7401")
    (settings, beside) = served.pop()
    assert (settings.coordinator, beside) == ("10.0.0.9:7401", None)


def test_arguments_win_over_the_environment(served: list[Any]) -> None:
    invoke("serve", "--port", "7500", EPMESH_PORT="7600", EPMESH_NODE_ID="here", EPMESH_BUFFER_BYTES="64MiB")
    settings, _ = served.pop()
    assert (settings.port, settings.node_id, settings.buffer_bytes) == (7500, "here", 64 << 20)


def test_options_of_a_coordinator_that_runs_elsewhere_are_refused(served: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"--stride, --min-nodes: the coordinator at .* has its own"):
        invoke("serve", "--coordinator", "10.0.0.9:7401", "--stride", "2", "--min-nodes", "1")
    invoke(
        "serve", "--coordinator", "10.0.0.9:7401", EPMESH_STRIDE="2"
    )  # the whole fleet may have the same environment
    assert len(served) == 1


def test_an_error_is_one_line_and_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def fail() -> None:
        raise MeshUnavailable("nobody answers at node-7:7400")

    monkeypatch.setattr(app_module, "app", fail)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "epmesh: MeshUnavailable: nobody answers at node-7:7400\n"


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64MiB", 64 << 20), ("1GiB", 1 << 30), ("2g", 2 << 30), (" 8 KiB ", 8192)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.5GiB", "-1", "1TiB", "1 000", "0x10", "²"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="64MiB"):
        parse_size(text)


def test_state_goes_where_the_user_keeps_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_data_dir(7401) == Path("/state/epmesh/coordinator-7401")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_data_dir(7402) == Path("/home/me/.local/state/epmesh/coordinator-7402")


def test_a_coordinator_beside_a_node_gets_every_option_as_an_argument() -> None:
    options = CoordinatorOptions(
        host="127.0.0.1",
        port=7402,
        data_dir=Path("/d"),
        stride=2,
        min_nodes=0,
        tls_dir=Path("/t"),
        insecure=True,
        join_token_file=Path("/j"),
        log_level=LogLevel.DEBUG,
    )
    line = " ".join(options.command())
    for part in (
        "--port 7402",
        "--data-dir /d",
        "--stride 2",
        "--min-nodes 0",
        "--tls-dir /t",
        "--insecure",
        "--join-token-file /j",
        "--log-level debug",
    ):
        assert part in line


def test_a_port_nobody_could_know_is_refused() -> None:
    options = CoordinatorOptions(
        host="127.0.0.1",
        port=0,
        data_dir=None,
        stride=None,
        min_nodes=None,
        tls_dir=None,
        insecure=False,
        join_token_file=None,
        log_level=LogLevel.INFO,
    )
    with pytest.raises(InvalidRequest, match="--coordinator-port is 0"):
        serving.serve(NodeSettings(), options)


# Views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"), [((), "-"), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 2, 3, 9), "0, 2-3, 9")], ids=str
)
def test_numbers_are_shown_as_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text


def test_experts_without_a_living_holder_are_found() -> None:
    placement = VIEW.placement(None)
    assert placement is not None
    assert orphans(VIEW, placement) == [3, 4, 6, 7]


def test_a_table_shows_nodes_ranks_groups_and_what_is_missing() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(view_as_tables(VIEW))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "epoch 7",
        "left",
        "10.0.0.1:7400",
        "cuda:0",
        "exchange",
        "serve",
        "0-2, 5",
        "0-1 of layer 3",
        "right",
    ):
        assert part in shown
    assert "no living rank holds experts 3-4, 6-7" in shown
    world = next(line for line in shown.splitlines() if "world" in line)
    assert world.split() == ["world", "0", "0-1", "8", "12"]


def test_fronts_are_shown_and_what_each_kind_of_rank_lacks() -> None:
    ranks = (
        RankInfo(0, 1, "cpu", RankMode.EXCHANGE, ""),
        RankInfo(1, 2, "cpu", RankMode.SERVE, "", "tcp://10.0.0.1:41235"),
        RankInfo(2, 3, "cpu", RankMode.SERVE, ""),
    )
    placements: dict[int | None, Placement] = {
        None: Placement(4, {0: (0, 1, 2), 1: (0, 3)}),
        3: Placement(2, {0: (0, 1)}),  # no rank that serves has anything of this layer
    }
    view = View("m", 1, 1, 4, (NodeInfo(0, "n", 1, "h:1", ranks),), (), placements)
    console = Console(file=io.StringIO(), width=160)
    console.print(view_as_tables(view))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "10.0.0.1:41235" in shown
    assert "serve (no rows yet)" in shown
    assert "no rank that exchanges holds experts 3\n" in shown.replace(" \n", "\n")
    assert "no rank that serves holds experts 1-2\n" in shown.replace(" \n", "\n")
    assert "layer 3" not in shown[shown.index("no rank") :]
    shown_ranks = view_as_dict(view)["nodes"][0]["ranks"]
    assert [rank["front_endpoint"] for rank in shown_ranks] == ["", "tcp://10.0.0.1:41235", ""]


def wide_view() -> View:
    """Of addresses that do not fit beside each other on a narrow screen."""
    address, endpoint = "accelerator-host-17.example:7400", "tcp://accelerator-host-17.example:41235"
    rank = RankInfo(0, 1, "cuda:0", RankMode.SERVE, "", endpoint)
    placements: dict[int | None, Placement] = {None: Placement(400, {0: tuple(range(0, 400, 2))})}
    return View("m", 1, 1, 4, (NodeInfo(0, "node-17", 1, address, (rank,)),), (), placements)


def test_who_is_waited_for_stands_beside_the_rank_and_nodes_that_did_not_answer_are_named() -> None:
    console = Console(file=io.StringIO(), width=300)
    console.print(view_as_tables(wide_view(), waits=Waits(10.0, {0: 0.374}, silent=("node-18",))))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"node-17 .* 37 % ", shown)
    assert "did not answer for whom their ranks wait: node-18" in shown


@pytest.mark.parametrize("width", [40, 80, 100])
def test_addresses_and_fronts_are_whole_on_a_narrow_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(view_as_tables(wide_view()), crop=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "accelerator-host-17.example:7400" in shown
    assert "accelerator-host-17.example:41235" in shown
    for part in ("slot", "node-17", "rank", "cuda:0", "serve", "experts"):
        assert part in shown


def test_without_a_terminal_a_rank_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(status, "_get_view", lambda *_: wide_view())
    monkeypatch.setattr(status, "_describe", lambda _: None)
    status.show("127.0.0.1:7400", as_json=False, watch=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cuda:0" in line]
    slot, node, address, rank, device, mode, front, _ = line.replace(" (no rows yet)", "").split(maxsplit=7)
    assert (slot, node, rank, device, mode) == ("0", "node-17", "0", "cuda:0", "serve")
    assert (address, front) == ("accelerator-host-17.example:7400", "accelerator-host-17.example:41235")
    assert line.rstrip().endswith(", 398")


def test_many_layers_do_not_flood_the_table() -> None:
    layers: dict[int | None, Placement] = {layer: Placement(1, {0: (0,)}) for layer in range(60)}
    view = View("m", 1, 1, 4, VIEW.nodes, (), layers)
    console = Console(file=io.StringIO(), width=200)
    console.print(view_as_tables(view))
    assert "56 more layers" in console.file.getvalue()  # type: ignore[attr-defined]


def test_json_has_everything_and_survives_a_parser() -> None:
    document = json.loads(json.dumps(view_as_dict(VIEW)))
    assert document["epoch"] == 7
    assert [node["slot"] for node in document["nodes"]] == [0, 2]
    first = document["nodes"][0]["ranks"][0]
    assert (first["rank"], first["device"], first["mode"]) == (0, "cuda:0", "exchange")
    assert first["experts"] == [{"layer": None, "experts": [0, 1, 2, 5]}]
    assert document["placements"][0] == {"layer": None, "num_experts": 8, "experts_without_holder": [3, 4, 6, 7]}
    assert document["groups"][0]["declared_ranks"] == [0, 1, 8]


def test_a_coordinator_out_of_reach_is_said() -> None:
    node = rank_service_pb2.DescribeNodeResponse(node_id="left", coordinator_address="10.0.0.9:7401")
    console = Console(file=io.StringIO(), width=140)
    console.print(view_as_tables(VIEW, node))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the coordinator at 10.0.0.9:7401 is out of reach of left" in shown


@pytest.mark.parametrize(
    ("address", "exposed"), [("10.0.0.2:7400", True), ("node-0:7400", True), ("127.0.0.1:7400", False)]
)
def test_a_mesh_that_anybody_may_join_is_said(address: str, exposed: bool) -> None:
    view = View("m", 1, 1, 8, nodes=(NodeInfo(0, "a", 1, address, ()),))
    shown = []
    for authenticated in (False, True):
        console = Console(file=io.StringIO(), width=140)
        console.print(view_as_tables(view, authenticated=authenticated))
        shown.append(f"nothing authenticates callers at {address}" in console.file.getvalue())  # type: ignore[attr-defined]
    assert shown == [exposed, False]


def test_before_the_first_view_that_is_said() -> None:
    console = Console(file=io.StringIO(), width=140)
    console.print(view_as_tables(View("", 0, 0, 0)))
    assert "no view yet" in console.file.getvalue()  # type: ignore[attr-defined]

"""The demo's parts: its plan, its progress, what it accepts as agreement, and how it looks."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from epmesh import InvalidRequest, NodeInfo, RankInfo, RankMode, View, linear_placement  # noqa: E402
from epmesh_server.cli.demo import run  # noqa: E402
from epmesh_server.cli.demo.plan import DemoPlan, find_checkout  # noqa: E402
from epmesh_server.cli.demo.progress import Progress, ProgressReceiver, ProgressSender, parse  # noqa: E402
from epmesh_server.cli.demo.rank_work import NeededBytes, RankReport  # noqa: E402
from epmesh_server.cli.demo.reference import generate_reference  # noqa: E402
from epmesh_server.cli.demo.router_work import RouterReport  # noqa: E402
from epmesh_server.cli.demo.screen import Screen, one_line  # noqa: E402
from epmesh_server.cli.demo.verdict import (  # noqa: E402
    Latency,
    Reference,
    Tolerance,
    compare,
    longest_chain,
    summarise,
    summarise_routed,
)
from examples import moe_lm  # noqa: E402
from examples.moe_lm.model import Routing  # noqa: E402

PLAN = DemoPlan()
SHAPE = moe_lm.MoeConfig(vocab_size=5, hidden_size=8, num_layers=2, num_heads=2, num_experts=4, expert_size=4)
STEPS = 3


# The plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 2), (1, 3), (4, 4), (1, 1)])
def test_every_prompt_is_one_ranks_share_in_rank_order(nodes: int, ranks_per_node: int) -> None:
    plan = DemoPlan(nodes=nodes, ranks_per_node=ranks_per_node)
    shares = [index for rank in range(plan.world_size) for index in plan.share(rank)]
    assert shares == list(range(len(plan.prompts)))


@pytest.mark.parametrize("num_steps", [0, -1, 201])
def test_more_steps_than_the_context_holds_are_refused(num_steps: int) -> None:
    with pytest.raises(InvalidRequest, match=str(num_steps)):
        DemoPlan(num_steps=num_steps)


def test_an_installation_without_the_model_says_where_to_find_it(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "epmesh_server"
    with pytest.raises(InvalidRequest, match="make demo"):
        find_checkout(package)
    assert (find_checkout() / "examples" / "moe_lm").is_dir()


def test_the_demo_fails_in_one_line_where_there_is_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "find_checkout", lambda: find_checkout(tmp_path / "lib" / "epmesh_server"))
    out = io.StringIO()
    assert run.run_demo(console=Console(file=out, width=80)) == 1
    first, *_, last = out.getvalue().splitlines()
    assert first.startswith("epmesh demo: InvalidRequest: ")
    assert last == "demo: FAIL"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small layers: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(one_thread: None) -> Reference:
    """What one process generates with the demo's defaults."""
    return generate_reference(find_checkout(), PLAN)[0]


def whole_texts(reference: Reference) -> list[Tensor]:
    prompts = moe_lm.encode_prompts(moe_lm.load_tokenizer(), PLAN.prompts)
    return [torch.tensor([prompt + row]) for prompt, row in zip(prompts, reference.tokens.tolist(), strict=True)]


def tolerance_of(reference: Reference) -> float:
    chain = longest_chain(moe_lm.load_config(), reference.length)
    return Tolerance(chain, reference.logits.abs().max().item()).value


def test_no_choice_of_a_token_is_a_near_tie(reference: Reference) -> None:
    """Otherwise rounding could change the text on another machine: choose another `first_seed` then."""
    generators = [torch.Generator().manual_seed(seed) for seed in PLAN.seeds(range(len(PLAN.prompts)))]
    for logits in reference.logits.unbind(dim=1):
        draws = torch.stack([torch.rand(logits.shape[1], dtype=torch.float64, generator=g) for g in generators])
        best, second = (logits.double() / PLAN.temperature - (-draws.log()).log()).topk(2, dim=-1).values.unbind(-1)
        assert (best - second).min() * PLAN.temperature > 4 * tolerance_of(reference)


def test_no_choice_of_an_expert_is_a_near_tie(reference: Reference) -> None:
    model = moe_lm.load()
    for text in whole_texts(reference):
        routings: list[Routing] = []
        with torch.inference_mode():
            model(text, routings=routings)
        for routing in routings:
            ordered = routing.probabilities.topk(model.config.num_topk + 1, dim=-1).values
            assert (ordered[:, -2] - ordered[:, -1]).min() > 1e-5  # rounding moves a probability by about 1e-6


def largest_change(model: moe_lm.MoeLanguageModel, text: Tensor) -> float:
    with torch.inference_mode():
        return float((model(text) - moe_lm.load()(text)).abs().max())


def test_an_expert_left_out_is_far_beyond_the_tolerance(reference: Reference) -> None:
    text, routings = whole_texts(reference)[0], list[Routing]()
    model = moe_lm.load()
    model(text, routings=routings)
    for layer, routing in zip(model.layers, routings, strict=True):
        whole = layer.experts
        keep = [expert for expert in whole.expert_ids if expert != int(routing.topk_ids[-1, -1])]
        layer.experts = moe_lm.Experts(keep, whole.up.data[keep], whole.down.data[keep])
        assert largest_change(model, text) > 100 * tolerance_of(reference)
        layer.experts = whole


class RoundingExperts(moe_lm.LocalExperts):
    """Rows lose bits on the way."""

    def forward(self, layer: int, hidden_states: Tensor, *rest: Tensor | moe_lm.Experts) -> Tensor:
        return super().forward(layer, hidden_states.bfloat16().float(), *rest)  # type: ignore[arg-type]


def test_rows_rounded_on_the_way_are_beyond_the_tolerance(reference: Reference) -> None:
    model = moe_lm.load(backend=RoundingExperts())
    assert largest_change(model, whole_texts(reference)[0]) > 10 * tolerance_of(reference)


# Progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[ProgressReceiver]:
    with ProgressReceiver() as receiver:
        yield receiver


def test_progress_arrives_as_it_was_sent(receiver: ProgressReceiver) -> None:
    sender = ProgressSender(receiver.path)
    sender.send({2: [7, 8], 3: []})
    sender.send({2: [7, 8, 9], 3: [1]})
    assert receiver.receive(5.0) == [{2: [7, 8], 3: []}, {2: [7, 8, 9], 3: [1]}]
    assert receiver.receive(0.0) == []
    sender.close()


def test_a_rank_does_not_wait_for_a_display_that_does_not_read(receiver: ProgressReceiver) -> None:
    sender = ProgressSender(receiver.path)
    for _ in range(5000):
        sender.send({0: list(range(100))})
    assert receiver.receive(5.0)[0] == {0: list(range(100))}
    sender.close()


def test_a_rank_goes_on_when_the_display_is_gone() -> None:
    with ProgressReceiver() as receiver:
        path = receiver.path
    sender = ProgressSender(path)
    sender.send({0: [1]})
    sender.close()
    assert not Path(path).parent.exists()


def test_the_socket_is_this_users_alone(receiver: ProgressReceiver) -> None:
    assert Path(receiver.path).parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "datagram", [b"", b"\xff", b"[]", b"3", b'{"x": [1]}', b'{"0": 1}', b'{"0": ["y"]}', b'{"0": [null]}', b"[" * 9999]
)
def test_what_is_no_progress_is_left_out(datagram: bytes) -> None:
    assert parse(datagram) is None


def test_older_news_and_unknown_prompts_change_nothing() -> None:
    progress = Progress(2)
    progress.update({0: [1, 2], 1: [3]}, now=1.0)
    progress.update({0: [1], 5: [1, 2, 3], -1: [4]}, now=2.0)
    assert progress.tokens == [[1, 2], [3]]
    assert progress.tokens_per_s == 0.0
    progress.update({0: [1, 2, 3, 4, 5]}, now=3.0)
    assert progress.tokens_per_s == pytest.approx(3 / 2)


# The verdict ----------------------------------------------------------------------------------------------------


def make_reference() -> Reference:
    logits = torch.arange(4.0 * STEPS * 5).reshape(4, STEPS, 5)
    return Reference(torch.arange(4 * STEPS).reshape(4, STEPS), logits, length=9, elapsed_s=2.0)


def make_reports(reference: Reference) -> list[RankReport]:
    """Of four ranks that made one text each, and no mistake."""
    calls = (0.002,) * (STEPS * SHAPE.num_layers)
    return [
        RankReport(
            rank=rank,
            slot=rank // 2,
            prompts=range(rank, rank + 1),
            held=((rank,),) * SHAPE.num_layers,
            tokens=reference.tokens[rank : rank + 1].clone(),
            logits=reference.logits[rank : rank + 1].clone(),
            dispatch_s=calls,
            combine_s=calls,
            bytes_sent=120,
            floor_bytes=(90, 110, 100, 100)[rank],  # sums back count where they are formed
            needed_bytes=100,
            started_at=10.0 + rank,
            ended_at=20.0 - rank,
        )
        for rank in range(4)
    ]


def test_a_run_without_mistakes_passes_with_its_figures() -> None:
    summary = summarise(make_reports(make_reference()), make_reference(), SHAPE)
    assert summary.passed
    assert (summary.bytes_sent, summary.floor_bytes, summary.num_tokens) == (480, 400, 12)
    assert (summary.tokens_per_s, summary.reference_tokens_per_s) == (1.2, 6.0)
    assert dict(summary.latencies)["dispatch, a layer"] == Latency(2.0, 2.0, 24)
    assert summary.agreement.largest_difference == 0.0
    assert "4 ranks on 2 nodes, each with 1 of the 4 experts" in summary.proven


def test_logits_may_differ_by_the_tolerance_and_no_more() -> None:
    reference, reports = make_reference(), make_reports(make_reference())
    tolerance = summarise(reports, reference, SHAPE).tolerance
    reports[1].logits[0, 2, 3] += tolerance * 0.9
    assert summarise(reports, reference, SHAPE).passed
    reports[1].logits[0, 2, 3] += tolerance * 0.3
    (failure,) = summarise(reports, reference, SHAPE).failures
    assert "a logit differs by" in failure


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_no_number_fails(value: float) -> None:
    reports = make_reports(make_reference())
    reports[3].logits[0, 0, 0] = value
    assert not summarise(reports, make_reference(), SHAPE).passed


def test_a_differing_token_fails_and_is_named() -> None:
    reports = make_reports(make_reference())
    reports[2].tokens[0, 1] = 99
    (failure,) = summarise(reports, make_reference(), SHAPE).failures
    assert failure == "1 of 4 texts differ, first that of prompt 3 in its token 2"


def test_logits_behind_a_differing_token_are_not_compared() -> None:
    reference = make_reference()
    tokens, logits = reference.tokens.clone(), reference.logits.clone()
    tokens[2, 1] = 99
    logits[2, 2] += 1000.0  # another input, so another output
    agreement = compare(tokens, logits, reference)
    assert (agreement.largest_difference, agreement.num_compared) == (0.0, (4 * STEPS - 1) * 5)
    assert (agreement.num_same, agreement.first_difference) == (3, (2, 1))
    logits[2, 1] += 1.0  # what the differing token was chosen from
    assert compare(tokens, logits, reference).largest_difference == 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held": ((0,), (0, 1))}, "layer 1"),
        ({"held": ((), (0,))}, "layer 0"),
        ({"dispatch_s": (0.1,)}, "rank 0 made 1 dispatches"),
        ({"combine_s": ()}, "0 combines"),
        ({"bytes_sent": 30}, "390 bytes went between the nodes; the rows need 400"),
        ({"floor_bytes": 91}, "counts a floor of 401"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_did_not_go_as_it_says_fails(change: dict[str, object], words: str) -> None:
    first, *others = make_reports(make_reference())
    (failure,) = summarise([replace(first, **change), *others], make_reference(), SHAPE).failures  # type: ignore[arg-type]
    assert words in failure


def make_view(**modes: RankMode) -> View:
    """Two nodes with two ranks each; all serve, and hold an expert each."""
    ranks = [RankInfo(rank, 1, "cpu", modes.get(f"rank{rank}", RankMode.SERVE), "", "tcp://h:1") for rank in range(4)]
    nodes = tuple(NodeInfo(slot, f"n{slot}", 1, "", tuple(ranks[2 * slot : 2 * slot + 2])) for slot in range(2))
    return View("m", 1, 1, 2, nodes, placements={None: linear_placement(4, [0, 1, 2, 3])})


def make_routed_reports(reference: Reference) -> list[RouterReport]:
    """Of two routers that made two texts each, and no mistake."""
    return [
        RouterReport(
            router=router,
            prompts=range(2 * router, 2 * router + 2),
            held=((),) * SHAPE.num_layers,
            tokens=reference.tokens[2 * router : 2 * router + 2].clone(),
            logits=reference.logits[2 * router : 2 * router + 2].clone(),
            forward_s=(0.003,) * (STEPS * SHAPE.num_layers),
            bytes_moved=210,
            floor_bytes=200,
            needed_bytes=200,
            started_at=10.0,
            ended_at=20.0,
        )
        for router in range(2)
    ]


def test_routers_without_mistakes_pass_with_their_figures() -> None:
    summary = summarise_routed(make_routed_reports(make_reference()), make_view(), make_reference(), SHAPE)
    assert summary.passed
    assert (summary.bytes_sent, summary.floor_bytes, summary.num_tokens) == (420, 400, 12)
    assert summary.latencies == (("forward, a layer", Latency(3.0, 3.0, 12)),)
    assert "4 ranks that 2 nodes host" in summary.proven


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"held": ((), (3,))}, "router 0 loaded experts"),
        ({"forward_s": (0.1,)}, "router 0 made 1 forwards, not 6"),
        ({"bytes_moved": 100}, "310 bytes went to the nodes and back; the rows need 400"),
        ({"floor_bytes": 199}, "count a floor of 399"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_routers_that_did_not_do_as_it_says_fail(change: dict[str, object], words: str) -> None:
    first, second = make_routed_reports(make_reference())
    changed = [replace(first, **change), second]  # type: ignore[arg-type]
    (failure,) = summarise_routed(changed, make_view(), make_reference(), SHAPE).failures
    assert words in failure


def test_experts_that_no_rank_serves_fail_the_second_act() -> None:
    view = make_view(rank2=RankMode.EXCHANGE)
    (failure,) = summarise_routed(make_routed_reports(make_reference()), view, make_reference(), SHAPE).failures
    assert failure == "serving ranks hold experts [0, 1, 3], not each of 4 once"


def test_only_logits_of_tokens_are_compared() -> None:
    reference = make_reference()
    reference.tokens[1, 2] = -1  # that text has ended
    assert compare(reference.tokens, reference.logits, reference).num_compared == (4 * STEPS - 1) * 5


def test_needed_bytes_are_a_row_there_and_a_sum_back_for_each_other_node() -> None:
    placement = linear_placement(6, [0, 1, 2])  # two experts a rank
    nodes = tuple(NodeInfo(slot, f"n{slot}", 1, "") for slot in range(3))
    view = View("m", epoch=1, membership_epoch=1, stride=1, nodes=nodes, placements={None: placement})
    needed = NeededBytes(view, home=1)
    ids = torch.tensor([[2, 3], [0, 1], [0, 5], [4, 3]])  # at home; one other node; two; one
    needed.add(torch.zeros(4, 7), torch.zeros(4, 2), ids)
    assert needed.num_bytes == 4 * (2 * 7 * 4 + 2 * 4 + 2 * 8)
    routed = NeededBytes(view, home=None)
    routed.add(torch.zeros(4, 7), torch.zeros(4, 2), ids)
    assert routed.num_bytes == 6 * (2 * 7 * 4 + 2 * 4 + 2 * 8)


def test_latency_without_calls_is_zero() -> None:
    assert Latency.of([]) == Latency(0.0, 0.0, 0)
    assert Latency.of([0.001] * 99 + [1.0]).median_ms == pytest.approx(1.0)


# How it looks ---------------------------------------------------------------------------------------------------


def shown(plan: DemoPlan, *, terminal: bool = False, width: int = 80, height: int = 24) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, width=width, height=height, force_terminal=terminal, force_interactive=terminal, highlight=False
    )
    return Screen(console, plan), out


def decode(tokens: object) -> str:
    return "".join(f" word{token}" for token in tokens)  # type: ignore[attr-defined]


def test_plain_progress_is_a_line_now_and_then() -> None:
    screen, out = shown(PLAN)
    progress = Progress(len(PLAN.prompts))
    with screen.generating(decode, owner) as show:
        for step in range(1, PLAN.num_steps + 1):
            progress.update({prompt: list(range(step)) for prompt in range(len(PLAN.prompts))}, now=float(step))
            show(progress)
    lines = out.getvalue().splitlines()
    assert len(lines) == 8
    assert lines[-1].startswith("512/512 tokens      8 tokens/s  rank 0: ..")
    assert all(len(line) <= 80 for line in lines)


def owner(prompt: int) -> str:
    return f"rank {prompt // 2}"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (30, 10), (200, 60)])
def test_the_live_display_fits_the_terminal(width: int, height: int) -> None:
    screen, out = shown(PLAN, terminal=True, width=width, height=height)
    progress = Progress(len(PLAN.prompts))
    progress.update({prompt: list(range(200)) for prompt in range(len(PLAN.prompts))}, now=1.0)
    with screen.generating(decode, owner) as show:
        show(progress)
        frame = out.getvalue()
    assert frame.count("\n") < height
    assert "rank 3" in frame


def test_generated_text_cannot_steer_the_terminal() -> None:
    assert one_line(" a\x1b[2J\nb \n c\x07\u202e") == " a?[2J / b / c??"


@pytest.mark.parametrize("terminal", [False, True])
def test_the_verdict_is_the_last_line(terminal: bool) -> None:
    reports = make_reports(make_reference())
    screen, out = shown(PLAN, terminal=terminal, width=100)
    screen.summary(summarise(reports, make_reference(), SHAPE))
    assert "demo: PASS" in out.getvalue().splitlines()[-1]
    reports[0].tokens[0, 0] = 99
    screen.summary(summarise(reports, make_reference(), SHAPE))
    *_, failure, last = out.getvalue().splitlines()
    assert "demo: FAIL" in last
    assert "1 of 4 texts differ" in failure


def test_the_summary_has_every_figure() -> None:
    screen, out = shown(PLAN, width=120)
    screen.summary(summarise(make_reports(make_reference()), make_reference(), SHAPE))
    for words in (
        "median 2.0 ms, p99 2.0 ms",
        "480",
        "floor 400, ratio 1.200",
        "4 of 4 the same",
        "difference 0.0e+00",
    ):
        assert words in out.getvalue()

"""How the demo looks: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from epmesh_server.cli.demo.plan import DemoPlan
from epmesh_server.cli.demo.progress import Progress
from epmesh_server.cli.tables import ranges

if TYPE_CHECKING:
    from epmesh.view import View
    from epmesh_server.cli.demo.verdict import Latency, Summary

Decode = Callable[[Sequence[int]], str]
Owner = Callable[[int], str]
"""Who continues a prompt: "rank 2", "router 0"."""
Show = Callable[[Progress], None]

_PLAIN_WIDTH = 120
_PLAIN_LINES = 8  # progress lines of a whole run
_PLAIN_TAIL = 60  # characters of text in one
_AROUND = 5  # lines of the live display that are no text
_BAR_WIDTH = 32
_LABEL_WIDTH = 9


def make_console() -> Console:
    """A console on stdout; what is no terminal that redraws is taken to be wide enough for the tables."""
    console = Console(highlight=False, markup=False, soft_wrap=False)
    return console if console.is_interactive else Console(highlight=False, markup=False, width=_PLAIN_WIDTH)


class Screen:
    """Everything the demo says, in the order of the methods."""

    def __init__(self, console: Console, plan: DemoPlan) -> None:
        self._console = console
        self._plan = plan

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Says what is going on while it goes on."""
        if self._console.is_interactive:
            with self._console.status(Text(text)):
                yield
        else:
            self._console.print(f"{text} ...")
            yield

    def act(self, title: str) -> None:
        """Says which act begins."""
        self._console.rule(Text(title, "bold"), align="left", characters="-")

    def mesh(self, view: View, what: str) -> None:
        """Says who is in the mesh, which experts each rank holds, and `what` comes now."""
        table = Table.grid(padding=(0, 2))
        placement = view.placement(None)
        for node in view.nodes:
            cells = [
                f"rank {info.rank}: experts {ranges(placement.experts_of.get(info.rank, ()))}" if placement else ""
                for info in node.ranks
            ]
            table.add_row(Text(f"node {node.slot}", "bold"), Text(node.address, "dim"), *cells)
        self._console.print(table)
        self._console.print(Text(f"{what}\n", "dim"))

    @contextlib.contextmanager
    def generating(self, decode: Decode, owner: Owner) -> Iterator[Show]:
        """Shows text and speed while somebody generates; the yielded function takes the newest progress."""
        if not self._console.is_interactive:
            yield _PlainProgress(self._console, self._plan, decode, owner).show
            return
        display = _LiveProgress(self._plan, decode, owner)
        with Live(console=self._console, transient=True, auto_refresh=False, vertical_overflow="crop") as live:
            yield lambda progress: live.update(display.frame(progress, self._console), refresh=True)

    def texts(self, texts: Sequence[str], owner: Owner) -> None:
        """Prints what was generated after each prompt, whole."""
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_LABEL_WIDTH)
        for index, text in enumerate(texts):
            table.add_row(Text(owner(index), "dim"), _entry(self._plan.prompts[index], text))
        self._console.print(table)

    def summary(self, *acts: Summary) -> None:
        """Prints the figures of every act, what they show, and the verdict."""
        for number, act in enumerate(acts, 1):
            self._console.print(_figures(act, f"act {number}" if len(acts) > 1 else ""))
        for note in _notes(acts[0], self._plan):
            self._console.print(Text(note, "dim"))
        self._console.print()
        for act in acts:
            if act.passed:
                self._console.print(Text.assemble(("Proven: ", "bold"), act.proven))
        for failure in (failure for act in acts for failure in act.failures):
            self._console.print(Text.assemble(("Not as it must be: ", "bold red"), failure))
        self._verdict(all(act.passed for act in acts))

    def failed(self, *reasons: str) -> None:
        """Says why there is no result, a line each."""
        for reason in reasons:
            self._console.print(Text(f"epmesh demo: {reason}", "red"), soft_wrap=True)
        self._verdict(passed=False)

    def _verdict(self, passed: bool) -> None:
        self._console.print(Text(f"demo: {'PASS' if passed else 'FAIL'}", "bold green" if passed else "bold red"))


def one_line(text: str) -> str:
    """Generated text as one printable line: breaks become slashes, what no terminal should get a question mark."""
    joined = re.sub(r"\s*\n\s*", " / ", text)
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in joined)


class _PlainProgress:
    """A line now and then: how far, how fast, and the end of one text."""

    def __init__(self, console: Console, plan: DemoPlan, decode: Decode, owner: Owner) -> None:
        self._console, self._plan, self._decode, self._owner = console, plan, decode, owner
        self._shown = 0

    def show(self, progress: Progress) -> None:
        """Prints a line if enough was generated since the last one."""
        done = progress.num_tokens * _PLAIN_LINES // self._plan.num_tokens
        if done <= self._shown:
            return
        self._shown = done
        index = done % len(self._plan.prompts)
        tail = one_line(self._decode(progress.tokens[index]))[-_PLAIN_TAIL:]
        width = len(str(self._plan.num_tokens))
        self._console.print(
            f"{progress.num_tokens:{width}}/{self._plan.num_tokens} tokens  {_rate(progress)}"
            f"  {self._owner(index)}: ..{tail}",
            overflow="ellipsis",
            no_wrap=True,
        )


class _LiveProgress:
    """All texts as they grow, as much of each as fits, over a bar."""

    def __init__(self, plan: DemoPlan, decode: Decode, owner: Owner) -> None:
        self._plan, self._decode, self._owner = plan, decode, owner

    def frame(self, progress: Progress, console: Console) -> RenderableType:
        """The display for the console's present size."""
        width = max(16, console.width - _LABEL_WIDTH - 1)
        lines = max(1, (console.height - _AROUND) // len(self._plan.prompts))
        table = Table.grid(padding=(0, 1))
        table.add_column(width=_LABEL_WIDTH)
        for index, tokens in enumerate(progress.tokens):
            # Lines break at words: about one in ten of their characters stays empty.
            entry = _shortened(self._plan.prompts[index], self._decode(tokens), width * lines * 9 // 10)
            table.add_row(Text(self._owner(index), "dim"), entry)
        bar = Table.grid(padding=(0, 2))
        total = self._plan.num_tokens
        bar.add_row(
            ProgressBar(total, progress.num_tokens, width=_BAR_WIDTH),
            f"{progress.num_tokens}/{total} tokens",
            Text(_rate(progress), "bold cyan"),
        )
        return Group(table, "", bar)


def _entry(prompt: str, text: str) -> Text:
    return Text.assemble((prompt, "bold"), one_line(text))


def _shortened(prompt: str, text: str, budget: int) -> Text:
    line = one_line(text)
    if len(prompt) + len(line) <= budget:
        return _entry(prompt, text)
    return Text(f"... {line[-(budget - 4) :].lstrip()}")


def _rate(progress: Progress) -> str:
    return f"{progress.tokens_per_s:5.0f} tokens/s"


def _figures(summary: Summary, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (title, "mesh", "beside it"):
        table.add_column(name, overflow="fold")
    for name, measured, beside in (*_cost_rows(summary), *_agreement_rows(summary)):
        table.add_row(name, Text(measured, "bold"), beside)
    return table


def _cost_rows(summary: Summary) -> Iterator[tuple[str, str, str]]:
    for name, latency in summary.latencies:
        calls = f"{latency.num_calls:,} calls: {summary.callers}, each layer of each step"
        yield name, _latency(latency), calls
    ratio = summary.bytes_sent / summary.floor_bytes if summary.floor_bytes else math.nan
    yield summary.bytes_name, f"{summary.bytes_sent:,}", f"floor {summary.floor_bytes:,}, ratio {ratio:.3f} (1)"
    beside = f"{summary.reference_tokens_per_s:,.0f} in one process on one core"
    yield "tokens/s", f"{summary.tokens_per_s:,.0f}", beside


def _agreement_rows(summary: Summary) -> Iterator[tuple[str, str, str]]:
    agreement = summary.agreement
    same = f"{agreement.num_same} of {agreement.num_texts} the same"
    yield "text", same, f"as in one process; {summary.num_tokens:,} tokens"
    difference = f"largest difference {agreement.largest_difference:.1e}"
    yield "logits", difference, f"tolerance {summary.tolerance:.1e} (2); {agreement.num_compared:,} compared"


def _latency(latency: Latency) -> str:
    return f"median {latency.median_ms:.1f} ms, p99 {latency.p99_ms:.1f} ms"


def _notes(summary: Summary, plan: DemoPlan) -> Iterator[str]:
    rows = math.ceil(len(plan.prompts) / plan.world_size)
    yield (
        "(1) In act 1 what dispatch and combine hand to the sockets between nodes, on all ranks, headers included; they"
        f" weigh, as a rank has {rows} rows in most steps. In act 2 tensors to and from all nodes, as a router is on"
        " none; with each id goes a byte that says which rank it is for. Floor: each row, its weights and ids once to"
        " each node that holds one of its experts, and one sum back, counted from what the model's router chose."
    )
    yield (
        f"(2) sqrt({summary.num_roundings:,} operations behind a logit) x 2^-23, fp32's step, x"
        f" {summary.agreement.largest_logit:.1f}, the largest logit. Experts sit elsewhere, so sums are formed in"
        " another order; nothing else may differ."
    )

"""`epmesh doctor`: what is wrong with this host for a node, and what mends it."""

from __future__ import annotations

import dataclasses
import enum
import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from epmesh_server.doctor import Asked, Facts, Finding, Severity, find_out, judge

_WORDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.OK: "ok"}
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.OK: "green"}
_NO_TERMINAL_WIDTH = 120


def examine(asked: Asked, *, as_json: bool) -> int:
    """Looks, prints, and returns the exit code: 1 where there are errors."""
    facts = find_out(asked)
    findings = judge(asked, facts)
    if as_json:
        print(json.dumps(_as_dict(facts, findings), indent=2))
    else:
        width = None if sys.stdout.isatty() else _NO_TERMINAL_WIDTH
        Console(width=width, highlight=False).print(_as_text(findings))
    return int(_count(findings, Severity.ERROR) > 0)


def _as_text(findings: tuple[Finding, ...]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for finding in findings:
        style = _STYLES[finding.severity]
        table.add_row(Text(_WORDS[finding.severity], style), finding.cause, Text(finding.seen))
    parts: list[RenderableType] = [table]
    for number, finding in enumerate((found for found in findings if found.mend), 1):
        parts.append(Text(f"{number}. {finding.cause}", _STYLES[finding.severity]))
        parts.append(Padding(Text(finding.why), (0, 0, 0, 3)))
        parts.append(Padding(Text.assemble(("Mend: ", "bold"), finding.mend), (0, 0, 1, 3)))
    return Group(*parts, _verdict(findings))


def _verdict(findings: tuple[Finding, ...]) -> Text:
    errors, warnings = _count(findings, Severity.ERROR), _count(findings, Severity.WARNING)
    worst = findings[0].severity if findings else Severity.OK
    return Text(f"doctor: {_number(errors, 'error')}, {_number(warnings, 'warning')}", _STYLES[worst])


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _count(findings: tuple[Finding, ...], severity: Severity) -> int:
    return sum(finding.severity is severity for finding in findings)


def _as_dict(facts: Facts, findings: tuple[Finding, ...]) -> dict[str, Any]:
    return {
        "errors": _count(findings, Severity.ERROR),
        "warnings": _count(findings, Severity.WARNING),
        "findings": [{**dataclasses.asdict(finding), "severity": _WORDS[finding.severity]} for finding in findings],
        "facts": _plain(dataclasses.asdict(facts)),
    }


def _plain(value: Any) -> Any:
    """`value` as JSON knows it."""
    match value:
        case enum.Enum():
            return value.value
        case Path():
            return str(value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
    return value

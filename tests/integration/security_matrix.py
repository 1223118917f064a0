"""What was tried against a secured mesh, on which plane, and what it was refused with: a table after the last test."""

from __future__ import annotations

ROWS: list[tuple[str, str, str]] = []
_TITLE = ("attempt", "plane", "refused with")


def record(attempt: str, plane: str, refused_with: str) -> None:
    """Notes one attempt that was refused, once its test has seen that."""
    ROWS.append((attempt, plane, " ".join(refused_with.split())))


def table() -> list[str]:
    """The lines of the table, by plane; none where nothing was tried."""
    rows = [_TITLE, *sorted(set(ROWS), key=lambda row: (row[1], row[0]))] if ROWS else []
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    return [f"{attempt:{widths[0]}}  {plane:{widths[1]}}  {refused_with}" for attempt, plane, refused_with in rows]

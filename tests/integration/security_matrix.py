"""What was tried against a secured mesh, on which plane, and what it was refused with: for a table to print."""

from __future__ import annotations

ROWS: list[tuple[str, str, str]] = []


def record(attempt: str, plane: str, refused_with: str) -> None:
    """Notes one attempt that was refused, once its test has seen that."""
    ROWS.append((attempt, plane, refused_with))

"""What the doctor found: one fact that is right, doubtful or wrong, and then why that matters and what mends it."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Severity(enum.IntEnum):
    """How bad a finding is."""

    OK = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        cause: short name that stays the same, such as ``hostname-loopback``; the page on the doctor lists them.
        severity: an error keeps a node from working with the others; a warning may, or will cost something.
        seen: what was found, with the value.
        why: what goes wrong for it; empty where all is well.
        mend: the option, command, compose or Kubernetes key that mends it; empty where all is well.
    """

    cause: str
    severity: Severity
    seen: str
    why: str = ""
    mend: str = ""


def ok(cause: str, seen: str) -> Finding:
    """All is well."""
    return Finding(cause, Severity.OK, seen)


def warning(cause: str, seen: str, why: str, mend: str) -> Finding:
    """It may go wrong, or costs something."""
    return Finding(cause, Severity.WARNING, seen, why, mend)


def error(cause: str, seen: str, why: str, mend: str) -> Finding:
    """It will go wrong."""
    return Finding(cause, Severity.ERROR, seen, why, mend)

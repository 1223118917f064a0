"""Versions: which of two processes of a mesh may work together."""

from __future__ import annotations

from epmesh.errors import InvalidRequest

VERSION = "0.1.0"
"""Version of this package."""


def check_compatible(ours: str, theirs: str, who: str, *, here: str = "this process") -> None:
    """Nothing where `ours` and `theirs` have the same major and minor version; an empty one fits none.

    Args:
        who: has the version `theirs`, such as ``node service at 127.0.0.1:7400``; for the error's text.
        here: has the version `ours`.

    Raises:
        InvalidRequest: the versions differ; both are named.
    """
    if _major_minor(ours) != _major_minor(theirs):
        raise InvalidRequest(
            f"{who} has epmesh {theirs!r}, {here} {ours!r}; "
            f"major and minor version must be the same: install one of the two on both"
        )


def _major_minor(version: str) -> list[str]:
    return version.split(".")[:2]

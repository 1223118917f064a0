"""docs/api.md is what the docstrings say, and everything public has one."""

from __future__ import annotations

import ast

import epmesh
import epmesh.testing
from docs import generate_api


def test_the_page_is_what_the_docstrings_say() -> None:
    assert generate_api.PAGE.read_text() == generate_api.page(), "run `make docs` and commit docs/api.md"


def test_every_public_name_has_a_section() -> None:
    lines = generate_api.page().splitlines()
    names = [f"epmesh.{name}" for name in epmesh.__all__]
    names += [f"epmesh.testing.{name}" for name in epmesh.testing.__all__]
    assert [name for name in names if f"### {name}" not in lines] == []


def test_everything_public_has_a_docstring() -> None:
    without = []
    public = {item.name for item in generate_api.items()}
    for item in generate_api.items():
        without += [] if item.docstring else [item.name]
        for member in generate_api.members(item, public):
            without += [] if ast.get_docstring(member) else [f"{item.name}.{member.name}"]
    assert without == []


def test_inherited_members_stand_where_their_base_is_not_public() -> None:
    page = generate_api.page()
    assert "#### EpmeshError.to_proto" in page
    assert "#### PeerLost.to_proto" not in page


def test_signatures_are_written_as_in_the_source_without_self() -> None:
    page = generate_api.page()
    assert "    timeout_s: float = 10.0,\n    tls: Tls | None = None,\n) -> Mesh\n" in page
    assert "def wait_view(accept: Callable[[View], bool] | None = None, timeout_s: float = 10.0) -> View\n" in page
    assert "self" not in [line.strip(" ,") for line in page.splitlines()]


def test_sections_become_lists_and_literal_blocks_code() -> None:
    docstring = """Does ``this``.

Use it so::

    a()
        b()

Args:
    one, two: first line
        and its second.
    three: alone.

Returns:
    What: it is.
"""
    assert generate_api.text(docstring) == (
        "Does `this`.\n\nUse it so:\n\n```python\na()\n    b()\n```\n\n"
        "**Args**\n\n- `one`, `two`: first line and its second.\n- `three`: alone.\n\n"
        "**Returns**\n\nWhat: it is.\n"
    )

"""What the pages say of the code is so: links lead somewhere, tables are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from epmesh import errors, frames
from epmesh.v1 import error_pb2, frame_pb2
from epmesh_server.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")])
WIRE = (ROOT / "docs" / "wire.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_page_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)]+\.md)\)", (ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= linked


def test_wire_page_has_the_error_table_of_the_code() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| `(\w+)` \| `([A-Z_]+)` \|", WIRE, re.MULTILINE)
    expected = []
    for name in error_pb2.ErrorCode.keys():  # noqa: SIM118 - an enum wrapper is no dict
        error = errors.from_proto(error_pb2.Error(code=name))
        if type(error) is not errors.EpmeshError:
            expected.append((name.removeprefix("ERROR_CODE_"), type(error).__name__, errors.status_code(error).name))
    assert rows == expected


def test_wire_page_has_the_limits_and_dtypes_of_the_code() -> None:
    assert f"| header | {frames.MAX_HEADER_BYTES >> 10} KiB |" in WIRE
    assert f"| tensors in a message | {frames.MAX_TENSORS} |" in WIRE
    assert f"| dimensions of a tensor | {frames.MAX_DIMS} |" in WIRE
    assert f"| bytes of a tensor | {frames.MAX_TENSOR_BYTES >> 30} GiB |" in WIRE
    (dtypes,) = re.findall(r"^Dtypes carry torch's names: (.*?)\.$", WIRE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", dtypes) == list(frames.ITEM_BYTES)


def test_wire_page_explains_every_field_of_a_frame() -> None:
    assert [field.name for field in frame_pb2.FrameHeader.DESCRIPTOR.fields if f"`{field.name}`" not in WIRE] == []


def test_wire_page_names_every_service() -> None:
    services = re.findall(
        r"^service (\w+)", "\n".join(path.read_text() for path in ROOT.glob("proto/**/*.proto")), re.M
    )
    assert services
    assert [name for name in services if f"`{name}`" not in WIRE] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_the_pages_exist_with_their_options(page: Path) -> None:
    known = options_by_command()
    for command, rest in re.findall(r"(?<![\w`./-]epmesh/)\bepmesh (\w+)((?: [^`#\n]*)?)", code_of(page.read_text())):
        if command in known:
            assert set(re.findall(r"--[a-z-]+", rest)) <= known[command], command


def code_of(text: str) -> str:
    """The lines of shell blocks, and what stands between backquotes."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])


def options_by_command() -> dict[str, set[str]]:
    """Of a command with commands of its own, such as certs: those of all of them."""
    found = {}
    for name, command in typer.main.get_group(app).commands.items():
        commands = [command, *getattr(command, "commands", {}).values()]
        found[name] = {"--help", *(flag for one in commands for param in one.params for flag in param.opts)}
    return found


def test_options_named_alone_exist_too() -> None:
    known = {option for options in options_by_command().values() for option in options}
    for page in (page for page in PAGES if ROOT / "examples" not in page.parents):  # those have options of their own
        named = set(re.findall(r"`(--[a-z-]+)`", page.read_text()))
        assert named <= known, page


def test_the_doctors_page_lists_every_cause_that_it_finds() -> None:
    listed = set(re.findall(r"`([a-z0-9-]+)`(?=[^|\n]*\|)", (ROOT / "docs" / "doctor.md").read_text()))
    sources = "\n".join(path.read_text() for path in (ROOT / "server" / "epmesh_server" / "doctor").rglob("*.py"))
    found = set(re.findall(r'\b(?:error|warning|make)\(\s*"([a-z0-9-]+)"', sources))
    assert len(found) > 40
    assert found <= listed

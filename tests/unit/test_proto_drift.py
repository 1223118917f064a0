"""The protos keep their style, and the checked-in stubs are what the protos say."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "client" / "epmesh" / "v1"

# Field numbers of descriptor.proto: SourceCodeInfo addresses what it describes by them.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ENUM, MESSAGE_ONEOF = 2, 3, 4, 8
ENUM_VALUE = 2
SERVICE_METHOD = 2

pytestmark = pytest.mark.timeout(400)  # the first run makes an environment for the generator

LocationPath = tuple[int, ...]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with freshly generated stubs and, as `descriptors.bin`, the protos themselves."""
    out = tmp_path_factory.mktemp("stubs")
    script = ROOT / "proto" / "generate.sh"
    command = [script, out, out / "descriptors.bin"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def files(generated: Path) -> list[FileDescriptorProto]:
    return list(FileDescriptorSet.FromString((generated / "descriptors.bin").read_bytes()).file)


def test_checked_in_stubs_are_what_the_protos_generate(generated: Path) -> None:
    fresh = {path.name: path.read_bytes() for path in (generated / "epmesh" / "v1").iterdir()}
    checked_in = {path.name: path.read_bytes() for path in STUBS.glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(checked_in), "run `make proto` and commit what it writes or removes"
    drifted = sorted(name for name in fresh if fresh[name] != checked_in[name])
    assert not drifted, f"run `make proto` and commit {drifted}"


def test_every_proto_is_linted(files: list[FileDescriptorProto]) -> None:
    on_disk = {str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto")}
    assert on_disk == {file.name for file in files}


def test_protos_keep_their_style(files: list[FileDescriptorProto]) -> None:
    complaints = [f"{file.name}: {complaint}" for file in files for complaint in lint(file)]
    complaints += shared_messages(files)
    assert not complaints, "\n".join(complaints)


def test_lint_sees_what_is_wrong() -> None:
    file = FileDescriptorProto(name="epmesh/v1/bad.proto", package="epmesh.v2", syntax="proto3")
    message = file.message_type.add(name="bad_name")
    message.field.add(name="badName", number=1)
    file.enum_type.add(name="Mode").value.add(name="MODE_ON", number=0)
    service = file.service.add(name="Things")
    service.method.add(name="Do", input_type=".epmesh.v2.Thing", output_type=".epmesh.v2.DoResponse")
    assert list(lint(file)) == [
        "package epmesh.v2 does not match its folder",
        "a service outside a *_service.proto",
        "message bad_name is not PascalCase",
        "message bad_name has no comment",
        "bad_name.badName is not lower_snake_case",
        "bad_name.badName has no comment",
        "enum Mode has no comment",
        "Mode: value 0 is MODE_ON, not MODE_UNSPECIFIED",
        "Mode.MODE_ON has no comment",
        "service Things is not named ...Service",
        "service Things has no comment",
        "Things.Do has no comment",
        "Things.Do takes .epmesh.v2.Thing, not its own DoRequest",
    ]


def lint(file: FileDescriptorProto) -> Iterator[str]:
    """What one file does against the rules of `docs/wire.md`."""
    comments = {
        tuple(location.path): bool((location.leading_comments or location.trailing_comments).strip())
        for location in file.source_code_info.location
    }
    if file.package != str(Path(file.name).parent).replace("/", "."):
        yield f"package {file.package} does not match its folder"
    if bool(file.service) != file.name.endswith("_service.proto"):
        yield "a service outside a *_service.proto" if file.service else "a *_service.proto without a service"
    for i, message in enumerate(file.message_type):
        yield from lint_message(message, (FILE_MESSAGE, i), comments)
    for i, enum in enumerate(file.enum_type):
        yield from lint_enum(enum, (FILE_ENUM, i), comments)
    for i, service in enumerate(file.service):
        yield from lint_service(service, f".{file.package}.", (FILE_SERVICE, i), comments)


def lint_message(message: DescriptorProto, path: LocationPath, comments: dict[LocationPath, bool]) -> Iterator[str]:
    if not re.fullmatch(r"([A-Z][a-z0-9]*)+", message.name):
        yield f"message {message.name} is not PascalCase"
    if not comments.get(path):
        yield f"message {message.name} has no comment"
    parts: list[tuple[int, Iterable[str]]] = [
        (MESSAGE_FIELD, [field.name for field in message.field]),
        # `optional` makes a oneof of its own, which is nowhere in the source.
        (MESSAGE_ONEOF, [oneof.name for oneof in message.oneof_decl if not oneof.name.startswith("_")]),
    ]
    for number, names in parts:
        for i, name in enumerate(names):
            if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
                yield f"{message.name}.{name} is not lower_snake_case"
            if not comments.get((*path, number, i)):
                yield f"{message.name}.{name} has no comment"
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from lint_message(nested, (*path, MESSAGE_NESTED, i), comments)
    for i, enum in enumerate(message.enum_type):
        yield from lint_enum(enum, (*path, MESSAGE_ENUM, i), comments)


def lint_enum(enum: EnumDescriptorProto, path: LocationPath, comments: dict[LocationPath, bool]) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    if not comments.get(path):
        yield f"enum {enum.name} has no comment"
    for i, value in enumerate(enum.value):
        if value.number == 0 and value.name != f"{prefix}UNSPECIFIED":
            yield f"{enum.name}: value 0 is {value.name}, not {prefix}UNSPECIFIED"
        if not value.name.startswith(prefix):
            yield f"{enum.name}.{value.name} does not start with {prefix}"
        if not comments.get((*path, ENUM_VALUE, i)):
            yield f"{enum.name}.{value.name} has no comment"


def lint_service(
    service: ServiceDescriptorProto, package: str, path: LocationPath, comments: dict[LocationPath, bool]
) -> Iterator[str]:
    if not service.name.endswith("Service"):
        yield f"service {service.name} is not named ...Service"
    if not comments.get(path):
        yield f"service {service.name} has no comment"
    for i, method in enumerate(service.method):
        if not comments.get((*path, SERVICE_METHOD, i)):
            yield f"{service.name}.{method.name} has no comment"
        if method.input_type != f"{package}{method.name}Request":
            yield f"{service.name}.{method.name} takes {method.input_type}, not its own {method.name}Request"
        if method.output_type != f"{package}{method.name}Response":
            yield f"{service.name}.{method.name} returns {method.output_type}, not its own {method.name}Response"


def shared_messages(files: list[FileDescriptorProto]) -> list[str]:
    """Requests and responses that two methods share (a method's name in two services)."""
    used: dict[str, str] = {}
    complaints = []
    for file in files:
        for service in file.service:
            for method in service.method:
                name = f"{service.name}.{method.name}"
                for message in (method.input_type, method.output_type):
                    if message in used:
                        complaints.append(f"{name} shares {message} with {used[message]}")
                    used[message] = name
    return complaints

"""`epmesh certs`: the certificates of a mesh, for people who have no authority of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from epmesh.errors import InvalidRequest
from epmesh.tls import REVOKED_NAME
from epmesh_server.access import CLIENT_ROLES, Identity, Role
from epmesh_server.certificates import CA_KEY_NAME, DEFAULT_DAYS, Authority, directory_name

app = typer.Typer(no_args_is_help=True, help="Make certificates: an authority, and one for everybody in a mesh.")
DirectoryArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Where the set is, a directory for each.")]
NodeOption = Annotated[list[str] | None, typer.Option(help="Id of a node (--node-id); give it again for more.")]
DriverOption = Annotated[list[str] | None, typer.Option(help="Name of a process that drives hosted ranks.")]
RouterOption = Annotated[list[str] | None, typer.Option(help="Name of a router.")]
ObserverOption = Annotated[list[str] | None, typer.Option(help="Name of a client that only looks on.")]
DaysOption = Annotated[int, typer.Option(min=1, help="For which they are valid.")]


@app.command()
def init(
    directory: DirectoryArgument,
    node: NodeOption = None,
    driver: DriverOption = None,
    router: RouterOption = None,
    observer: ObserverOption = None,
    days: DaysOption = DEFAULT_DAYS,
) -> None:
    """Make an authority, and certificates for a coordinator and for those named."""
    wanted = [Identity(Role.COORDINATOR), *_named(node, driver, router, observer)]
    for identity in wanted:
        directory_name(identity)  # refuses odd names before anything is written
    authority = Authority.make(directory)
    _issue(authority, wanted, days, replace=False)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"Keep {directory / CA_KEY_NAME} away from the services: who has it can be anybody. More certificates:"
    )
    console.print(f"  epmesh certs add {directory} --node NAME")
    console.print("Each of them goes to its own host or container, and is named there:")
    console.print(f"  epmesh coordinator --host 0.0.0.0 --tls-dir {directory / directory_name(wanted[0])}")
    for identity in wanted:
        if identity.role is Role.NODE:
            place = directory / directory_name(identity)
            console.print(f"  epmesh serve --host 0.0.0.0 --coordinator HOST:7401 --tls-dir {place}")


@app.command()
def add(
    directory: DirectoryArgument,
    node: NodeOption = None,
    driver: DriverOption = None,
    router: RouterOption = None,
    observer: ObserverOption = None,
    coordinator: Annotated[bool, typer.Option("--coordinator", help="Another coordinator.")] = False,
    days: DaysOption = DEFAULT_DAYS,
    replace: Annotated[bool, typer.Option("--replace", help="Rotate: replace the files that are there.")] = False,
) -> None:
    """Make more certificates with the authority that is there, or replace old ones."""
    wanted = _named(node, driver, router, observer)
    if coordinator:
        wanted.append(Identity(Role.COORDINATOR))
    if not wanted:
        roles = ", ".join(f"--{role.value}" for role in (Role.COORDINATOR, Role.NODE, *CLIENT_ROLES))
        raise InvalidRequest(f"say for whom: {roles}")
    _issue(Authority.load(directory), wanted, days, replace=replace)


@app.command()
def revoke(
    directory: DirectoryArgument,
    node: NodeOption = None,
    driver: DriverOption = None,
    router: RouterOption = None,
    observer: ObserverOption = None,
    coordinator: Annotated[bool, typer.Option("--coordinator", help="The coordinators'.")] = False,
    replaced: Annotated[
        bool, typer.Option("--replaced", help="Only those before the present one, which stays good.")
    ] = False,
    serial: Annotated[
        list[str] | None, typer.Option(help="Hexadecimal, as logs and `openssl x509 -serial` have it; repeat for more.")
    ] = None,
) -> None:
    """Revoke certificates that the authority made: all of those named, or by serial number."""
    authority = Authority.load(directory)
    named = _named(node, driver, router, observer)
    if coordinator:
        named.append(Identity(Role.COORDINATOR))
    serials = {_number(text): "by its number" for text in serial or ()}
    for identity in named:
        found = authority.issued_to(identity, replaced=replaced)
        serials |= {each.serial_number: f"{identity}, until {each.not_valid_after_utc:%Y-%m-%d}" for each in found}
        if not found:
            kept = "none was replaced" if replaced else f"{directory} knows none that is not over"
            raise InvalidRequest(f"no certificate of {identity} to revoke: {kept}; --serial revokes any other")
    if not serials:
        raise InvalidRequest("say which: --serial, --coordinator, or the name of a node, driver, router or observer")
    places = authority.revoke(serials)
    console = Console(soft_wrap=True, highlight=False)
    for number, what in serials.items():
        console.print(f"{number:X}: {what}")
    console.print(f"{places[0]} has them; put it beside tls.crt of every coordinator and node, as {REVOKED_NAME}:")
    for place in places[1:]:
        console.print(f"  {place}")


def _number(text: str) -> int:
    try:
        number = int(text.removeprefix("serial=").replace(":", ""), 16)
    except ValueError:
        number = 0
    if not 0 < number < 1 << 159:  # as X.509 has it, and the library
        raise InvalidRequest(f"serial number {text!r} is none; give hexadecimal digits")
    return number


def _named(*names_by_role: list[str] | None) -> list[Identity]:
    """Those of nodes, drivers, routers and observers, in this order."""
    roles = (Role.NODE, *CLIENT_ROLES)
    return [Identity(role, name) for role, names in zip(roles, names_by_role, strict=True) for name in names or ()]


def _issue(authority: Authority, wanted: Sequence[Identity], days: int, *, replace: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for identity in wanted:
        place = authority.directory / directory_name(identity)
        authority.issue(place, [identity], days=days, replace=replace)
        option = "--tls-dir" if identity.role in (Role.COORDINATOR, Role.NODE) else "tls="
        console.print(f"{place}: {identity}, for {days} days; {option} {place}")

"""Writes api.md beside this file: everything in ``epmesh.__all__`` and ``epmesh.testing.__all__``, from its docstrings.

Reads the sources and imports nothing, so any Python that can parse them will do: ``python docs/generate_api.py``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = ("epmesh", "epmesh.testing")
FOLDERS = ("client", "server")
WIDTH = 100
# Those that a caller has to know of.
DECORATORS = {
    "property": "@property",
    "cached_property": "@property",
    "classmethod": "@classmethod",
    "staticmethod": "@staticmethod",
    "contextlib.contextmanager": "@contextmanager",
    "contextlib.asynccontextmanager": "@asynccontextmanager",
}
HEADER = """\
# API reference

<!-- Generated from docstrings: change those, then run `make docs` (or `python docs/generate_api.py`). -->

What `epmesh` and `epmesh.testing` offer, made from the docstrings in the source by `make docs`.
[Getting started](getting-started.md) says how the parts go together, [architecture](architecture.md) why they are so.
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.AnnAssign | ast.Assign


@dataclass(frozen=True)
class Item:
    """One public name: where it is offered, and what defines it in which module."""

    package: str
    name: str
    module: str
    node: Definition

    @property
    def docstring(self) -> str:
        """Its docstring, or that of the line after it where it is an alias."""
        return docstring_of(self.node, parse(self.module).body)

    @property
    def kind(self) -> str:
        """The heading it stands under."""
        if not isinstance(self.node, ast.ClassDef):
            return "Functions" if isinstance(self.node, ast.FunctionDef) else "Names"
        return "Errors" if any(name == "EpmeshError" for name, _, _ in lineage(self.module, self.node)) else "Classes"


# Reading the sources ---------------------------------------------------------------------------------------------


@cache
def parse(module: str) -> ast.Module:
    """The source of a module of this project.

    Raises:
        FileNotFoundError: it is none.
    """
    for folder in FOLDERS:
        base = ROOT / folder / Path(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.exists():
                return ast.parse(path.read_text())
    raise FileNotFoundError(f"no module {module} under {', '.join(FOLDERS)}")


def statements(module: str) -> Iterator[ast.stmt]:
    """A module's statements, those under ``if TYPE_CHECKING`` too: what is imported late is imported there."""
    for node in parse(module).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def find(module: str, name: str) -> tuple[str, Definition]:
    """The module that defines what `module` calls `name`, and the definition there.

    Raises:
        LookupError: it neither defines nor imports it from this project.
    """
    for node in statements(module):
        if isinstance(node, Definition) and name in defined(node):
            return module, node
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in {"epmesh", "epmesh_server"}
        ):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return find(node.module, alias.name)
    raise LookupError(f"{module} has no {name}")


def defined(node: Definition) -> list[str]:
    """The names a statement defines."""
    if isinstance(node, ast.AnnAssign | ast.Assign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return [node.name]


def offered(package: str) -> list[str]:
    """What ``__all__`` of `package` lists."""
    for node in statements(package):
        if isinstance(node, ast.Assign) and defined(node) == ["__all__"]:
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{package} has no __all__")


def lineage(module: str, node: ast.ClassDef) -> list[tuple[str, str, ast.ClassDef]]:
    """Name, module and definition of a class and its bases, as far as they are this project's, nearest first."""
    found = [(node.name, module, node)]
    for base in node.bases:
        if isinstance(base, ast.Name):
            try:
                where, definition = find(module, base.id)
            except LookupError:
                continue
            if isinstance(definition, ast.ClassDef):
                found += lineage(where, definition)
    return found


def docstring_of(node: ast.stmt, siblings: list[ast.stmt]) -> str:
    """The docstring inside `node`, or, of an alias, the string after it."""
    if isinstance(node, ast.ClassDef | Function):
        return ast.get_docstring(node) or ""
    after = siblings[siblings.index(node) + 1 :][:1] if node in siblings else []
    if after and isinstance(after[0], ast.Expr) and isinstance(after[0].value, ast.Constant):
        return inspect.cleandoc(str(after[0].value.value))
    return ""


def members(item: Item, public: set[str]) -> list[Function]:
    """Public methods and properties of a class: its own, and those of bases that are not `public` themselves.

    One without a docstring is left out where a public base has it: there it is described.
    """
    if not isinstance(item.node, ast.ClassDef):
        return []
    shown: dict[str, Function] = {}
    elsewhere: set[str] = set()
    for name, _, node in lineage(item.module, item.node):
        methods = [member for member in node.body if isinstance(member, Function) and not member.name.startswith("_")]
        if name != item.name and name in public:
            elsewhere |= {method.name for method in methods}
        else:
            for method in methods:
                shown.setdefault(method.name, method)
    return [method for name, method in shown.items() if ast.get_docstring(method) or name not in elsewhere]


# Writing the page ------------------------------------------------------------------------------------------------


def items() -> list[Item]:
    """Everything on the page, in the order of ``__all__``."""
    return [Item(package, name, *find(package, name)) for package in MODULES for name in offered(package)]


def page() -> str:
    """The whole page."""
    public = {item.name for item in items()}
    parts = [HEADER]
    for kind in ("Functions", "Classes", "Errors", "Names"):
        if some := [item for item in items() if item.kind == kind]:
            parts += [f"## {kind}\n", index(some), *(section(item, public) for item in some)]
    return "\n".join(parts).rstrip() + "\n"


def index(some: list[Item]) -> str:
    """One line an item, with the first paragraph of its docstring."""
    rows = [f"| [`{full_name(item)}`](#{anchor(item)}) | {summary(item.docstring)} |" for item in some]
    return "\n".join(["| | |", "|---|---|", *rows, ""])


def full_name(item: Item) -> str:
    """As people write it after ``import epmesh``."""
    return f"{item.package}.{item.name}"


def anchor(item: Item) -> str:
    """The fragment that a heading with the item's name gets."""
    return full_name(item).lower().replace(".", "")


def summary(docstring: str) -> str:
    """The first paragraph, in one line fit for a table."""
    return prose(docstring.partition("\n\n")[0].replace("\n", " ")).replace("|", "\\|")


def section(item: Item, public: set[str]) -> str:
    """A heading, the signature and the docstring of an item, then the same of its methods."""
    parts = [f"### {full_name(item)}\n", fenced(declaration(item)), text(item.docstring)]
    parts += [text(constructor_docstring(item)), inherited(item, public)]
    for member in members(item, public):
        parts += [
            f"#### {item.name}.{member.name}\n",
            fenced(signature(member)),
            text(ast.get_docstring(member) or ""),
        ]
    return "\n".join(part for part in parts if part)


def constructor_docstring(item: Item) -> str:
    """What a class says of its constructor's arguments; empty where it has none of its own."""
    if isinstance(item.node, ast.ClassDef):
        for member in item.node.body:
            if isinstance(member, ast.FunctionDef) and member.name == "__init__":
                return ast.get_docstring(member) or ""
    return ""


def inherited(item: Item, public: set[str]) -> str:
    """A line that says which bases have more; empty where none is on the page, and for errors, which are a tree."""
    if not isinstance(item.node, ast.ClassDef) or item.kind == "Errors":
        return ""
    bases = [f"`{name}`" for name, _, _ in lineage(item.module, item.node)[1:] if name in public]
    return f"Everything that {', '.join(bases)} has is here too.\n" if bases else ""


def declaration(item: Item) -> str:
    """How an item is declared: a function's signature, a class's bases and fields or constructor, an alias's value."""
    node = item.node
    if isinstance(node, Function):
        return signature(node)
    if not isinstance(node, ast.ClassDef):
        return ast.unparse(node)
    bases = ", ".join(map(ast.unparse, node.bases))
    decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    lines = [*decorators, f"class {node.name}({bases}):" if bases else f"class {node.name}:"]
    lines += [f"    {line}" for line in inner(node)]
    return "\n".join(lines) if len(lines) > len(decorators) + 1 else "\n".join(lines).removesuffix(":")


def inner(node: ast.ClassDef) -> Iterator[str]:
    """A class's fields, and its constructor."""
    for member in node.body:
        if isinstance(member, ast.AnnAssign | ast.Assign) and not defined(member)[0].startswith("_"):
            yield ast.unparse(member)
        elif isinstance(member, ast.FunctionDef) and member.name == "__init__":
            yield from signature(member).splitlines()


def signature(node: Function) -> str:
    """``def`` and what follows up to the colon, over several lines where it is long; without ``self``."""
    lines = [DECORATORS[decorator] for decorator in map(ast.unparse, node.decorator_list) if decorator in DECORATORS]
    start = f"{'async ' if isinstance(node, ast.AsyncFunctionDef) else ''}def {node.name}("
    end = f") -> {ast.unparse(node.returns)}" if node.returns else ")"
    arguments = parameters(node.args)
    whole = start + ", ".join(arguments) + end
    if len(whole) <= WIDTH:
        return "\n".join([*lines, whole])
    return "\n".join([*lines, start, *(f"    {argument}," for argument in arguments), end])


def parameters(arguments: ast.arguments) -> list[str]:
    """The parameters as they are written, ``*`` and ``/`` among them; without ``self`` and ``cls``."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    written = [parameter(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        written.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        written.append(f"*{parameter(arguments.vararg)}")
    elif arguments.kwonlyargs:
        written.append("*")
    written += [parameter(*each) for each in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        written.append(f"**{parameter(arguments.kwarg)}")
    return [each for each in written if each not in {"self", "cls"}]


def parameter(argument: ast.arg, default: ast.expr | None = None) -> str:
    """One parameter with its type and default."""
    annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return argument.arg + annotation
    equals = " = " if annotation else "="
    return f"{argument.arg}{annotation}{equals}{ast.unparse(default)}"


def fenced(code: str) -> str:
    """A block of Python."""
    return f"```python\n{code}\n```\n"


# From docstring to Markdown --------------------------------------------------------------------------------------

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")


def text(docstring: str) -> str:
    """A docstring in Markdown: paragraphs, lists for ``Args:`` and its like, blocks where a line ends with ``::``."""
    lines, out = docstring.splitlines(), []
    while lines:
        line = lines.pop(0)
        if match := SECTION.match(line):
            out += [f"**{match[1]}**\n", *entries(indented(lines), match[1])]
        elif line.rstrip().endswith("::"):
            before = line.rstrip().removesuffix(":") if line.strip() != "::" else ""
            out += [prose(before), "", fenced(inspect.cleandoc("\n".join(indented(lines))))]
        else:
            out.append(prose(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out).strip() + "\n") if docstring else ""


def indented(lines: list[str]) -> list[str]:
    """Takes the indented block at the start of `lines` away, and returns it."""
    block = []
    while lines and (not lines[0].strip() or lines[0].startswith("  ")):
        block.append(lines.pop(0))
    return block


def entries(block: list[str], kind: str) -> Iterator[str]:
    """The lines of a section; entries ``name: text`` as a list, and what continues one in its line."""
    lines: list[str] = []
    for line in inspect.cleandoc("\n".join(block)).splitlines():
        match = re.match(r"([\w*][\w*, .]*): (.*)", line)
        if match and kind not in {"Returns", "Yields"}:
            names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
            lines.append(f"- {names}: {match[2]}")
        elif lines:
            lines[-1] += f" {line.strip()}" if line.strip() else ""
        else:
            lines.append(line)
    yield from map(prose, lines)
    yield ""


def prose(line: str) -> str:
    """A line with Markdown's one pair of backquotes in place of two."""
    return re.sub(r"``(.+?)``", r"`\1`", line)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page())
    sys.stdout.write(f"docs: {PAGE.relative_to(ROOT)} is what the docstrings say\n")


if __name__ == "__main__":
    main()

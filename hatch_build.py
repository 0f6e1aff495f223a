"""Build hook: generates the type stub `trimtab/__init__.pyi`, so that editors know every method and its settings.

At run time `trimtab.LoRA` is resolved lazily from the files under `src/trimtab/methods`; a type checker cannot follow
that. The stub states the same names as plain imports. It is derived from the source text alone (nothing is imported,
so an isolated build needs no torch) and never checked in: a wheel carries it, an editable install writes it beside
`__init__.py`, where git ignores it. Run this file to write it there by hand (`make stub`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path(__file__).resolve().parent / "src"
STUB = Path("trimtab", "__init__.pyi")


class StubError(Exception):
    """The source does not have the form that the stub is generated from."""


class StubBuildHook(BuildHookInterface[Any]):
    """Adds the stub to a wheel; for an editable install it writes the stub into the source tree."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the stub before files are collected. `version` is "standard" or "editable"."""
        source = Path(self.root, "src")
        if version == "editable":
            write_stub(source)
            return
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name, STUB.name)
        path.write_text(stub_text(source), encoding="utf-8")
        build_data["force_include"][str(path)] = STUB.as_posix()

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary copy."""
        if version != "editable":
            self._folder.cleanup()


def write_stub(source: Path) -> Path:
    """Write the stub beside `trimtab/__init__.py` under `source` and return its path."""
    path = source / STUB
    path.write_text(stub_text(source), encoding="utf-8")
    return path


def stub_text(source: Path) -> str:
    """The text of `trimtab/__init__.pyi`: the public names of `__init__.py` and one import per method under `source`.

    Raises StubError where a method file does not define exactly one public frozen dataclass, or two define one name.
    """
    package = source / "trimtab"
    module = parse(package / "__init__.py")
    public = public_names(module)
    methods = method_classes(package / "methods")
    clash = sorted(public & methods.keys())
    if clash:
        raise StubError(f"{clash[0]!r} is both a name in trimtab/__init__.py and a method in {methods[clash[0]]}")
    lines = ['"""Generated from the source at build time: do not edit."""', ""]
    lines += [ast.unparse(node) for node in declarations(module.body, public)]
    lines += [f"from {methods[name]} import {name} as {name}" for name in sorted(methods)]
    lines += ["", f"__all__ = {sorted(public | methods.keys())!r}", ""]
    return "\n".join(lines)


def method_classes(folder: Path) -> dict[str, str]:
    """Class name → module name of every method under `folder` (files whose names start with an underscore are not)."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("[!_]*.py")):
        module = ".".join(path.relative_to(folder.parents[1]).with_suffix("").parts)
        names = [node.name for node in parse(path).body if isinstance(node, ast.ClassDef) and is_public_frozen(node)]
        if len(names) != 1:
            raise StubError(
                f"{path}: a method file defines exactly one public frozen dataclass, found {names or 'none'}. "
                "Move other classes to a file of their own, or start their names with an underscore."
            )
        if names[0] in found:
            raise StubError(f"two method files define {names[0]!r}: {found[names[0]]} and {module}. Rename one class.")
        found[names[0]] = module
    return found


def is_public_frozen(node: ast.ClassDef) -> bool:
    """Whether a class is public and decorated with `@dataclass(frozen=True, …)`."""
    return not node.name.startswith("_") and any(
        isinstance(call, ast.Call)
        and ast.unparse(call.func) in {"dataclass", "dataclasses.dataclass"}
        and any(word.arg == "frozen" and ast.unparse(word.value) == "True" for word in call.keywords)
        for call in node.decorator_list
    )


def public_names(module: ast.Module) -> set[str]:
    """The strings that `__all__` lists literally (what it computes, the methods, is found by file)."""
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and "__all__" in assigned_names(node):
            return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    raise StubError("trimtab/__init__.py has no __all__ with the public names")


def assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The plain names that an assignment binds."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def declarations(body: list[ast.stmt], public: set[str]) -> Iterator[ast.stmt]:
    """What a stub keeps of a module body: imports (public ones re-exported), signatures, types of values."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield reexported(node, public)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from declarations(node.body, public)
        elif isinstance(node, ast.FunctionDef) and node.name in public:
            node.body = [ast.Expr(ast.Constant(...))]
            yield node
        elif isinstance(node, ast.ClassDef) and node.name in public:
            yield node
        elif isinstance(node, ast.AnnAssign) and public.intersection(assigned_names(node)):
            node.value = None
            yield node
        elif isinstance(node, ast.Assign):
            yield from (typed(name, node.value) for name in assigned_names(node) if name in public - {"__all__"})


def reexported(node: ast.Import | ast.ImportFrom, public: set[str]) -> ast.stmt:
    """The same import, with `name as name` for public names: the form that type checkers take as a re-export."""
    for alias in node.names:
        if (alias.asname or alias.name) in public:
            alias.asname = alias.asname or alias.name
    return node


def typed(name: str, value: ast.expr) -> ast.AnnAssign:
    """`name: type` for a public value; without an annotation its type must be plain from a literal."""
    if not isinstance(value, ast.Constant):
        raise StubError(f"trimtab/__init__.py: annotate {name!r}; its type cannot be read from {ast.unparse(value)!r}")
    return ast.AnnAssign(ast.Name(name), ast.Name(type(value.value).__name__), None, simple=1)


def parse(path: Path) -> ast.Module:
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


if __name__ == "__main__":
    print(write_stub(SOURCE))

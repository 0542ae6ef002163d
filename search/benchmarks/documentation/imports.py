"""Drawings of which part imports which, from the import statements. Imports that only type checkers see do not count."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

FOLDERS = ("search", "agents", "envs", "cost_models")
PREFIX = "secateur."


def imported_modules(tree: ast.Module) -> set[str]:
    """Return the modules of this package that a file imports when it runs, without the prefix, such as "envs.core"."""
    found: set[str] = set()
    statements: list[ast.AST] = [tree]
    while statements:
        node = statements.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
    return {name.removeprefix(PREFIX) for name in found if name.startswith(PREFIX)}


@cache
def file_imports(folder: Path) -> dict[Path, set[str]]:
    """Return {file below the folder: modules of this package that it imports}."""
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder): imported_modules(ast.parse(file.read_text(encoding="utf-8"))) for file in files}


def folder_imports(root: Path) -> dict[str, set[str]]:
    """Return {top-level folder: what it imports from the others}; of search/ only the folders' names."""
    found = {}
    for folder in FOLDERS:
        modules = {module for names in file_imports((root / folder).resolve()).values() for module in names}
        others = {module for module in modules if module.partition(".")[0] != folder}
        found[folder] = {module.partition(".")[0] for module in others} if folder == "search" else others
    return found


def search_imports(root: Path) -> dict[str, set[str]]:
    """Return {file or folder in search/: what it imports of the others in search/}."""
    found: dict[str, set[str]] = {}
    for file, modules in file_imports((root / "search").resolve()).items():
        part = file.parts[0].removesuffix(".py")
        targets = {module.split(".")[1] for module in modules if module.startswith("search.")}
        found[part] = found.get(part, set()) | targets - {part}
    found.pop("__init__", None)
    return found


def draw(imports: Mapping[str, set[str]]) -> str:
    """Return one line per part, "part ──▶ what it imports", those that import most first."""

    def reach(part: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
        for target in imports.get(part, ()):
            if target not in seen:
                seen = reach(target, seen | {target})
        return seen

    width = max(map(len, imports))
    order = sorted(imports, key=lambda part: (-len(reach(part)), part))
    lines = [f"{part:{width}} ──▶ {', '.join(sorted(imports[part])) or 'nothing of ours'}" for part in order]
    return "\n".join(["```text", *lines, "```"])


DRAWINGS: dict[str, Callable[[Path], str]] = {
    "imports-folders": lambda root: draw(folder_imports(root)),
    "imports-search": lambda root: draw(search_imports(root)),
}
"""{name of a block: function of the folder that holds search/, envs/, …}."""

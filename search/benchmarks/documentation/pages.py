"""Marked blocks in README.md and docs/*.md: their text is generated, so that no table or reference is copied by hand.

A block is everything between `<!-- begin: NAME -->` and `<!-- end -->`. The rest of a page is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.documentation import imports, picture, reference, tables

COMMAND = "secateur benchmark docs"
BLOCK = re.compile(r"(?P<begin><!-- begin: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)


def contents(root: Path, command: Any) -> dict[str, Callable[[], str]]:
    """Return {name of a block: function that returns its text}.

    Args:
        root: folder of README.md.
        command: the whole `secateur` command, as click has it.
    """
    return {
        **{name: partial(table, root / "results") for name, table in tables.TABLES.items()},
        **{name: partial(text, root) for name, text in imports.DRAWINGS.items()},
        **reference.REFERENCES,
        "commands": partial(reference.command_reference, command),
    }


def rewrite_blocks(text: str, page: str, generated: Mapping[str, Callable[[], str]]) -> str:
    """Return a page whose marked blocks hold the generated text.

    Args:
        text: the page as it is.
        page: its name, for errors.
        generated: {name of a block: function that returns its text}.
    Raises:
        InputError: if a block has an unknown name or no end.
    """

    def replace(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in generated:
            raise InputError(f"{page}: unknown block `{name}`. Known: {', '.join(generated)}")
        return f"{block['begin']}{generated[name]().strip()}\n{block['end']}"

    if text.count("<!-- begin: ") != len(BLOCK.findall(text)) or text.count("<!-- end -->") != len(BLOCK.findall(text)):
        raise InputError(
            f"{page}: a block has no begin or no end. Write <!-- begin: NAME --> … <!-- end -->, each on its own line."
        )
    return BLOCK.sub(replace, text)


def pages(root: Path) -> list[Path]:
    """Return README.md and the pages under docs/.

    Raises:
        InputError: if `root` is not the repository.
    """
    if not (root / "README.md").is_file() or not (root / "results").is_dir():
        raise InputError(f"{root} holds no README.md and results/. Run `{COMMAND}` in the repository, or name it with --root.")
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def outdated(root: Path, command: Any) -> dict[Path, str]:
    """Return {page or picture that differs from what the code and results/ say: its new text}; nothing is written.

    See `contents` for the arguments. Pictures are compared by the numbers in them, not by how they are drawn.
    Their new text is "" until `update` draws them.
    """
    generated = contents(root, command)
    differing = {}
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = rewrite_blocks(text, page.name, generated)
        if new != text:
            differing[page] = new
    return {**differing, **{file: "" for file in picture.outdated(root)}}


def update(root: Path, command: Any) -> list[Path]:
    """Write what `outdated` returns, and return which files these are. A deleted picture is drawn again."""
    differing = outdated(root, command)
    drawn = picture.draw_files(root, [file for file, text in differing.items() if not text])
    for file, text in {**differing, **drawn}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(differing)


def run_docs(root: Path, check: bool, command: Any) -> None:
    """Write what differs and print its names, or only check.

    Raises:
        InputError: if `root` is not the repository, or a block is broken.
        SystemExit: with 1, if `check` finds a difference.
    """
    if not check:
        for file in update(root, command):
            print(f"wrote {file.relative_to(root)}")
    elif differing := outdated(root, command):
        names = ", ".join(str(file.relative_to(root)) for file in differing)
        sys.exit(f"not up to date: {names}. Run: {COMMAND}")

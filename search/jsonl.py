"""Files of JSON lines, one value per line: an interrupted measurement goes on from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from os.path import exists
from pathlib import Path
from typing import Any

from secateur.cost_models.core import InputError
from secateur.cost_models.writing import replace_file


def read_lines(path: Path) -> list[Any]:
    """Return the values of a file; empty if there is none. An unfinished last line, left by a killed process, is skipped.

    Raises:
        InputError: if any other line is not valid JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if exists(path) else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path}: line {number} is not valid JSON. Remove it, or choose another file.") from None
    return values


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Replace the file at once. Do this before appending: the first new line would continue an unfinished one."""
    replace_file(path, "".join(json.dumps(value) + "\n" for value in values))


def append_line(path: Path, value: Any) -> None:
    """Append one value."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def as_read(value: Any) -> Any:
    """Return a value as it is read from a file: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))

"""Rows of a long measurement in a file of JSON lines: what is finished is never lost, and never measured twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.cost_models.core import InputError
from secateur.search.config import SearchConfig


class Records:
    """The rows of one measurement; each is written as soon as it is added.

    Args:
        file: one row per line, after a first line that says what is measured. Made if there is none; an existing one goes on.
        header: what is measured, as JSON values.

    Attributes:
        rows: all rows, those of earlier runs first.

    Raises:
        InputError: if the file holds another measurement, or cannot be read or written.
    """

    def __init__(self, file: Path, header: Mapping[str, Any]):
        self.file = file
        self._header = json.loads(json.dumps({"schema": 1, **header}))
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
            found = _parsed(file, lines)
            if found and found[0] != self._header:
                raise InputError(
                    f"{file} holds another measurement ({difference(found[0], self._header)}). "
                    "Choose another folder with --output."
                )
            self.rows: list[dict[str, Any]] = found[1:]
            self._write_all()
        except OSError as error:
            raise InputError(f"{file} cannot be written: {error}. Choose another folder with --output.") from None

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the first row with these values, if there is one."""
        key = json.loads(json.dumps(key))
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a row to the file; return it as it will be read again."""
        text = json.dumps(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self.rows.append(json.loads(text))
        return self.rows[-1]

    def _write_all(self) -> None:
        """Write the header, and drop a line that a killed process left unfinished."""
        unfinished = self.file.with_suffix(".unfinished")
        lines = [json.dumps(line) + "\n" for line in (self._header, *self.rows)]
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, self.file)


def _parsed(file: Path, lines: list[str]) -> list[dict[str, Any]]:
    """Return the lines' objects; the last line may be cut off."""
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{file}: line {number} is not valid JSON. Choose another folder with --output.") from None
    return parsed


def difference(found: Any, wanted: Any, where: tuple[str, str] = ("there", "here"), place: str = "") -> str:
    """Return the first place where two JSON values differ, and both values; `where` says in which words they are."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in dict.fromkeys([*wanted, *found]):
            if found.get(name) != wanted.get(name):
                return difference(found.get(name), wanted.get(name), where, f"{place}.{name}".removeprefix("."))
    return f"`{place}` is {json.dumps(found)} {where[0]}, {json.dumps(wanted)} {where[1]}"


def config_record(config: SearchConfig) -> dict[str, Any]:
    """Return the configuration without what belongs to the machine: folders, workers, where runs are written."""
    machine = {"data": {"root"}, "search": {"workers", "address", "time_limit"}, "output": True}
    record = config.model_dump(mode="json", exclude=machine)
    record["model"]["weights"] = config.model.weights and Path(config.model.weights).name
    return record

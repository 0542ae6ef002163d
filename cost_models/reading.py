"""Reads text and JSON files that a user, or somebody else, hands over: with limits, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.cost_models.core import InputError

MAX_BYTES = 256_000_000
"""Of a JSON file; the front.json of a long search of a large network takes some megabytes."""


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return the text of a file.

    Args:
        path: of the file.
        most: largest number of bytes.
    Raises:
        InputError: if it cannot be read, is larger, or is no UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        raise InputError(f"{path} cannot be read: {error}.") from None
    if len(content) > most:
        raise InputError(f"{path} is larger than {most:,} bytes, so it was not read. Name another file.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read: it is no UTF-8 text ({error}).") from None


def parse_json(text: str, source: str) -> Any:
    """Return the value of a JSON text; `source` names it in errors.

    Raises:
        InputError: if it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{source} is damaged: JSONDecodeError: {error.msg} ({place}).") from None
    except RecursionError:
        raise InputError(f"{source} is damaged: it is nested too deeply.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InputError(f"{source} is damaged: {error}.") from None

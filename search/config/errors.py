"""The reasons in pydantic's errors, in words for Python and for the command."""

from __future__ import annotations

from typing import Any

from pydantic_core import ErrorDetails

from secateur.cost_models.core import InputError


def reason_of(error: ErrorDetails) -> InputError:
    """Return what is wrong: the message of the check that failed, or pydantic's own with the value."""
    if error["type"] == "value_error":
        cause = error["ctx"]["error"]
        return cause if isinstance(cause, InputError) else InputError(str(cause))
    message = error["msg"]
    return InputError(f"{message[0].lower()}{message[1:]} (got {shorten(error['input'])})")


def shorten(value: Any, length: int = 60) -> str:
    """Return the value as Python writes it, cut to `length` characters."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."

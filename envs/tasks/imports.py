"""Turns "package.module:name" from a config into the Python object, with errors that a user can act on."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from secateur.envs.core import InputError


def import_object(path: str, place: str) -> tuple[ModuleType, object]:
    """Return the module and the object that `path` names; the working directory is searched too.

    Args:
        path: "package.module:name".
        place: the config field that holds it, for the errors, e.g. "model.factory".
    Raises:
        InputError: if the form is wrong, the module cannot be imported or has no such name.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name.isidentifier():
        raise InputError(f'`{place}` must read "package.module:name", but got "{path}".')
    module = _import_module(module_name, place)
    if not hasattr(module, name):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise InputError(f"`{place}`: module `{module_name}` has no `{name}`.{did_you_mean(name, public)}")
    return module, getattr(module, name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean `x`?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def _import_module(name: str, place: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a console script, unlike `python -m`, does not see the user's own modules
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"`{place}`: importing `{name}` failed: {error}.") from error
        raise InputError(
            f"`{place}`: there is no module `{error.name}`. Is it installed, or beside the directory you start from?"
        ) from error
    except Exception as error:  # the user's module runs arbitrary code on import
        raise InputError(f"`{place}`: importing `{name}` failed: {type(error).__name__}: {error}") from error

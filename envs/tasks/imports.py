"""Turns "package.module:name" from a configuration into the Python object, with errors that a user can act on."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterable
from types import ModuleType

from secateur.envs.core import InputError

OBJECT = "object:"
"""What the names of a model and data begin with that were Python objects; their search can be continued with the same objects."""

FORMER_NAMES = {
    **{f"envs.tasks.cifar_resnet:{name}": f"secateur:{name}" for name in ("resnet20", "resnet32", "resnet44", "resnet56")},
    "envs.tasks.cifar_resnet:vgg16_bn": "secateur:vgg16_bn",
    "envs.tasks.digits:digits_resnet": "secateur:digits",
    "envs.tasks.synthetic:synthetic_net": "secateur:synthetic",
    "envs.tasks.synthetic:load": "synthetic",
}
"""What version 0.1 wrote into runs and exports for its own networks and data, and the names that these have now."""


def current_name(name: str) -> str:
    """Return the present name of a factory or data set; names that were never ours are returned unchanged."""
    return FORMER_NAMES.get(name.removeprefix("secateur."), name)


def import_object(path: str, place: str) -> tuple[ModuleType, object]:
    """Return the module and the object that `path` names; modules in the working directory are found too.

    Args:
        path: "package.module:name".
        place: the configuration field that holds it, for the errors, e.g. "model.factory".
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
    # A console script, unlike `python -m`, does not search the working directory. It comes last, so that the user's files
    # never replace a library.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"`{place}`: importing `{name}` failed: {error}.") from error
        raise InputError(
            f"`{place}`: there is no module `{error.name}`. Install it, or start in the directory that holds it."
        ) from error
    except (Exception, SystemExit) as error:  # the user's module runs arbitrary code on import
        raise InputError(f"`{place}`: importing `{name}` failed: {type(error).__name__}: {error}") from error

"""Which code the files of runs and exports may name.

One rule: a module that only a file names is not imported, because importing a module runs its code. The file may come from
somebody else, and name any module of this machine, or one that lies beside the file. Networks and data sets of secateur and
torchvision's models may always be named; the user allows other modules by name: `--trust MODULE`, in Python `trust=["MODULE"]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import current_name, import_object
from secateur.envs.tasks.models import FACTORIES, OURS, TORCHVISION


def check_trusted(name: str, place: str, document: str, trust: Collection[str]) -> None:
    """Raise InputError unless a file may name this function.

    Args:
        name: "package.module:function", or the name of a network or data set in the box.
        place: key in the file, e.g. "model.factory".
        document: name of the file.
        trust: modules, and with each the modules inside it, that the user trusts.
    """
    if is_built_in(name):
        return
    module = module_of(name)
    if not _is_within(module, trust):
        raise _refused(name, place, document, module, f"importing `{module}` would run its code")
    _, found = import_object(name, place)
    home = _home(found)
    # `mynet:system` may be the `system` of another module, which mynet imports for itself.
    if home is not None and home.partition(".")[0] != module.partition(".")[0] and not _is_within(home, trust):
        raise _refused(name, place, document, home, f"it is defined in `{home}`")


def is_built_in(name: str) -> bool:
    """Return whether this is a network or data set of secateur, or a model of torchvision."""
    name = current_name(name)
    if ":" not in name or name.startswith((OURS, TORCHVISION)) or name in FACTORIES.values():
        return True
    module, _, function = name.partition(":")
    if not _is_within(module, ("torchvision.models",)):
        return False
    from torchvision import models

    return function in models.list_models()


def module_of(name: str) -> str:
    """Return the module in "package.module:function"."""
    return name.partition(":")[0]


def trusted_modules(names: Collection[str]) -> tuple[str, ...]:
    """Return what must be trusted so that files may name these functions, which the user has named.

    Raises:
        InputError: if one of them cannot be imported.
    """
    modules: dict[str, None] = {}
    for name in names:
        if not is_built_in(name):
            home = _home(import_object(name, "a function")[1])
            modules |= dict.fromkeys([module_of(name), *([] if home is None else [home])])
    return tuple(modules)


def _is_within(module: str, packages: Collection[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _home(found: object) -> str | None:
    """Return the module that defines a function or class; None of networks, and of objects that are not called."""
    if isinstance(found, type) and issubclass(found, nn.Module):
        return None
    if isinstance(found, type) or inspect.isroutine(found):
        home = getattr(found, "__module__", None) or "builtins"
        return None if _is_within(home, ("torchvision.models",)) else home
    return None


def _refused(name: str, place: str, document: str, module: str, reason: str) -> InputError:
    problem = f"{document} names `{name}` (`{place}`), but {reason}. Files may come from somebody else. If you trust it"
    return InputError(f'{problem}, say so: trust=["{module}"].', f"{problem}, say so: --trust {module}.")

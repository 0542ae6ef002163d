"""Names of functions in the files of runs and exports: which of them may be called.

The user's own configuration and options may name any function. A manifest.json or policy.json may come from somebody else, and
could name any function of this machine with any arguments. What such a file names is called only if it looks like what it should
be (`is_model_factory`, `is_own_code`), or if the user names it too, with an option.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import OBJECT, current_name, import_object, is_own_code, is_own_file
from secateur.envs.tasks.models import find_factory, is_model_factory, not_called
from secateur.envs.tasks.named_functions import FUNCTIONS, FunctionsConfig
from secateur.search.config import Overrides, SearchConfig, apply_overrides
from secateur.search.given import Given
from secateur.search.run.folder import MANIFEST, load_manifest


def load_own_manifest(
    run: str | os.PathLike[str], overrides: Overrides = (), given: Given | None = None
) -> tuple[SearchConfig, dict[str, Any]]:
    """Return what `load_manifest` returns, for commands that build the model and the data again.

    Args:
        run: its folder.
        overrides: changes of the run's configuration.
        given: model and data as Python objects, if the run began with such: then nothing is called by name.
    Raises:
        InputError: as `load_manifest` does, and if the manifest names a function that may not be called.
    """
    config, manifest = load_manifest(run, overrides)
    if given is None:
        check_named_code(config, apply_overrides({}, overrides), MANIFEST)
    return config, manifest


def check_named_code(config: SearchConfig, named: Collection[str], document: str) -> None:
    """Check every function that a configuration in a file names for the model, the data and the task.

    Args:
        config: the configuration.
        named: what the user has named, as "section.key"s.
        document: name of the file.
    Raises:
        InputError: if a function may not be called.
    """
    factory = config.model.factory
    if not {"model", "model.factory"} & set(named) and not is_model_factory(find_factory(factory)[0]):
        raise _refused(f"{document} names {not_called(factory)}. If it makes the network", f"model.factory={factory}")
    check_data_name(config.data.name, named, document)
    if config.task.name == FUNCTIONS:
        check_functions_named(config.task.options, named, document)


def check_data_name(name: str, named: Collection[str], document: str) -> None:
    """Check the function that a file names for its data.

    Args:
        name: name of the data: "package.module:function", or that of a known data set.
        named: what the user has named, as "section.key"s.
        document: name of the file.
    Raises:
        InputError: if the function may not be called.
    """
    name = current_name(name)
    if name.startswith(OBJECT):
        raise InputError(
            "Data and metric were Python objects, which this process does not have. Verify in the process that searched: "
            "secateur.verify(folder, factory=run.given.model, task=run.given.task)."
        )
    if ":" not in name or {"data", "data.name"} & set(named):
        return
    _, function = import_object(name, "data.name")
    if not is_own_code(function):
        problem = f"{document} names `{name}`, which is no function of your own files, so it was not called"
        raise _refused(f"{problem}. If it makes the data", f"data.name={name}")


def check_functions_named(options: Mapping[str, Any], named: Collection[str], document: str) -> None:
    """Check the functions that a file names for its task.

    Args:
        options: of the task `functions`.
        named: what the user has named, as "section.key"s.
        document: name of the file.
    Raises:
        InputError: if a function may not be called.
    """
    for option, name in FunctionsConfig(**options).names.items():
        if {"task", "task.options", f"task.options.{option}", f"task.{option}"} & set(named):
            continue
        module, found = import_object(name, f"task.{option}")
        own_object = not callable(found) and is_own_file(module.__file__ or "")
        if not own_object and not is_own_code(found):
            problem = f"{document} names `{name}`, which is no function of your own files, so it was not called"
            raise _refused(f"{problem}. If it is the task's `{option}`", f"task.{option}={name}")


def _refused(problem: str, override: str) -> InputError:
    return InputError(f'{problem}, name it: overrides=["{override}"].', f"{problem}, name it: --set {override}.")

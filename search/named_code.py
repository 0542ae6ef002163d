"""Names of functions in the files of runs and exports: which of them may be imported (envs/tasks/trust.py).

The user's own configuration and options may name any function. A manifest.json or policy.json may come from somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import OBJECT, current_name
from secateur.envs.tasks.named_functions import FUNCTIONS, FunctionsConfig
from secateur.envs.tasks.trust import check_trusted, trusted_modules
from secateur.search.config import Overrides, SearchConfig, apply_overrides
from secateur.search.documents import ManifestDocument, check_document
from secateur.search.given import Given
from secateur.search.run.folder import MANIFEST, check_links, load_manifest

OBJECTS = (
    "Data and metric were Python objects, which this process does not have. Verify in the process that searched: "
    "secateur.verify(folder, factory=run.given.model, task=run.given.task)."
)


def load_own_manifest(
    run: str | os.PathLike[str], overrides: Overrides = (), given: Given | None = None, trust: Collection[str] = ()
) -> tuple[SearchConfig, dict[str, Any]]:
    """Return what `load_manifest` returns, for commands that build the model and the data again.

    Args:
        run: its folder.
        overrides: changes of the run's configuration; the user may name functions in them.
        given: model and data as Python objects, if the run began with such: then nothing is called by name.
        trust: modules that the manifest may name.
    Raises:
        InputError: as `load_manifest` does, if a file of the run is a link that leads out of it, and if the manifest names a
            function of a module that is not trusted.
    """
    check_links(Path(run))
    config, manifest = load_manifest(run, overrides)
    check_document(manifest, ManifestDocument, Path(run) / MANIFEST)
    if given is None:
        check_named_code(config, overrides, MANIFEST, trust)
    return config, manifest


def check_named_code(config: SearchConfig, overrides: Overrides, document: str, trust: Collection[str]) -> None:
    """Check every function that a configuration in a file names for the model, the data and the task.

    Args:
        config: the configuration.
        overrides: in which the user may name functions.
        document: name of the file.
        trust: modules that it may name.
    Raises:
        InputError: if it names a function of a module that is not trusted.
    """
    named = named_functions(overrides)
    for place, name in _functions_of(config):
        if name not in named:
            check_function(name, place, document, trust)


def check_function(name: str, place: str, document: str, trust: Collection[str]) -> None:
    """Raise InputError unless a file may name this function.

    Args:
        name: "package.module:function", or the name of a network or data set in the box.
        place: key in the file, e.g. "data.name".
        document: name of the file.
        trust: modules that it may name.
    """
    if name.startswith(OBJECT):
        if place == "model.factory":  # `find_factory` has the sentence
            return
        raise InputError(OBJECTS)
    check_trusted(current_name(name), place, document, trust)


def named_functions(overrides: Overrides) -> set[str]:
    """Return all functions, "package.module:function", that the user has named in overrides; they are called without a check."""
    values: dict[str, Any] = {}
    apply_overrides(values, overrides)
    return {current_name(text) for text in _texts(values) if ":" in text}


def modules_of(config: SearchConfig) -> tuple[str, ...]:
    """Return the modules that the user's own configuration names: its runs and exports may name them too."""
    names = [name for _, name in _functions_of(config) if not name.startswith(OBJECT)]
    return trusted_modules([current_name(name) for name in names])


def _functions_of(config: SearchConfig) -> Iterator[tuple[str, str]]:
    """Yield the place and the name of every function that a configuration names."""
    yield "model.factory", config.model.factory
    yield "data.name", config.data.name
    if config.task.name == FUNCTIONS:
        for option, name in FunctionsConfig(**config.task.options).names.items():
            yield f"task.{option}", name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)

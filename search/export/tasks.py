"""The task that an export was scored with, from its policy.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from secateur.envs.core import InputError
from secateur.envs.tasks.core import Task
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.imports import current_name
from secateur.envs.tasks.models import load_model
from secateur.envs.tasks.named_functions import FUNCTIONS, FunctionsConfig
from secateur.envs.tasks.registry import build_task
from secateur.search.config import DataSection, Overrides, apply_overrides
from secateur.search.config.plugins import TaskEntry
from secateur.search.export.files import POLICY
from secateur.search.export.load import Factory, build_dense
from secateur.search.given import named_given
from secateur.search.named_code import check_function, named_functions


def load_task(
    document: Mapping[str, Any], overrides: Overrides = (), factory: Factory = None, trust: Collection[str] = ()
) -> Task:
    """Return the task that an export was scored with.

    Args:
        document: content of policy.json.
        overrides: changes of the section `data`, and of `task` and `model.weights` if the task is given by functions.
        factory: of the dense model; see `load_compressed`.
        trust: modules that policy.json may name.
    Raises:
        InputError: if the data cannot be read, or policy.json names modules that are not trusted.
    """
    classification = {"name": "classification", "options": {}}  # exports of version 0.1 have no task
    values = {"data": dict(document["data_config"]), "task": document.get("task", classification), "model": {}}
    changed = apply_overrides(values, overrides)
    named = named_functions(overrides)
    if (name := current_name(str(values["data"].get("name")))) not in named:
        check_function(name, "data.name", POLICY, trust)
    of_functions = values["data"].get("name") == FUNCTIONS
    _check_changed(changed, of_functions)
    entry = _validated(TaskEntry, values["task"], "task")
    if of_functions:
        functions, weights = FunctionsConfig(**entry.options), values["model"].get("weights", document["model"].get("weights"))
        for option, name in functions.names.items():
            if name not in named:
                check_function(name, f"task.{option}", POLICY, trust)
        dense = _dense(document["model"], functions, weights, factory, trust)
        return named_given(dense, functions, document["model"]["input"], check=False).task
    section = _validated(DataSection, values["data"], "data")
    data = load_data(**section.model_dump(), input_shape=tuple(document["model"]["input"]))
    return build_task(entry.name, entry.options, data)


def _check_changed(changed: Collection[str], of_functions: bool) -> None:
    """Raise InputError if an override changes what the export itself is."""
    allowed = ("task.", "model.weights") if of_functions else ("data.",)
    example = "task.evaluate=package.module:function" if of_functions else "data.root=data/images"
    for key in changed:
        if not key.startswith(allowed):
            reason = f"must start with `{allowed[0]}`, for example {example}"
            raise InputError(f"overrides: {key}: {reason}", f"--set {key}: {reason}")


def _validated(kind: Any, values: Any, place: str) -> Any:
    """Return a section of policy.json, read as a configuration."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        raise InputError(f"`{'.'.join((place, *map(str, error['loc'])))}`: {error['msg']}.") from None


def _dense(
    model: Mapping[str, Any], named: FunctionsConfig, weights: str | None, factory: Factory, trust: Collection[str]
) -> nn.Module:
    """Return the dense model, with its weights if they matter: if the score is the divergence from it."""
    dense = build_dense(model, factory, trust)  # it also checks that the factory may be called
    if named.evaluate is not None or weights is None or not isinstance(factory, str | None):
        return dense
    return load_model(factory or model["factory"], weights, model["args"])

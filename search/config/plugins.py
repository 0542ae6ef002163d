"""Plug-ins in a configuration: their names and options are checked against the plug-in dicts when the file is read."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from secateur.cost_models.core import InputError
from secateur.envs.tasks.imports import did_you_mean
from secateur.search.config.errors import reason_of

Registry = Mapping[str, tuple[type, Any]]
"""A plug-in dict: {name: (class of its options, what makes the plug-in)}."""


class Section(BaseModel):
    """A part of the configuration; it refuses unknown keys and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginEntry(Section):
    """A plug-in by name: a bare name, or {name: ..., options: {...}}."""

    name: StrictStr
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def plugins_of(path: str) -> Registry:
    """Return the plug-in dict at "module:NAME"; it is imported late, because most plug-ins import torch."""
    module, _, name = path.partition(":")
    return cast(Registry, getattr(importlib.import_module(module), name))


def check_plugin(registry: Registry, name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError unless `registry` has `name` and its configuration takes these options."""
    if name not in registry:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise InputError(f"unknown name (got {shown}).{did_you_mean(name, registry)} Known: {', '.join(registry)}")
    check_options(registry[name][0], name, options)


def check_options(config_class: type, name: str, options: Mapping[str, Any]) -> Any:
    """Return the `config_class` object with these options.

    Raises:
        InputError: if it does not take them; the message calls the plug-in `name`.
    """
    known = [field.name for field in fields(config_class)]
    for option in options:
        if option not in known:
            takes = f"Known: {', '.join(known)}" if known else "It takes none"
            raise InputError(f"`{name}` has no option `{option}`.{did_you_mean(option, known)} {takes}")
    try:
        return TypeAdapter(config_class).validate_python(options)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        option = "".join(f" option `{part}`:" for part in error["loc"][:1])
        raise InputError(f"`{name}`:{option} {reason_of(error)}") from None


def _from_functions(value: Any) -> Any:
    """Return {evaluate: ..., calibration: ...} as the entry {name: functions, options: {...}}."""
    from secateur.envs.tasks.named_functions import FUNCTIONS

    if not isinstance(value, Mapping) or value.get("name", FUNCTIONS) != FUNCTIONS:
        return value
    options = value.get("options", {})
    if not isinstance(options, Mapping):  # the section's own check says so
        return {"name": FUNCTIONS, "options": options}
    named = {option: name for option, name in value.items() if option not in ("name", "options")}
    return {"name": FUNCTIONS, "options": {**options, **named}}


def _check_task(entry: PluginEntry) -> PluginEntry:
    from secateur.envs.metric import Metric
    from secateur.envs.tasks.named_functions import FUNCTIONS, FunctionsConfig

    tasks = plugins_of("secateur.envs.tasks.registry:TASKS")
    check_plugin({**tasks, FUNCTIONS: (FunctionsConfig, None)}, entry.name, entry.options)
    if entry.name == FUNCTIONS and isinstance(entry.options.get("metric"), Mapping):
        check_options(Metric, "metric", entry.options["metric"])
    return entry


TaskEntry = Annotated[PluginEntry, BeforeValidator(_from_functions), AfterValidator(_check_task)]
"""The task by name, or the user's own functions (`secateur.envs.tasks.named_functions`)."""


def _plugin_of(path: str) -> AfterValidator:
    def check(entry: PluginEntry) -> PluginEntry:
        check_plugin(plugins_of(path), entry.name, entry.options)
        return entry

    return AfterValidator(check)


ImportanceEntry = Annotated[PluginEntry, _plugin_of("secateur.envs.pruning.importance:IMPORTANCES")]
QuantizerEntry = Annotated[PluginEntry, _plugin_of("secateur.envs.quantization.quantizers:QUANTIZERS")]
ScoreEntry = Annotated[PluginEntry, _plugin_of("secateur.envs.scores:SCORES")]
TrackerEntry = Annotated[PluginEntry, _plugin_of("secateur.search.tracking:TRACKERS")]
RecoveryEntry = Annotated[PluginEntry, _plugin_of("secateur.envs.recovery:RECOVERIES")]

"""References of the configuration and of the command, from the code: every key and every option with its meaning."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from secateur.cost_models.core import Range
from secateur.search.benchmarks.scaffold import markdown_table
from secateur.search.config import PluginEntry, SearchConfig

PLUGINS = {
    "search.agent": ("agents", "secateur.agents:AGENTS"),
    "importance": ("importances", "secateur.envs.pruning.importance:IMPORTANCES"),
    "quantizer": ("quantizers", "secateur.envs.quantization.quantizers:QUANTIZERS"),
    "recovery": ("recoveries", "secateur.envs.recovery:RECOVERIES"),
    "search.score": ("scores", "secateur.envs.scores:SCORES"),
    "output.trackers": ("trackers", "secateur.search.tracking:TRACKERS"),
}
"""{key of the configuration: (what it names, "module:dict" of {name: (class of its options, what makes it)})}."""
DESCRIBED_ELSEWHERE = {
    "data": "secateur.envs.tasks.data:load_data",
    "space": "secateur.envs.policy_space:SpaceConfig",
    "calibration": "secateur.envs.calibration:CalibrationConfig",
}
"""{section: "module:name" of what has the docstring of its keys}."""
OPTIONS_OF_SECTIONS = {"finalize.training": "secateur.envs.training.recipe:DistillationConfig"}
"""{key of a section that holds options: "module:class" of the options}."""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping", type(None): "null", Any: "any"}
REQUIRED = "required"
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def find(path: str) -> Any:
    """Return the object at "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


# ----------------------------------------------------------------------------------------------------------- docstrings


def first_paragraph(thing: Any) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def plugin_paragraph(config: type) -> str:
    """Return the first paragraph of a plug-in's module; its options may lie in NAME_config.py or NAME/config.py."""
    return first_paragraph(importlib.import_module(re.sub(r"[._]config$", "", config.__module__)))


def meanings(thing: Any) -> dict[str, str]:
    """Return {name: what the sections "Attributes" and "Args" of a Google docstring say of it}."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if not line.startswith(" "):
            inside = line in ("Attributes:", "Args:") or (inside and not line)
        elif inside and (entry := re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line)):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif inside:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


# ---------------------------------------------------------------------------------------------------------------- types


def type_text(annotation: Any) -> str:
    """Return an annotation in words: "integer ≥ 1", "list of text or null", "`float32` or `bfloat16`"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0]) + "".join(bounds(arguments[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"list of {type_text(arguments[0])}"
    if origin is tuple and len(set(arguments)) == 1:
        return f"list of {len(arguments)}: {type_text(arguments[0])} each"
    if origin is tuple:
        return f"list of {len(arguments)}: {', '.join(map(type_text, arguments))}"
    if isinstance(annotation, type) and issubclass(annotation, PluginEntry):
        return "name, or {name, options}"
    return NAMES.get(origin or annotation, getattr(annotation, "__name__", str(annotation)).lower())


def bounds(metadata: Iterable[Any]) -> Iterator[str]:
    """Yield the bounds in the metadata of a type, such as " ≥ 1" or " in [0, 1]"."""
    for entry in metadata:
        if isinstance(entry, Range):
            yield f" {entry}"
        for part in getattr(entry, "metadata", [entry]):
            if isinstance(part, annotated_types.BaseMetadata):
                yield from (f" {BOUNDS[name]} {getattr(part, name)}" for name in BOUNDS if hasattr(part, name))


def value_text(value: Any) -> str:
    """Return a default as YAML would have it."""
    if isinstance(value, PluginEntry):
        return value.name
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {value_text(entry)}" for key, entry in value.items()) + "}"
    if dataclasses.is_dataclass(value) or isinstance(value, BaseModel):
        return ""  # a section: its own keys have defaults
    return value if isinstance(value, str) else json.dumps(value)


# -------------------------------------------------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration, or one option of a plug-in, in words."""

    name: str
    type: str
    default: str
    meaning: str


def model_keys(model: type[BaseModel], described: Any = None) -> list[Key]:
    """Return the keys of a section; `described` has the docstring of the keys, if the section itself does not."""
    hints = get_type_hints(model, include_extras=True)
    known = meanings(described or model)
    return [
        Key(name, type_text(hints[name]), default_of(field.default), known.get(name, ""))
        for name, field in model.model_fields.items()
    ]


def default_of(default: Any) -> str:
    """Return a key's default, or "required"."""
    return REQUIRED if default is PydanticUndefined else value_text(default)


def option_keys(config: type) -> list[Key]:
    """Return the options of a plug-in from its dataclass."""
    hints, known = get_type_hints(config, include_extras=True), option_meanings(config)
    return [
        Key(field.name, type_text(hints[field.name]), value_text(field.default), known.get(field.name, ""))
        for field in dataclasses.fields(config)
    ]


def option_meanings(config: type) -> dict[str, str]:
    """Return {option: meaning}; "see `Other`" takes the meaning of that class, "the top of this file" becomes the file's name."""
    file = f"`{config.__module__.removeprefix('secateur.').replace('.', '/')}.py`"
    found = {}
    for name, meaning in meanings(config).items():
        other = re.fullmatch(r"see `(\w+)`\.", meaning)
        if other:
            meaning = meanings(getattr(importlib.import_module(config.__module__), other[1])).get(name, "")
        found[name] = meaning.replace("the top of this file", file)
    return found


def key_table(keys: Iterable[Key], head: str) -> str:
    """Return a Markdown table of keys."""
    lines = [[f"`{key.name}`", key.type, code(key.default), re.sub(r"\bNone\b", "null", key.meaning)] for key in keys]
    return escaped_table([head, "type", "default", "meaning"], lines)


def code(default: str) -> str:
    """Return a default as code; "required" and "" are words."""
    return default if default in (REQUIRED, "") else f"`{default}`"


def escaped_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose cells may hold "|"."""
    return markdown_table(heads, [[cell.replace("|", "\\|") for cell in line] for line in lines])


@cache
def sections() -> dict[str, list[Key]]:
    """Return {section: its keys}; "" holds the keys of the top level that are no sections of their own."""
    hints = get_type_hints(SearchConfig)
    top = model_keys(SearchConfig)
    found = {"": [key for key in top if not is_section(hints[key.name]) and key.name not in DESCRIBED_ELSEWHERE]}
    for key in top:
        described = find(DESCRIBED_ELSEWHERE[key.name]) if key.name in DESCRIBED_ELSEWHERE else None
        if is_section(hints[key.name]):
            found[key.name] = model_keys(hints[key.name], described)
        elif described is not None:
            found[key.name] = option_keys(described)
    return found | {name: option_keys(find(path)) for name, path in OPTIONS_OF_SECTIONS.items()}


def is_section(annotation: Any) -> bool:
    """Return whether a key of the configuration holds further keys."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel) and not issubclass(annotation, PluginEntry)


def configuration_reference() -> str:
    """Return all sections of the configuration, a table each."""
    parts = []
    for name, keys in sections().items():
        parts += [f"### `{name}`" if name else "### Top level", key_table(keys, "key")]
    return "\n\n".join(parts)


def plugin_reference() -> str:
    """Return all plug-ins by the key that names them: what each does, and its options."""
    parts = []
    for key, (what, path) in PLUGINS.items():
        parts.append(f"### `{key}`: {what}")
        for name, (config, _) in find(path).items():
            options = option_keys(config)
            parts.append(f"**`{name}`**: {plugin_paragraph(config)}" + ("" if options else " No options."))
            parts += [key_table(options, "option")] if options else []
    return "\n\n".join(parts)


def cost_reference() -> str:
    """Return the costs that a budget may limit."""
    from secateur.cost_models import COST_MODELS

    return markdown_table(["cost", "meaning"], [[f"`{name}`", first_paragraph(model)] for name, model in COST_MODELS.items()])


# ------------------------------------------------------------------------------------------------------------- commands


def commands(command: Any) -> dict[str, Any]:
    """Return {"secateur benchmark search": its click command} of every command below the whole one."""

    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        children = getattr(command, "commands", {})
        if not children or command.invoke_without_command:
            yield name, command
        for child, inner in children.items():
            yield from walk(f"{name} {child}", inner)

    return dict(walk("secateur", command))


def command_reference(command: Any) -> str:
    """Return every command below the whole one: what it does, its arguments and options."""
    parts = []
    for name, one in commands(command).items():
        arguments = [parameter for parameter in one.params if parameter.param_type_name == "argument"]
        usage = " ".join([name, *(argument_text(argument) for argument in arguments)])
        parts += [f"### `{usage}`", " ".join((one.help or "").split())]
        lines = [[f"`{label(parameter)}`", default_text(parameter), parameter.help or ""] for parameter in one.params]
        parts.append(escaped_table(["argument or option", "default", "meaning"], lines))
    return "\n\n".join(parts)


def argument_text(argument: Any) -> str:
    """Return an argument as the usage line shows it, such as "CONFIG" or "[PATH]"."""
    text = (argument.metavar or argument.name.upper()).strip("[]")
    return text if argument.required else f"[{text}]"


def label(parameter: Any) -> str:
    """Return "CONFIG", "--budget", "--format table|json|csv" or "--set KEY=VALUE"."""
    if parameter.param_type_name == "argument":
        return argument_text(parameter)
    default = parameter.default
    choices = "|".join(choice.value for choice in type(default)) if isinstance(default, Enum) else ""
    return " ".join([", ".join(parameter.opts), parameter.metavar or choices]).strip()


def default_text(parameter: Any) -> str:
    """Return the default of a parameter, "required", or nothing."""
    if parameter.required:
        return REQUIRED
    default = getattr(parameter.default, "value", parameter.default)
    return "" if default in (None, False) else code(str(default))


REFERENCES: Mapping[str, Callable[[], str]] = {
    "configuration": configuration_reference,
    "plugins": plugin_reference,
    "costs": cost_reference,
}
"""{name of a block: function that returns it}."""

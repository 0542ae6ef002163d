"""Reads configurations from files, dicts and overrides, and words what is wrong in them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from os.path import exists, isfile
from pathlib import Path, PurePath
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from secateur.cost_models.core import InputError
from secateur.cost_models.reading import read_text
from secateur.envs.tasks.imports import did_you_mean
from secateur.search.config.errors import reason_of, shorten
from secateur.search.config.plugins import PluginEntry
from secateur.search.config.sections import MAX_NAME, SearchConfig

INSTALLED_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""The example configurations that are installed with the package."""

ConfigSource = SearchConfig | Mapping[str, Any] | str | os.PathLike[str]
"""What `load_config` reads: a configuration, plain dicts, or the path of a YAML file."""

Overrides = Sequence[str] | Mapping[str, Any]
"""Values that win over a configuration: "section.key=value" texts with the value in YAML, or {"section.key": value}."""


def load_config(source: ConfigSource, overrides: Overrides = ()) -> SearchConfig:
    """Return the configuration of a search.

    Args:
        source: path of a YAML file, relative to the working directory (if there is no such file, the installed example of
            that name is read); or the same content as plain dicts; or a configuration.
        overrides: ["search.evaluations=50"] or {"search.evaluations": 50}; they win over the source.
    Raises:
        InputError: one line per problem, "file: section.key: what is wrong".
    """
    if isinstance(source, SearchConfig) and not overrides:
        return source
    values, name = _values_of(source)
    overridden = apply_overrides(values, overrides)
    if name != "config":
        values = _with_prefix(values, find_config(name))
    return parse_config(values, name, overridden)


def config_values(source: ConfigSource, overrides: Overrides = ()) -> dict[str, Any]:
    """Return the plain values of a configuration with its overrides, for a machine that checks them itself.

    Args:
        source, overrides: see `load_config`.
    Raises:
        InputError: if the source or an override cannot be read; the values are not checked.
    """
    values, _ = _values_of(source)
    apply_overrides(values, overrides)
    return values


def _values_of(source: ConfigSource) -> tuple[dict[str, Any], str]:
    """Return plain values that may be changed, and the name of their source for errors."""
    if isinstance(source, SearchConfig):
        return source.model_dump(mode="json"), "config"
    if isinstance(source, Mapping):
        return plain_values(source), "config"
    return _read_yaml(find_config(source)), os.fspath(source)


def parse_config(values: Any, source: str, overridden: Collection[str] = ()) -> SearchConfig:
    """Return the configuration that plain dicts describe.

    Args:
        values: sections of keys and values, as YAML gives them.
        source: name of the source, for errors.
        overridden: "section.key" of every value that comes from overrides, for errors.
    Raises:
        InputError: see `load_config`.
    """
    try:
        return SearchConfig.model_validate(values)
    except ValidationError as errors:
        found = [_describe(error, source, overridden) for error in errors.errors(include_url=False)]
        lines, commands = dict.fromkeys(map(str, found)), dict.fromkeys(error.command for error in found)
        raise InputError("\n".join(lines), "\n".join(commands)) from None


# ---------------------------------------------------------------------------------------------------------------- files


def find_config(path: str | os.PathLike[str]) -> Path:
    """Return the file itself or the installed example; see `load_config`."""
    path = Path(path).expanduser()
    if exists(path):
        return path
    relative = Path(*path.parts[1:]) if path.parts[:1] == (INSTALLED_CONFIGS.name,) else path
    installed = INSTALLED_CONFIGS / relative
    if not path.is_absolute() and isfile(installed):
        return installed
    examples = sorted(f"configs/{file.relative_to(INSTALLED_CONFIGS)}" for file in INSTALLED_CONFIGS.rglob("*.yaml"))
    missing = f"{path}: there is no such file.{did_you_mean(str(path), examples)}"
    raise InputError(
        f"{missing} configs/starter.yaml is a configuration with comments to start from.",
        f"{missing} `secateur init` writes a starter configuration.",
    )


MAX_SHOWN = 200
"""Characters of an override in an error."""

MAX_YAML_BYTES, MAX_NODES = 1_000_000, 20_000
"""Of a configuration: its size, and the number of its values after all aliases are replaced by what they stand for."""


class _CarefulLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice (PyYAML silently keeps the last one), and more values than a configuration has."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and (size := _size(node, {})) > MAX_NODES:
            raise yaml.MarkedYAMLError(problem=f"it holds {size:,} values, more than {MAX_NODES:,}", problem_mark=node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:  # of Python's own conversions
            problem = f"{shorten(node.value)} cannot be read as {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"the key `{key}` is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a node; one that several aliases stand for counts each time."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.MarkedYAMLError(problem="an alias stands for a value that contains it", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    nodes = inner if isinstance(node, yaml.CollectionNode) else ()
    known[id(node)] = size = 1 + sum(_size(part, known) for part in nodes)
    return size


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        InputError: what is wrong with it, without the place.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"is longer than {MAX_YAML_BYTES:,} characters")
    try:
        return yaml.load(text, _CarefulLoader)
    except yaml.YAMLError as error:
        raise InputError(f"is not valid YAML: {_yaml_problem(error)}") from None
    except RecursionError:
        raise InputError("is nested too deeply") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    text = read_text(file, MAX_YAML_BYTES)
    try:
        values = load_yaml(text)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a mapping with the sections {', '.join(SearchConfig.model_fields)}")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


def _with_prefix(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Name unnamed runs after the file; leave a malformed `output` to the validation."""
    output = values.get("output", {})
    stem = re.sub(r"[^\w.-]", "_", file.stem)[:MAX_NAME]
    return {**values, "output": {"prefix": stem, **output}} if isinstance(output, dict) else values


# ------------------------------------------------------------------------------------------------- values and overrides


def plain_values(value: Any) -> Any:
    """Return a copy of nested mappings and lists, as YAML would give them: paths become texts."""
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    return str(value) if isinstance(value, PurePath) else value


def apply_overrides(values: dict[str, Any], overrides: Overrides) -> set[str]:
    """Set every override in place; return their "section.key"s.

    Raises:
        InputError: if an override cannot be read, or names a place that cannot exist.
    """
    if isinstance(overrides, Mapping):
        return {_set(values, key, plain_values(value), key) for key, value in overrides.items()}
    texts = [overrides] if isinstance(overrides, str) else overrides
    return {apply_override(values, text) for text in texts}


def apply_override(values: dict[str, Any], text: str) -> str:
    """Set one "section.key=value" in place; return "section.key"."""
    return _set(values, *override_values(text), text)


def override_values(text: str) -> tuple[str, Any]:
    """Return key and value of "section.key=value".

    Raises:
        InputError: if the text does not read so, or the value is not valid YAML.
    """
    dotted, equals, written = text.partition("=")
    if not equals:
        raise _override_error(text, _FORM)
    try:
        value = load_yaml(written)
    except InputError as error:
        raise _override_error(text, f"the value {error}") from None
    return dotted.strip(), value


_FORM = "must read section.key=value, for example search.evaluations=50"


def _set(values: dict[str, Any], dotted: str, value: Any, text: str) -> str:
    """Set the value at "section.key"; `text` is the override in errors."""
    *sections, last = keys = dotted.split(".")
    if not all(keys):
        raise _override_error(text, _FORM)
    for key in sections:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise _override_error(text, f"`{key}` is not a section, so it has no `{last}`")
    values[last] = value
    return dotted


def _override_error(text: str, reason: str) -> InputError:
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return InputError(f"overrides: {shown}: {reason}", f"--set {shown}: {reason}")


# ------------------------------------------------------------------------------------------------------------- messages


def _describe(error: ErrorDetails, source: str, overridden: Collection[str]) -> InputError:
    """Return one line for one pydantic error."""
    location = [part for part in error["loc"] if part != "[key]"]
    dotted = ".".join(map(str, location))
    from_overrides = any(dotted == key or dotted.startswith(key + ".") for key in overridden)
    place, option = ("overrides", "--set") if from_overrides else (source, source)
    where, reason = f"{dotted}: " if dotted else "", _reason(error, location)
    return InputError(f"{place}: {where}{reason}", f"{option}: {where}{reason.command}")


def _reason(error: ErrorDetails, location: Sequence[int | str]) -> InputError:
    """Return what is wrong, without the place."""
    shown = shorten(error["input"])
    match error["type"]:
        case "extra_forbidden":
            return InputError(f"unknown key (got {shown}).{did_you_mean(str(location[-1]), _known_keys(location[:-1]))}")
        case "missing":
            return InputError("is missing")
        case "model_type" | "model_attributes_type" | "dict_type":
            return InputError(f"must be a mapping (got {shown})")
        case "string_pattern_mismatch":
            return InputError(f"may hold letters, digits, `_` and `-` only (got {shown})")
        case _:
            return reason_of(error)


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Return the keys of the section at `location`."""
    section: Any = SearchConfig
    for key in location:
        field = section.model_fields.get(key) if hasattr(section, "model_fields") else None
        section = PluginEntry if key in ("importance", "quantizer", "recovery") else getattr(field, "annotation", section)
    return list(getattr(section, "model_fields", ()))

"""The configuration of a search: YAML read into frozen models; every error at once, with its place and a suggestion."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    RootModel,
    StrictBool,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from secateur.cost_models.core import InputError
from secateur.cost_models.device import DEVICE_COSTS, Device, parse_device, read_device
from secateur.envs.tasks.imports import did_you_mean

INSTALLED_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The example configurations that are installed with the package."""

TOP1_DROP = "top1_drop"
"""The one name in a budget that is no cost: the largest loss of top-1 in percentage points."""

_LIMIT = re.compile(r"(?:<=)?\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)")
_FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIMES = {"us": 1e-3, "ms": 1, "s": 1e3}  # in milliseconds
_ENERGIES = {"uJ": 1e-3, "mJ": 1, "J": 1e3}  # in millijoules
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS = {
    **{unit: ("", factor) for unit, factor in _FACTORS.items()},
    **{unit: ("bytes", factor) for unit, factor in _BYTES.items()},
    **{unit: ("ms", factor) for unit, factor in _TIMES.items()},
    **{unit: ("mj", factor) for unit, factor in _ENERGIES.items()},
}
"""{what a user writes: (`Limit.unit`, factor)}."""
_MEASURES = {"bytes": "in bytes", "ms": "in time", "mj": "in joules"}


# --------------------------------------------------------------------------------------------------------------- limits


@dataclass(frozen=True)
class Limit:
    """An upper limit of one cost.

    Attributes:
        value: a fraction of the dense model's cost if `relative`, else the cost itself.
        relative: whether it was given in percent.
        unit: "%", "bytes", "ms", "mj", or "" for a plain number.
        text: how the user wrote it.
    """

    value: float
    relative: bool
    unit: str
    text: str


def parse_limit(text: Any) -> Limit:
    """Return the limit that a text such as "<= 40%", "<= 250kB", "<= 1.5ms" or "<= 1.5 M" means; a bare number as it is.

    Raises:
        InputError: if the text is no upper limit above zero.
    """
    match = _LIMIT.fullmatch(str(text).strip()) if isinstance(text, (str, int, float)) else None
    if match is None or isinstance(text, bool):
        raise InputError(f'a limit must read like "<= 40%", "<= 250kB", "<= 1.5ms" or "<= 1.5M" (got {text!r})')
    number, written = float(match[1]), match[2]
    if written != "%" and written not in _UNITS:
        raise InputError(f"unknown unit `{written}` (got {text!r}). Known: {', '.join(['%', *filter(None, _UNITS)])}")
    if not math.isfinite(number):
        raise InputError(f"a limit must be finite (got {text!r})")
    if written == "%":
        return Limit(number / 100, True, "%", str(text))
    unit, factor = _UNITS[written]
    return Limit(number * factor, False, unit, str(text))


def _check_cost_name(name: str) -> str:
    from secateur.cost_models import COST_MODELS

    known = [*COST_MODELS, *DEVICE_COSTS, TOP1_DROP]
    if name not in known:
        raise InputError(f"unknown cost.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return name


class BudgetConfig(
    RootModel[
        dict[
            Annotated[str, AfterValidator(_check_cost_name)],
            Annotated[Limit, PlainValidator(parse_limit), PlainSerializer(lambda limit: limit.text)],
        ]
    ]
):
    """What one device allows: {cost: limit}, and perhaps `top1_drop` in percentage points."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if not self.root:
            raise InputError('a budget must limit something, for example macs: "<= 40%"')
        for name, limit in self.root.items():
            if name == TOP1_DROP and (limit.unit or limit.value > 100):
                raise InputError(f'`top1_drop` is in percentage points: write "<= 1.5" (got {limit.text!r})')
            if name != TOP1_DROP and limit.value <= 0:
                raise InputError(f"the limit of `{name}` must be above zero (got {limit.text!r})")
            if limit.unit in _MEASURES and not name.endswith(f"_{limit.unit}"):
                raise InputError(f"`{name}` is not measured {_MEASURES[limit.unit]} (got {limit.text!r})")
        return self

    @property
    def limits(self) -> dict[str, Limit]:
        """{cost: limit}."""
        return {name: limit for name, limit in self.root.items() if name != TOP1_DROP}

    @property
    def top1_drop(self) -> float | None:
        """The largest allowed loss of top-1 as a fraction, or None."""
        return self.root[TOP1_DROP].value / 100 if TOP1_DROP in self.root else None


# ------------------------------------------------------------------------------------------------------------- plug-ins


def _check_plugin(registry: Mapping[str, tuple[type, type]], name: str, options: Mapping[str, Any]) -> None:
    """Raise InputError unless `registry` has `name` and its configuration takes these options."""
    if name not in registry:
        raise InputError(f"unknown name (got {name}).{did_you_mean(name, registry)} Known: {', '.join(registry)}")
    _check_options(registry[name][0], name, options)


def _check_options(config_class: type, name: str, options: Mapping[str, Any]) -> Any:
    """Return the configuration that these options make.

    Raises:
        InputError: if it does not take them; `name` says whose they are.
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
        raise InputError(f"`{name}`:{option} {_reason(error)}") from None


def _registry(path: str) -> Mapping[str, tuple[type, type]]:
    """Return the plug-in dict at "module:NAME"; imported late, because most of them bring torch."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class Section(BaseModel):
    """A part of the configuration: nothing unknown is accepted, nothing can be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PluginEntry(Section):
    """A plug-in by name: a bare name, or {name: ..., options: {...}}."""

    name: StrictStr
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _plugin_of(path: str) -> AfterValidator:
    def check(entry: PluginEntry) -> PluginEntry:
        _check_plugin(_registry(path), entry.name, entry.options)
        return entry

    return AfterValidator(check)


RecoveryEntry = Annotated[PluginEntry, _plugin_of("secateur.envs.recovery:RECOVERIES")]


# ------------------------------------------------------------------------------------------------------------- sections


def _count_or(word: str, least: int) -> PlainValidator:
    """Accept a whole number from `least` on, or one word."""

    def check(value: Any) -> int | str:
        if value == word or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return value
        raise InputError(f"must be a whole number from {least} on, or `{word}` (got {value!r})")

    return PlainValidator(check)


ImageCount = Annotated[int | str, _count_or("rest", 1)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]


class ModelSection(Section):
    """The dense model.

    Attributes:
        factory: "package.module:function" that returns the module.
        weights: safetensors or torch file of its state dict; None: as the factory returns it.
        args: keyword arguments of the factory.
        input: (channels, height, width) of one image.
    """

    factory: StrictStr
    weights: StrictStr | None = None
    args: dict[str, Any] = {}
    input: tuple[PositiveInt, PositiveInt, PositiveInt]


class DataSection(Section):
    """The images and their splits; the attributes are the arguments of `secateur.envs.tasks.data.load_data`.

    `calibration: 0` is for importances, recoveries and quantizers that need no image.
    """

    name: StrictStr
    root: StrictStr | None = None
    calibration: Annotated[int | str, _count_or("rest", 0)] = 512
    validation: ImageCount
    test: ImageCount = "rest"
    train: Annotated[int | str, _count_or("rest", 0)] = 0
    validation_from: Literal["test", "train"] = "test"
    seed: StrictInt = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from secateur.envs.tasks.data import DATASETS

        if name not in DATASETS and ":" not in name:
            known = f'Known: {", ".join(DATASETS)}, or "package.module:function"'
            raise InputError(f"unknown data set (got {name}).{did_you_mean(name, DATASETS)} {known}")
        return name


class SearchSection(Section):
    """Who searches, and for how long.

    Attributes:
        agent: a key of `agents.AGENTS`.
        options: fields of the agent's own configuration.
        evaluations: number of policies to evaluate, shared by all budgets.
        seed: of every random choice.
        workers: evaluations at the same time: Ray workers; "auto": one per core; 0: in this process, without Ray.
        address: of a running Ray cluster; None: a local one is started for this search and ended with it.
        time_limit: seconds after which no new evaluation starts; None: no limit.
        precision: number format of the evaluations; "auto": bfloat16 where the processor has it and the dense model keeps
            its top-1. Final scores are always in float32.
        racing: whether policies that are clearly worse than a known one at the same cost are scored on the first images
            only; see envs/racing.py. With Ray, which ones these are depends on the order in which evaluations finish.
    """

    agent: StrictStr = "bee_colony"
    options: dict[str, Any] = Field({}, validate_default=True)
    evaluations: PositiveInt = 200
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    workers: Annotated[int | str, _count_or("auto", 0)] = "auto"
    address: StrictStr | None = None
    time_limit: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    racing: StrictBool = False

    @field_validator("agent")
    @classmethod
    def _known(cls, agent: str) -> str:
        _check_plugin(_registry("agents:AGENTS"), agent, {})
        return agent

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "agent" in info.data:
            _check_plugin(_registry("agents:AGENTS"), info.data["agent"], options)
        return options


class SpaceSection(Section):
    """What may be chosen; the attributes are those of `secateur.envs.policy_space.SpaceConfig`."""

    prune_ratio: tuple[float, float] | None = (0.0, 0.9)
    channel_multiple: StrictInt = 1
    weight_bits: tuple[StrictInt, ...] | None = None
    activation_bits: tuple[StrictInt, ...] | None = None
    exclude: tuple[StrictStr, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> SpaceSection:
        from secateur.envs.policy_space import SpaceConfig

        SpaceConfig(**self.model_dump())
        return self


def _with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of the calibration."""
    from secateur.envs.calibration import CalibrationConfig

    return asdict(_check_options(CalibrationConfig, "calibration", options))


CalibrationOptions = Annotated[dict[str, Any], AfterValidator(_with_defaults), Field(validate_default=True)]
"""How the calibration images are used: fields of `secateur.envs.calibration.CalibrationConfig`."""


class FinalizeSection(Section):
    """What happens to the best policies.

    Attributes:
        top: so many of each budget are finalists: repaired by `recovery`, scored on the validation split, which chooses
            the winner, and on the test split.
        recovery: plug-ins, as in `recovery` of the whole configuration; None: the same ones.
        verify: whether the winner of each budget is exported and checked from its files; see search/results/winners.py.
    """

    top: PositiveInt = 3
    verify: StrictBool = True
    recovery: tuple[RecoveryEntry, ...] | None = (PluginEntry(name="sequential"),)


class OutputSection(Section):
    """Where the run is written: `root`/`name`, or `root`/`prefix`-1, -2 and so on while there is no name."""

    root: StrictStr = "runs"
    name: Annotated[StrictStr, Field(pattern=r"^[\w.-]*\w$")] | None = None
    prefix: Annotated[StrictStr, Field(pattern=r"^[\w.-]*\w$")] = "search"


class DeviceProfile(Section):
    """A device that is measured before the search: this machine, with the model; see search/profiling/search_device.py.

    Attributes:
        profile: "quick" takes seconds and measures few channel counts, "full" is what `secateur profile` does.
        runtime: what executes the model, a key of `secateur.search.profiling.runtimes.RUNTIMES`.
        threads: of the runtime.
        batch: images per run.
    """

    profile: Literal["quick", "full"] = "quick"
    runtime: StrictStr = "onnxruntime"
    threads: PositiveInt = 1
    batch: PositiveInt = 1


def _load_device(value: Any) -> Device | DeviceProfile | None:
    """Return the device that a path names or a manifest holds, or the profile that will measure it."""
    if value is None or isinstance(value, (Device, DeviceProfile)):
        return value
    if value == "profile":
        return DeviceProfile()
    if isinstance(value, Mapping) and "schema" in value:
        return parse_device(value, "the device")
    if isinstance(value, Mapping):
        return _load_profile(value)
    if isinstance(value, str):
        return read_device(value)
    raise InputError(f"must be the path of a device file, or `profile` (got {_shorten(value)})")


def _load_profile(values: Mapping[str, Any]) -> DeviceProfile:
    try:
        return DeviceProfile.model_validate(values)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        name, known = ".".join(map(str, error["loc"])), list(DeviceProfile.model_fields)
        if error["type"] == "extra_forbidden":
            raise InputError(f"has no option `{name}`.{did_you_mean(name, known)} Known: {', '.join(known)}") from None
        raise InputError(f"option `{name}`: {_reason(error)}") from None


def _dump_device(device: Device | DeviceProfile | None) -> dict[str, Any] | None:
    if isinstance(device, DeviceProfile):
        return device.model_dump(mode="json")
    return None if device is None else device.document()


DeviceEntry = Annotated[Device | DeviceProfile | None, PlainValidator(_load_device), PlainSerializer(_dump_device)]
"""A device file, or `profile`: this machine is measured. A file is read here, and a profile is made when the problem is built, so
that a run's manifest holds the device as it was when the run began."""

BudgetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class SearchConfig(Section):
    """A whole search. See configs/searches/ for examples with comments."""

    model: ModelSection
    data: DataSection
    device: DeviceEntry = None
    search: SearchSection = SearchSection.model_construct()
    space: SpaceSection = SpaceSection.model_construct()
    importance: Annotated[PluginEntry, _plugin_of("secateur.envs.pruning.importance:IMPORTANCES")] = PluginEntry(name="l1_norm")
    quantizer: Annotated[PluginEntry, _plugin_of("secateur.envs.quantization.quantizers:QUANTIZERS")] = PluginEntry(
        name="uniform"
    )
    recovery: tuple[RecoveryEntry, ...] = (
        PluginEntry(name="least_squares"),
        PluginEntry(name="batch_norm"),
    )
    calibration: CalibrationOptions = {}
    budgets: Annotated[dict[BudgetName, BudgetConfig], Field(min_length=1)]
    finalize: FinalizeSection = FinalizeSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _device_knows_the_limited_costs(self) -> SearchConfig:
        if isinstance(self.device, DeviceProfile):
            known, label = ("latency_ms",), "that is profiled"
        else:
            known, label = ((), "") if self.device is None else (tuple(self.device.cost_models()), f"'{self.device.name}'")
        for name, budget in self.budgets.items():
            for cost in budget.limits:
                if cost not in DEVICE_COSTS or cost in known:
                    continue
                if self.device is None:
                    reason = (
                        "needs a `device`: write `device: profile` to measure this machine, or name a device file, such as "
                        "configs/devices/h200.json or one that `secateur profile` writes"
                    )
                else:
                    reason = (
                        f"is not known of the device {label}, only {', '.join(known)}: name another `device`, "
                        "or leave the limit out"
                    )
                raise InputError(f"`budgets.{name}.{cost}` {reason}")
        return self


# -------------------------------------------------------------------------------------------------------------- reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Return the configuration in a YAML file.

    Args:
        path: relative to the working directory; if there is no such file, the installed example of that name is read.
        overrides: "section.key=value" texts, the value in YAML; they win over the file.
    Raises:
        InputError: one line per problem, "file: section.key: what is wrong".
    """
    file = find_config(path)
    values = _read_yaml(file)
    overridden = {apply_override(values, text) for text in overrides}
    values = _with_prefix(values, file)
    return parse_config(values, str(path), overridden)


def parse_config(values: Any, source: str, overridden: set[str] = frozenset()) -> SearchConfig:
    """Return the configuration that plain dicts describe; `source` names them in errors, see `load_config`."""
    try:
        return SearchConfig.model_validate(values)
    except ValidationError as errors:
        lines = dict.fromkeys(_describe(error, source, overridden) for error in errors.errors(include_url=False))
        raise InputError("\n".join(lines)) from None


def find_config(path: str | Path) -> Path:
    """Return the file itself or the installed example; see `load_config`."""
    path = Path(path).expanduser()
    if path.exists():
        return path
    relative = Path(*path.parts[1:]) if path.parts[:1] == (INSTALLED_CONFIGS.name,) else path
    installed = INSTALLED_CONFIGS / relative
    if not path.is_absolute() and installed.is_file():
        return installed
    examples = sorted(f"configs/{file.relative_to(INSTALLED_CONFIGS)}" for file in INSTALLED_CONFIGS.rglob("*.yaml"))
    raise InputError(
        f"{path}: there is no such file.{did_you_mean(str(path), examples)} `secateur init` writes a starter configuration."
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice; PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"the key `{key}` is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a mapping with the sections {', '.join(SearchConfig.model_fields)}")
    return values


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or error}{where}"


def apply_override(values: dict[str, Any], text: str) -> str:
    """Set one "a.b=value" in place; return "a.b"."""
    dotted, equals, value = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {text}: must read section.key=value, for example search.evaluations=50")
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise InputError(f"--set {text}: `{key}` is not a section, so it has no `{keys[-1]}`")
    try:
        values[keys[-1]] = yaml.load(value, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise InputError(f"--set {text}: the value is not valid YAML: {_yaml_problem(error)}") from None
    return ".".join(keys)


def _with_prefix(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Name unnamed runs after the file; leave a malformed `output` to the validation."""
    output = values.get("output", {})
    stem = re.sub(r"[^\w.-]", "_", file.stem)
    return {**values, "output": {"prefix": stem, **output}} if isinstance(output, dict) else values


def _describe(error: Mapping[str, Any], source: str, overridden: set[str]) -> str:
    """Return one line for one pydantic error."""
    location = [part for part in error["loc"] if part != "[key]"]
    dotted = ".".join(map(str, location))
    place = "--set" if any(dotted == key or dotted.startswith(key + ".") for key in overridden) else source
    shown = _shorten(error["input"])
    match error["type"]:
        case "extra_forbidden":
            reason = f"unknown key (got {shown}).{did_you_mean(str(location[-1]), _known_keys(location[:-1]))}"
        case "missing":
            reason = "is missing"
        case "model_type" | "model_attributes_type" | "dict_type":
            reason = f"must be a mapping (got {shown})"
        case "string_pattern_mismatch":
            reason = f"may hold letters, digits, `_` and `-` only (got {shown})"
        case _:
            reason = _reason(error)
    return f"{place}: {dotted}: {reason}" if dotted else f"{place}: {reason}"


def _reason(error: Mapping[str, Any]) -> str:
    """Return what a pydantic error says: our own words if a check of ours raised it."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]} (got {_shorten(error['input'])})"


def _known_keys(location: Sequence[Any]) -> list[str]:
    """Return the keys that the section at `location` has."""
    section: Any = SearchConfig
    for key in location:
        field = section.model_fields.get(key) if hasattr(section, "model_fields") else None
        section = PluginEntry if key in ("importance", "quantizer", "recovery") else getattr(field, "annotation", section)
    return list(getattr(section, "model_fields", ()))


def _shorten(value: Any, length: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."

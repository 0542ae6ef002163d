"""The sections of a configuration, and the whole of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from secateur.cost_models.core import InputError
from secateur.cost_models.device import DEVICE_COSTS, Device, parse_device, read_device
from secateur.envs.tasks.imports import current_name, did_you_mean
from secateur.envs.tasks.named_functions import FUNCTIONS
from secateur.search.config.errors import reason_of, shorten
from secateur.search.config.limits import BudgetConfig
from secateur.search.config.plugins import (
    ImportanceEntry,
    PluginEntry,
    QuantizerEntry,
    RecoveryEntry,
    ScoreEntry,
    Section,
    TaskEntry,
    TrackerEntry,
    check_options,
    check_plugin,
    plugins_of,
)

AUTO = "auto"

LEAST_CHECKED = 4
"""Fewer policies have no rank correlation with an interval."""


def _count_or(word: str, least: int) -> PlainValidator:
    """Accept a whole number that is at least `least`, or one word."""

    def check(value: Any) -> int | str:
        if value == word or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
            return value
        raise InputError(f"must be a whole number from {least} on, or `{word}` (got {value!r})")

    return PlainValidator(check)


def _share_or(word: str) -> PlainValidator:
    """Accept a number that is at least 0, or one word."""

    def check(value: Any) -> float | str:
        if value == word or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf):
            return value
        raise InputError(f"must be a number from 0 on, or `{word}` (got {value!r})")

    return PlainValidator(check)


def _checked_policies(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and (value == 0 or value >= LEAST_CHECKED):
        return value
    raise InputError(f"must be a number of policies from {LEAST_CHECKED} on, or 0 for no check (got {value!r})")


def _seconds_or_auto(value: Any) -> float | str:
    if value == AUTO or (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise InputError(f"must be a number of seconds above 0, or `{AUTO}` (got {value!r})")


ImageCount = Annotated[int | str, _count_or("rest", 1)]
OptionalImageCount = Annotated[int | str, _count_or("rest", 0)]
PositiveInt = Annotated[StrictInt, Field(ge=1)]


class ModelSection(Section):
    """The dense model.

    Attributes:
        factory: function that returns the module: "secateur:resnet56", "torchvision:resnet18" or "package.module:function".
        weights: safetensors or torch file of its state dict; "trained": train it first; None: as the factory returns it.
        args: keyword arguments of the factory.
        input: shape of one input, usually (channels, height, width) of an image.
        part: path of the submodule that is compressed, or several; None: the whole model. The whole is scored.
    """

    factory: Annotated[StrictStr, AfterValidator(current_name)]
    weights: StrictStr | None = None
    args: dict[str, Any] = {}
    input: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    part: Annotated[tuple[StrictStr, ...], Field(min_length=1)] | None = None

    @field_validator("part", mode="before")
    @classmethod
    def _from_one_path(cls, part: Any) -> Any:
        return (part,) if isinstance(part, str) else part


class DataSection(Section):
    """The images and their splits; the attributes are the arguments of `secateur.envs.tasks.data.load_data`.

    `calibration: 0` suits importances, recoveries and quantizers that need no image.
    """

    name: StrictStr
    root: StrictStr | None = None
    calibration: OptionalImageCount = 512
    validation: ImageCount
    test: ImageCount = "rest"
    train: OptionalImageCount = 0
    validation_from: Literal["test", "train"] = "test"
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        from secateur.envs.tasks.data import DATASETS

        name = current_name(name)
        if name not in DATASETS and ":" not in name and name != FUNCTIONS:
            known = f'Known: {", ".join(DATASETS)}, or "package.module:function"'
            raise InputError(f"unknown data set (got {name}).{did_you_mean(name, DATASETS)} {known}")
        return name


class SearchSection(Section):
    """The agent, the number of evaluations and how they run.

    Attributes:
        agent: a key of `agents.AGENTS`.
        options: fields of the agent's own configuration.
        evaluations: number of policies to evaluate, shared by all budgets.
        score: what the search maximizes. `metric`: the task's metric on the validation split; `divergence`: agreement with the
            dense model's outputs on calibration samples, without labels. Finalists are always compared by the metric.
        check_score: number of policies near greedy's for a check of the score before the first evaluation: its rank correlation
            with the quality of their outputs after the finalists' recovery. At least 4; 16 give an informative interval. Each
            takes an evaluation and a repair as of finalists, which do not count as evaluations. 0: no check.
        seed: random seed of the agent and of everything else that draws random numbers.
        workers: number of evaluations at the same time, each in a Ray worker; "auto": one per core, or as many as the GPUs
            have room for; 0: in this process, without Ray.
        gpus_per_worker: how much of a GPU a worker takes: 0.25 lets four of them share one; "auto": a whole one if
            `compute.device` is a GPU. 0: Ray assigns none.
        address: address of a running Ray cluster; None: the search starts a local one, and stops it at the end.
        time_limit: seconds after which no new evaluation starts; None: no limit.
        evaluation_timeout: seconds after which one evaluation is ended, with its worker; the second time, the policy has failed.
            "auto": 20 times the longest evaluation so far, at least a minute; half an hour until one has finished. An evaluation
            in the search's own process (`workers: 0`) cannot be ended.
        precision: number format of the evaluations; "auto": bfloat16 where the processor or GPU supports it (float16 on older
            GPUs) and the dense model keeps its score. Final scores are always computed in float32.
        racing: whether the evaluation of a policy stops after the first images if it is clearly worse than an evaluated
            one of the same cost; see envs/racing.py. It has no effect unless the metric is a share of correct answers. With
            Ray, the order in which evaluations finish decides which ones stop.
    """

    agent: StrictStr = "bee_colony"
    options: dict[str, Any] = Field({}, validate_default=True)
    evaluations: PositiveInt = 200
    score: ScoreEntry = PluginEntry(name="metric")
    check_score: Annotated[int, PlainValidator(_checked_policies)] = 0
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    workers: Annotated[int | str, _count_or(AUTO, 0)] = AUTO
    gpus_per_worker: Annotated[float | str, _share_or(AUTO)] = AUTO
    address: StrictStr | None = None
    time_limit: Annotated[float, Field(gt=0)] | None = None
    evaluation_timeout: Annotated[float | str, PlainValidator(_seconds_or_auto)] = AUTO
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    racing: StrictBool = False

    @model_validator(mode="after")
    def _evaluations_can_be_ended(self) -> SearchSection:
        if self.workers == 0 and self.evaluation_timeout != AUTO:
            raise InputError(
                "`evaluation_timeout` needs workers, because an evaluation in the search's own process cannot be ended: write "
                "`workers: 1` or more"
            )
        return self

    @field_validator("agent")
    @classmethod
    def _known(cls, agent: str) -> str:
        check_plugin(plugins_of("secateur.agents:AGENTS"), agent, {})
        return agent

    @field_validator("options")
    @classmethod
    def _accepted(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "agent" in info.data:
            check_plugin(plugins_of("secateur.agents:AGENTS"), info.data["agent"], options)
        return options


class ComputeSection(Section):
    """Where the networks are computed: calibration, importances, sensitivities, evaluation, repair and training.

    Attributes:
        device: "cpu"; "cuda" or "cuda:1": a GPU; "auto": a GPU where there is one. Exports are written and verified on the
            CPU, and latencies are measured by the runtime of the `device` at the top level.
    """

    device: StrictStr = "auto"

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise InputError(f"must be `auto`, `cpu`, `cuda`, or the number of a GPU such as `cuda:1` (got {device})")
        return device


class SpaceSection(Section):
    """The choices of a search; the attributes are those of `secateur.envs.policy_space.SpaceConfig`."""

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

    return asdict(check_options(CalibrationConfig, "calibration", options))


CalibrationOptions = Annotated[dict[str, Any], AfterValidator(_with_defaults), Field(validate_default=True)]
"""Options of the calibration pass: fields of `secateur.envs.calibration.CalibrationConfig`."""


def _training_with_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of the training."""
    from secateur.envs.training.recipe import DistillationConfig

    return asdict(check_options(DistillationConfig, "training", options))


TrainingOptions = Annotated[dict[str, Any], AfterValidator(_training_with_defaults)]
"""Options of the training of winners: fields of `secateur.envs.training.recipe.DistillationConfig`."""


class FinalizeSection(Section):
    """The end of a search.

    Attributes:
        top: number of finalists of each budget. They are repaired by `recovery` and scored on the validation split, which
            decides the winner, and on the test split.
        recovery: plug-ins, as in `recovery` of the whole configuration; None: the same ones.
        verify: whether the winner of each budget is exported and verified from its files; see search/results/winners.py.
        training: options of the training of the winners at the end of the search, as in the table `finalize.training`; None, or
            `epochs: 0`: they are not trained. `secateur finalize` trains with the same options.
    """

    top: PositiveInt = 3
    verify: StrictBool = True
    recovery: tuple[RecoveryEntry, ...] | None = (PluginEntry(name="sequential"),)
    training: TrainingOptions | None = None


MAX_NAME = 60
"""Characters of a name that becomes the name of a folder: at most 255 bytes, with room for endings."""

FolderName = Annotated[StrictStr, Field(pattern=r"^[\w.-]*\w$", max_length=MAX_NAME)]


class OutputSection(Section):
    """The run's folder: `root`/`name`; without a name `root`/`prefix`-1, `root`/`prefix`-2, and so on.

    Attributes:
        root: folder that holds the runs.
        name: name of the run's folder, which must not exist yet; None: `prefix` and the first free number.
        prefix: start of the folder's name; by default the name of the configuration file.
        trackers: what follows the search: [tensorboard, {name: mlflow, options: {experiment: phones}}].
    """

    root: StrictStr = "runs"
    name: FolderName | None = None
    prefix: FolderName = "search"
    trackers: tuple[TrackerEntry, ...] = ()


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
    raise InputError(f"must be the path of a device file, or `profile` (got {shorten(value)})")


def _load_profile(values: Mapping[str, Any]) -> DeviceProfile:
    try:
        return DeviceProfile.model_validate(values)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        name, known = ".".join(map(str, error["loc"])), list(DeviceProfile.model_fields)
        if error["type"] == "extra_forbidden":
            raise InputError(f"has no option `{name}`.{did_you_mean(name, known)} Known: {', '.join(known)}") from None
        raise InputError(f"option `{name}`: {reason_of(error)}") from None


def _dump_device(device: Device | DeviceProfile | None) -> dict[str, Any] | None:
    if isinstance(device, DeviceProfile):
        return device.model_dump(mode="json")
    return None if device is None else device.document()


DeviceEntry = Annotated[Device | DeviceProfile | None, PlainValidator(_load_device), PlainSerializer(_dump_device)]
"""A device file, or `profile`: this machine is measured. A file is read here, and a profile is made when the problem is built, so
that a run's manifest holds the device as it was when the run started."""

BudgetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=MAX_NAME)]


class SearchConfig(Section):
    """A whole search. See configs/searches/ for examples with comments.

    Attributes:
        task: what the model is for: its metric and loss. A task in the box, or your own functions: {evaluate, calibration, ...}.
        device: device file, measured by `secateur profile` or from data sheets; "profile": this machine is measured before the
            search. Needed for limits of latency_ms and energy_mj.
        importance: criterion by which channels are removed.
        quantizer: how weights and inputs are rounded.
        recovery: repairs of every candidate, in this order; []: none.
        budgets: {name: {cost: limit}}, at least one; all limits of a budget are hard.
    """

    model: ModelSection
    data: DataSection
    task: TaskEntry = PluginEntry(name="classification")
    device: DeviceEntry = None
    search: SearchSection = SearchSection.model_construct()
    compute: ComputeSection = ComputeSection()
    space: SpaceSection = SpaceSection.model_construct()
    importance: ImportanceEntry = PluginEntry(name="l1_norm")
    quantizer: QuantizerEntry = PluginEntry(name="uniform")
    recovery: tuple[RecoveryEntry, ...] = (PluginEntry(name="least_squares"), PluginEntry(name="batch_norm"))
    calibration: CalibrationOptions = {}
    budgets: Annotated[dict[BudgetName, BudgetConfig], Field(min_length=1)]
    finalize: FinalizeSection = FinalizeSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="before")
    @classmethod
    def _functions_have_data(cls, values: Any) -> Any:
        """Fill in the section `data` if the task is given by functions, which bring their own."""
        functions = isinstance(values, Mapping) and isinstance(values.get("task"), Mapping)
        if not functions or values["task"].get("name", FUNCTIONS) != FUNCTIONS or "data" in values:
            return values
        return {**values, "data": {"name": FUNCTIONS, "validation": 1}}

    @model_validator(mode="after")
    def _functions_stand_alone(self) -> SearchConfig:
        if (self.task.name == FUNCTIONS) != (self.data.name == FUNCTIONS):
            raise InputError("`task` names functions, which bring their own data: leave out `data`")
        if self.task.name == FUNCTIONS and self.model.weights == "trained":
            raise InputError("`model.weights: trained` needs a task with training data: name a file of weights")
        return self

    @model_validator(mode="after")
    def _device_has_the_limited_costs(self) -> SearchConfig:
        known: tuple[str, ...] = ()
        if self.device is not None:
            known = ("latency_ms",) if isinstance(self.device, DeviceProfile) else tuple(self.device.cost_models())
        for name, budget in self.budgets.items():
            for cost in budget.limits:
                if cost in DEVICE_COSTS and cost not in known:
                    raise _missing_cost(f"`budgets.{name}.{cost}`", self.device, known)
        return self


def _missing_cost(place: str, device: Device | DeviceProfile | None, known: tuple[str, ...]) -> InputError:
    """Return the error for a limit of a cost that the device does not have."""
    if device is not None:
        label = "that is profiled" if isinstance(device, DeviceProfile) else f"'{device.name}'"
        return InputError(
            f"{place} is not known of the device {label}, only {', '.join(known)}: name another `device`, or leave the limit out"
        )
    needs = (
        f"{place} needs a `device`: write `device: profile` to measure this machine, or name a device file, such as "
        "configs/devices/h200.json or one that"
    )
    return InputError(f"{needs} `secateur.profile` writes", f"{needs} `secateur profile` writes")

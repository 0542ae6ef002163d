"""From a configuration to objects: the only place where names become models, data, plug-ins and budgets."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from secateur.agents import AGENTS
from secateur.agents.core import Agent, needs_sensitivities
from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import CostModel
from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, LayerPlan, cached_calibration, plan_calibration
from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, Evaluation, InputError, Sensitivities
from secateur.envs.costs import PolicyCosts
from secateur.envs.devices import AUTO, CPU, find_device, move_network
from secateur.envs.evaluator import Evaluator, Precision, choose_precision
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.inputs import Inputs, positional, tensors_of_inputs
from secateur.envs.memory import IMPORTANCE, halving
from secateur.envs.metric import Metric
from secateur.envs.model_graph import ModelGraph, analyze
from secateur.envs.parts import PartTask, take_parts
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.envs.projection import FeasibilityProjection
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.common.unit_slices import mean_over_producers
from secateur.envs.pruning.importance.core import DenseModel, Importance
from secateur.envs.pruning.slicing import slice_model
from secateur.envs.quantization.quantizers import QUANTIZERS, Quantizer
from secateur.envs.racing import Race
from secateur.envs.recovery import RECOVERIES, Recovery
from secateur.envs.recovery.core import HasQuickForm
from secateur.envs.rollout import chosen_policy
from secateur.envs.scores import SCORES, Score, ScoreConfig
from secateur.envs.sensitivity import IMAGES, measure_sensitivities
from secateur.envs.tasks.core import Task, all_samples, check_finite, first_inputs, first_outputs
from secateur.envs.tasks.data import load_data
from secateur.envs.tasks.models import load_model
from secateur.envs.tasks.named_functions import FUNCTIONS, FunctionsConfig
from secateur.envs.tasks.registry import build_task
from secateur.envs.tasks.training import Progress, TrainingProgress, cache_directory
from secateur.search.config import BudgetConfig, DeviceProfile, PluginEntry, SearchConfig
from secateur.search.given import Given, named_given
from secateur.search.loop import Runner
from secateur.search.problem import Evaluated, Problem, StatusCallback
from secateur.search.results.front import Front
from secateur.search.run.evaluation_timeout import EvaluationTimeout
from secateur.search.run.local_runner import LocalRunner
from secateur.search.run.ray_cluster import LOCAL
from secateur.search.run.ray_runner import RayRunner
from secateur.search.tracking import TRACKERS
from secateur.search.tracking.core import SearchStart, Tracker, Trackers

log = logging.getLogger(__name__)

CHECKED_IMAGES = 256
"""Number of validation images for which the dense network's outputs are checked before anything else is computed."""


def build_model_and_graph(config: SearchConfig, status: StatusCallback = log.info) -> tuple[Task, nn.Module, ModelGraph]:
    """Return task, model and graph of the sections `model`, `data` and `task`: what `secateur inspect` needs.

    Args:
        config: the configuration.
        status: status callback; called at each stage, and at each epoch if the model is trained first.
    Raises:
        InputError: for anything in the configuration that cannot be used.
    """
    if config.task.name == FUNCTIONS:
        status("loading the model and the functions of the task")
        dense = load_model(config.model.factory, config.model.weights, config.model.args, status=status)
        given = named_given(dense, build_options(FunctionsConfig, config.task.options), config.model.input)
        return traced(given.task, given.model, given.example, config, status)
    status("loading data")
    data = load_data(**config.data.model_dump(), input_shape=config.model.input)
    task = build_task(config.task.name, config.task.options, data)
    status("loading the model")
    model = load_model(
        config.model.factory, config.model.weights, config.model.args, task, _epochs_to(status, task.metric), status
    )
    task = task.without_training_data()
    return traced(task, model, first_inputs(task, "validation", 1)[0], config, status)


def traced(
    task: Task, model: nn.Module, example: Inputs, config: SearchConfig, status: StatusCallback
) -> tuple[Task, nn.Module, ModelGraph]:
    """Return task, model and graph of what is compressed: the model, or its parts (`model.part`).

    Raises:
        InputError: if the model does not suit the task, or cannot be traced.
    """
    status("tracing the model")
    task.check(first_outputs(model, example, f"Check `model.input`, `data` and `task: {config.task.name}`."))
    if parts := config.model.part or task.parts_of(model):
        task, model = take_parts(task, model, parts)
        example = first_inputs(task, "validation", 1)[0]
    return task, model, analyze(positional(model, example), tuple(tensors_of_inputs(example)), exclude=config.space.exclude)


def _epochs_to(status: StatusCallback, metric: Metric) -> Progress:
    """Return a progress callback that reports each epoch of a training through `status`."""

    def report(at: TrainingProgress) -> None:
        score = "" if at.score is None else f", {metric.label} {metric.text(at.score)}"
        status(f"training the model, epoch {at.epoch} of {at.epochs}: loss {at.loss:.3f}{score}")

    return report


def resolve_device(config: SearchConfig, model: nn.Module, graph: ModelGraph, status: StatusCallback = log.info) -> SearchConfig:
    """Return the configuration with a measured device in place of `device: profile`; see `with_measured_device`."""
    if not isinstance(config.device, DeviceProfile):
        return config
    # Imported late: workers import this module, and a profile brings ONNX and its runtime, which take a second.
    from secateur.search.profiling.search_device import with_measured_device

    return with_measured_device(config, model, graph, status)


def build_costs(config: SearchConfig, graph: ModelGraph) -> PolicyCosts:
    """Return the costs of the policies that the configuration allows.

    Raises:
        InputError: if there is nothing to choose, or the device's table has no latencies of such layers.
    """
    space = PolicySpace(graph, SpaceConfig(**config.space.model_dump()))
    costs = PolicyCosts(space, build_cost_models(config))
    costs.of_levels(_every_precision(space))  # a table may have the dense layers and lack those in integers
    return costs


def _every_precision(space: PolicySpace) -> np.ndarray:
    """Return the levels of policies, (policies, decisions), that between them have every combination of bit-widths."""
    kinds = [kind for kind in space.kinds if kind != "prune_ratio"]
    choices = [range(max(len(d.levels) for d in space.decisions if d.kind == kind)) for kind in kinds]
    combinations = [dict(zip(kinds, levels, strict=True)) for levels in product(*choices)]
    return np.array([[combination.get(d.kind, 0) for d in space.decisions] for combination in combinations])


def build_cost_models(config: SearchConfig) -> dict[str, CostModel]:
    """Return every cost model: those that hold on all devices, and those of the configuration's device.

    Raises:
        InputError: if the device is a profile that was not made (`with_measured_device`).
    """
    if isinstance(config.device, DeviceProfile):
        raise InputError(
            "`device: profile` is not measured by this command. Measure the machine once with `secateur profile CONFIG --quick "
            "--output device.json`, and name that file in `device`."
        )
    own = {} if config.device is None else config.device.cost_models()
    return {**{name: model() for name, model in COST_MODELS.items()}, **own}


def build_budgets(config: SearchConfig, costs: PolicyCosts, metric: Metric) -> tuple[Budget, ...]:
    """Return the configuration's budgets with absolute limits (not yet checked)."""
    return tuple(absolute_budget(name, budget, costs.dense, metric) for name, budget in config.budgets.items())


def absolute_budget(name: str, config: BudgetConfig, dense_costs: Mapping[str, float], metric: Metric) -> Budget:
    """Return the budget with every limit in the cost's own unit (not yet checked).

    Raises:
        InputError: if the budget limits the loss of another metric, or a cost that is not known.
    """
    for cost in config.limits:
        if cost not in dense_costs:
            known = ", ".join(dense_costs)
            raise InputError(f"The search knows no `{cost}`, only {known}: it has no device with that cost. Limit one of these.")
    limits = {cost: limit.value * dense_costs[cost] if limit.relative else limit.value for cost, limit in config.limits.items()}
    return Budget(name, limits, config.metric_drop(metric))


def build_objectives(config: SearchConfig, costs: PolicyCosts, metric: Metric) -> tuple[str, ...]:
    """Return the names of the reward's components: the score, then every cost that some budget limits, or else macs.

    Raises:
        InputError: if the metric has the name of a cost.
    """
    if metric.name in costs.models:
        raise InputError(f"A metric cannot be called `{metric.name}`, which is a cost. Give it another name.")
    limited = [name for name in costs.models if any(name in budget.limits for budget in config.budgets.values())]
    return (metric.name, *(limited or ["macs"]))


def build_problem(config: SearchConfig, status: StatusCallback = log.info, given: Given | None = None) -> Problem:
    """Return the search that the configuration describes.

    Args:
        config: the configuration.
        status: status callback; called at each stage, and at each epoch if the model is trained first.
        given: model and task as Python objects; None: the configuration names them.
    Raises:
        InputError: for anything in the configuration that cannot be used, before anything is written.
    """
    device = driver_device(config)  # refused before anything is loaded
    if given is None:
        task, model, graph = build_model_and_graph(config, status)
    else:
        task, model, graph = traced(given.task, given.model, given.example, config, status)
    _held_out(config, task.samples("calibration"))  # refused before a device is measured
    config = resolve_device(config, model, graph, status)
    costs = build_costs(config, graph)
    budgets, projection = build_budgets(config, costs, task.metric), FeasibilityProjection(costs)
    for budget in budgets:
        projection.check(budget)
    task, model = _moved(task, model, device)
    check_finite(model, first_inputs(task, "validation", CHECKED_IMAGES))
    assembler, finalist_assembler = build_assemblers(config, task, model, graph, status)
    status("scoring the dense model")
    dense = dense_evaluation(task, model, costs)
    score = build_score(config, task, model, dense.score)
    everything = [np.arange(group.units) for group in graph.groups]
    if isinstance(task, PartTask):
        precision = Precision("float32", "parts of a model are scored in float32")
    elif config.search.precision == "auto":
        precision = choose_precision(lambda: slice_model(model, graph, everything), graph, task, dense.score, device)
    else:
        precision = Precision(config.search.precision, "chosen in the configuration")
    magnitudes = [mean_over_producers(model, group, lambda rows: rows.abs().mean(1)) for group in graph.groups]
    objectives = build_objectives(config, costs, score.metric)
    space = FeasibleSpace(costs, objectives, score.metric, score.dense, magnitudes)
    return Problem(config, task, assembler, finalist_assembler, score, space, budgets, dense, precision, given, device)


def driver_device(config: SearchConfig) -> torch.device:
    """Return where this process computes. The driver of a search on a cluster needs no GPU: its workers have them.

    Raises:
        InputError: if `compute.device` is a GPU that is not there.
    """
    try:
        return find_device(config.compute.device)
    except InputError:
        if config.search.address is None or config.search.workers == 0:
            raise
        return CPU


def _moved(task: Task, model: nn.Module, device: torch.device) -> tuple[Task, nn.Module]:
    """Return task and model on a device; parts of a model stay those of the task's whole."""
    task = task.on(device)
    return task, task.parts if isinstance(task, PartTask) else move_network(model, device)


def build_score(config: SearchConfig, task: Task, model: nn.Module, dense: float) -> Score:
    """Return what the search maximizes; `dense` is the validation score of the dense model."""
    config_class, score = SCORES[config.search.score.name]
    built: Score = score(build_options(config_class, config.search.score.options), task, model, dense)
    return built


def dense_evaluation(task: Task, model: nn.Module, costs: PolicyCosts) -> Evaluation:
    """Return the float32 score of the dense model on the validation split, with its costs."""
    found = task.evaluate(model, "validation")
    quality = task.metric.quality(found.score, found.score)
    return Evaluation(found.score, costs.dense, "proxy", found.samples, quality=quality)


def build_assemblers(
    config: SearchConfig, task: Task, model: nn.Module, graph: ModelGraph, status: StatusCallback = log.info
) -> tuple[Assembler, Assembler]:
    """Return what turns policies into networks, for the search and for finalists.

    The calibration pass runs only if anything in the configuration needs it.

    Raises:
        InputError: if something needs images and there are none.
    """
    plugins = _Plugins.of(config)
    calibration = images = labels = None
    if users := _image_users(config, plugins):
        if not task.samples("calibration"):
            raise InputError(
                f"`data.calibration` is 0, but calibration images are needed by {', '.join(users)}. "
                "Set `data.calibration` to a number of images, or choose what needs none, such as the recovery `data_free`."
            )
        images, labels = _seen_by_recoveries(config, *all_samples(task, "calibration"))
        settings = build_options(CalibrationConfig, config.calibration)
        calibration = cached_calibration(model, graph, images, settings, cache_directory() / "calibration", status)
    status("ranking the channels")

    def scores_in(parts: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(config.search.seed)
        return plugins.importance.scores(DenseModel(model, graph, calibration, images, labels, rng, task.loss, parts))

    scores = halving(IMPORTANCE, scores_in)
    assembler = Assembler(model, graph, tuple(scores), plugins.quantizer, plugins.recoveries, calibration, images)
    return assembler, replace(assembler, recoveries=plugins.finalist_recoveries)


def _seen_by_recoveries(config: SearchConfig, images: Inputs, labels: Tensor | None) -> tuple[Inputs, Tensor | None]:
    """Return the calibration samples without those that the search's score keeps for itself."""
    count = len(images) - _held_out(config, len(images))
    return images[:count], None if labels is None else labels[:count]


def _held_out(config: SearchConfig, calibration: int) -> int:
    """Return how many calibration samples the search's score keeps for itself; InputError if there are too few."""
    entry = config.search.score
    options: ScoreConfig = build_options(SCORES[entry.name][0], entry.options)
    return options.held_out(calibration)


def planned_calibration(config: SearchConfig, model: nn.Module, graph: ModelGraph) -> dict[str, LayerPlan] | None:
    """Return what the calibration keeps of each layer; None if the configuration needs no calibration."""
    if config.data.calibration == 0 or not _image_users(config, _Plugins.of(config)):
        return None
    return plan_calibration(model, graph, build_options(CalibrationConfig, config.calibration))


@dataclass(frozen=True)
class _Plugins:
    """The plug-ins of `envs` that a configuration names."""

    importance: Importance
    quantizer: Quantizer
    recoveries: list[Recovery]
    finalist_recoveries: list[Recovery]

    @classmethod
    def of(cls, config: SearchConfig) -> _Plugins:
        finalist_entries = config.recovery if config.finalize.recovery is None else config.finalize.recovery
        return cls(
            build_plugin(IMPORTANCES, config.importance),
            build_plugin(QUANTIZERS, config.quantizer),
            [build_plugin(RECOVERIES, entry) for entry in config.recovery],
            [build_plugin(RECOVERIES, entry) for entry in finalist_entries],
        )


def _image_users(config: SearchConfig, plugins: _Plugins) -> list[str]:
    """Return what in the configuration needs calibration images, in words."""
    entries = (*config.recovery, *(config.finalize.recovery or ()))
    users: list[tuple[str, Any]] = [(f"`importance: {config.importance.name}`", plugins.importance)]
    users += [(f"the recovery `{entry.name}`", build_plugin(RECOVERIES, entry)) for entry in entries]
    # Where there are no images, recoveries that make statistics of their own hand them to the quantizer.
    lists = (plugins.recoveries, plugins.finalist_recoveries)
    if config.data.calibration != 0 or not all(map(_makes_statistics, lists)):
        users.append((f"`quantizer: {config.quantizer.name}`", plugins.quantizer))
    names = [name for name, plugin in users if plugin.needs_images]
    return list(dict.fromkeys(names)) + ["`space.activation_bits`"] * bool(config.space.activation_bits)


def _makes_statistics(recoveries: Sequence[Recovery]) -> bool:
    return any(getattr(recovery, "makes_statistics", False) for recovery in recoveries)


def build_plugin(registry: Mapping[str, tuple[type, type]], entry: PluginEntry) -> Any:
    """Return the plug-in that an entry of the configuration names."""
    config_class, plugin = registry[entry.name]
    return plugin(build_options(config_class, entry.options))


def build_options(config_class: type, options: Mapping[str, Any]) -> Any:
    """Return the plug-in's configuration object; the options have passed the same check when the file was read."""
    return TypeAdapter(config_class).validate_python(options)


def build_front(problem: Problem) -> Front:
    """Return an empty front for this problem."""
    device = None if problem.device is None else problem.device.label
    return Front(problem.space.objectives, problem.budgets, problem.dense, problem.task.metric, device, problem.score)


def build_agent(problem: Problem, name: str, options: Mapping[str, Any], seed: int) -> Agent:
    """Return the agent `name` for this problem, which must be prepared for it (`prepare`)."""
    config_class, agent = AGENTS[name]
    return agent(build_options(config_class, options), problem.space, problem.search_budgets, np.random.default_rng(seed))


def prepare(problem: Problem, name: str, options: Mapping[str, Any], status: StatusCallback = log.info) -> Problem:
    """Return the problem with what the agent `name` needs: sensitivities are measured, unless it has them."""
    needed = needs_sensitivities(build_options(AGENTS[name][0], options))
    return with_sensitivities(problem, status) if needed else problem


def with_sensitivities(problem: Problem, status: StatusCallback = log.info) -> Problem:
    """Return the problem with the sensitivities of its choices, measured unless it has them.

    Recoveries with a quick form are replaced by it, because one choice alone needs no repair of the whole network.
    """
    if problem.space.sensitivities is not None:
        return problem
    quick = [one.quick() if isinstance(one, HasQuickForm) else one for one in problem.assembler.recoveries]
    assembler = replace(problem.assembler, recoveries=quick)
    evaluator, start = make_evaluator(replace(problem, assembler=assembler)), time.perf_counter()
    inputs = first_inputs(problem.task, "validation", IMAGES)
    curves = measure_sensitivities(problem.space.policy_space, evaluator.network, inputs, problem.task.divergence, status)
    measured = Sensitivities(curves, time.perf_counter() - start)
    return replace(problem, space=problem.space.with_sensitivities(measured))


def make_env(problem: Problem, evaluated: Evaluated = ()) -> CompressionEnv:
    """Return a separate environment for one worker; the `evaluated` policies are not evaluated again."""
    evaluator = make_evaluator(problem)
    if problem.config.search.racing:
        evaluator.race = Race(problem.space.objectives[1:], [budget.limits for budget in problem.budgets])
    evaluator.remember(evaluated)
    return CompressionEnv(problem.space, evaluator, problem.search_budgets)


def make_evaluator(problem: Problem) -> Evaluator:
    """Return an evaluator under the search's recoveries and number format, which scores every policy on all samples."""
    return Evaluator(problem.assembler, problem.space.costs.of_policy, problem.score, problem.precision)


def build_trackers(config: SearchConfig, own: Sequence[Tracker], note: StatusCallback) -> Trackers:
    """Return the trackers of the configuration, and `own` ones; `note` gets a sentence when one of them fails."""
    named = [(entry.name, build_plugin(TRACKERS, entry)) for entry in config.output.trackers]
    return Trackers([*named, *((type(tracker).__name__, tracker) for tracker in own)], note)


def search_start(problem: Problem, run: Path, done: int) -> SearchStart:
    """Return what trackers get first; `done` is the number of evaluations that the run has already."""
    config = problem.config
    settings = config.model_dump(mode="json")
    return SearchStart(run, settings, problem.search_budgets, problem.score.metric, config.search.evaluations, done)


def open_runner(problem: Problem, evaluated: Evaluated = ()) -> Runner:
    """Return the runner that the configuration asks for, which evaluates none of the `evaluated` policies; close it after use."""
    section = problem.config.search
    if section.workers == 0:
        return LocalRunner(partial(make_env, problem, evaluated))
    workers, gpus = _workers_and_gpus(problem)
    make = partial(_make_worker_env, problem.on(CPU), evaluated)
    choose, timeout = partial(chosen_policy, problem.space), EvaluationTimeout(section.evaluation_timeout)
    return RayRunner(make, workers, section.address or LOCAL, timeout, choose, gpus=gpus)


def _make_worker_env(problem: Problem, evaluated: Evaluated) -> CompressionEnv:
    """Return a worker's environment, on the device of the worker."""
    return make_env(problem.on(find_device(problem.config.compute.device)), evaluated)


def _workers_and_gpus(problem: Problem) -> tuple[int | str, float | None]:
    """Return how many Ray workers there are, and how much of a GPU each asks for; None: a whole one if the cluster has any."""
    section, device = problem.config.search, torch.device("cuda" if (name := problem.config.compute.device) == AUTO else name)
    share = None if isinstance(section.gpus_per_worker, str) else section.gpus_per_worker
    if device == CPU or (name == AUTO and section.address is None and problem.torch_device == CPU):
        return section.workers, 0.0
    if device.index is None:
        return section.workers, share
    # Ray hands out GPUs by its own numbers, so workers that share a numbered one are not counted by Ray.
    return int(1 / (share or 1.0)) if section.workers == AUTO else section.workers, 0.0


@dataclass(frozen=True)
class Feasibility:
    """One row of `secateur inspect`: what a budget asks for and what can be reached."""

    budget: str
    cost: str
    least: float
    limit: float
    dense: float

    @property
    def satisfiable(self) -> bool:
        """Whether the least that is found is within the limit."""
        return self.least <= self.limit


def feasibility_table(projection: FeasibilityProjection, budgets: Sequence[Budget]) -> list[Feasibility]:
    """Return one row for every limit of every budget, each limit by itself: `FeasibilityProjection.check` takes them together."""
    return [
        Feasibility(budget.name, cost, projection.least(cost, limit), limit, projection.costs.dense[cost])
        for budget in budgets
        for cost, limit in budget.limits.items()
    ]

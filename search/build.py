"""From a configuration to objects: the one place where names become models, data, plug-ins and budgets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from agents import AGENTS
from agents.core import Agent
from cost_models import COST_MODELS
from envs.assembler import Assembler
from envs.compression_env import CompressionEnv
from envs.core import Budget, Evaluation, InputError
from envs.evaluator import Evaluator, Precision, choose_precision, top1
from envs.feasibility import FeasibleSpace
from envs.model_graph import ModelGraph, analyze
from envs.observation import observation_names
from envs.policy_space import PolicySpace, SpaceConfig
from envs.pruning.importance import IMPORTANCES
from envs.pruning.slicing import slice_model
from envs.quantization.calibration import calibrate_activations
from envs.quantization.quantizers import QUANTIZERS
from envs.recovery import RECOVERIES
from envs.tasks.data import TaskData, load_data
from envs.tasks.models import load_model
from envs.tasks.training import Progress
from search.config import BudgetConfig, PluginEntry, SearchConfig
from search.front import Front
from search.local_runner import LocalRunner
from search.loop import Runner
from search.ray_runner import LOCAL, RayRunner

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """A search, ready to run: everything that is computed once. Picklable; workers share its numpy arrays without copies.

    Attributes:
        config: the resolved configuration.
        data: calibration, validation and test splits.
        assembler: turns policies into networks; holds the dense model and its graph.
        space: the decisions behind the wall.
        budgets: satisfiable budgets with absolute limits.
        dense: float32 score and costs of the dense model on the validation split.
        precision: number format of the search's forward passes.
    """

    config: SearchConfig
    data: TaskData
    assembler: Assembler
    space: FeasibleSpace
    budgets: tuple[Budget, ...]
    dense: Evaluation
    precision: Precision

    @property
    def graph(self) -> ModelGraph:
        """The dense model's plan."""
        return self.assembler.graph


def build_model_and_graph(
    config: SearchConfig, say: Say = log.info
) -> tuple[TaskData, nn.Module, ModelGraph]:
    """Return data, model and graph: what `secateur inspect` needs.

    Args:
        config: the configuration.
        say: told each stage in a few words; each epoch too, when the model has to be trained first.
    Raises:
        InputError: for anything in the configuration that cannot be used.
    """
    say("loading data")
    data = load_data(**config.data.model_dump(), input_shape=config.model.input)
    say("loading the model")
    model = load_model(config.model.factory, config.model.weights, config.model.args, data, _epochs_to(say))
    say("tracing the model")
    example = torch.zeros(1, *config.model.input)
    graph = analyze(model, (example,), exclude=config.space.exclude)
    with torch.inference_mode():
        outputs = model(example)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() != 2:
        shown = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise InputError(f"`model.factory` must give one tensor of scores (images, classes), but its output is {shown}.")
    data.check_outputs(outputs.shape[1])
    return data, model, graph


def _epochs_to(say: Say) -> Progress:
    """Return a listener that tells each epoch of a training through `say`."""
    return lambda at: say(
        f"training the model, epoch {at.epoch} of {at.epochs}: loss {at.loss:.3f}, top-1 {100 * at.top1:.1f} %"
    )


def build_space(config: SearchConfig, graph: ModelGraph, dense_top1: float) -> tuple[FeasibleSpace, tuple[Budget, ...]]:
    """Return the decisions behind their wall, and the budgets with absolute limits (not yet checked)."""
    space = PolicySpace(graph, SpaceConfig(**config.space.model_dump()))
    cost_models = {name: model() for name, model in COST_MODELS.items()}
    limited = [name for name in cost_models if any(name in budget.limits for budget in config.budgets.values())]
    dimension = len(observation_names(space.kinds, tuple(cost_models)))
    feasible = FeasibleSpace(space, cost_models, ("top1", *(limited or ["macs"])), dense_top1, dimension)
    budgets = tuple(_budget(name, budget, feasible) for name, budget in config.budgets.items())
    return feasible, budgets


def _budget(name: str, config: BudgetConfig, space: FeasibleSpace) -> Budget:
    limits = {
        cost: limit.value * space.dense_costs[cost] if limit.relative else limit.value
        for cost, limit in config.limits.items()
    }
    return Budget(name, limits, config.top1_drop)


def build_problem(config: SearchConfig, say: Say = log.info) -> Problem:
    """Return the search that the configuration describes; arguments as in `build_model_and_graph`.

    Raises:
        InputError: for anything in the configuration that cannot be used, before anything is written.
    """
    data, model, graph = build_model_and_graph(config, say)
    space, budgets = build_space(config, graph, dense_top1=float("nan"))
    for budget in budgets:
        space.check(budget)
    say("calibrating")
    images, labels = data.tensors(data.calibration)
    rng = np.random.default_rng(config.search.seed)
    importance = build_plugin(IMPORTANCES, config.importance)
    scores = importance.scores(model, graph, images, labels, rng)
    layers = space.space.activation_layers
    ranges = calibrate_activations(model, layers, images) if layers else {}
    recoveries = [build_plugin(RECOVERIES, entry) for entry in config.recovery]
    prepared = [(recovery, recovery.prepare(model, graph, images)) for recovery in recoveries]
    quantizer = build_plugin(QUANTIZERS, config.quantizer)
    assembler = Assembler(model, graph, tuple(scores), ranges, quantizer, prepared, images)
    say("scoring the dense model")
    images, labels = data.tensors(data.validation)
    everything = [np.arange(group.units) for group in graph.groups]
    if config.search.precision == "auto":
        precision = choose_precision(lambda: slice_model(model, graph, everything), graph, images, labels)
    else:
        precision = Precision(config.search.precision, "chosen in the configuration")
    dense = Evaluation(top1(model, images, labels), space.dense_costs, "proxy", len(labels))
    space.dense_top1 = dense.top1
    return Problem(config, replace(data, train=None), assembler, space, budgets, dense, precision)


def build_plugin(registry: dict[str, tuple[type, type]], entry: PluginEntry):
    """Return the plug-in that an entry of the configuration names."""
    config_class, plugin = registry[entry.name]
    return plugin(build_options(config_class, entry.options))


def build_options(config_class: type, options: dict):
    """Return the plug-in's configuration object; the options have passed the same check when the file was read."""
    return TypeAdapter(config_class).validate_python(options)


def build_front(problem: Problem) -> Front:
    """Return an empty front for this problem."""
    return Front(problem.space.objectives, problem.budgets, problem.dense, problem.data.num_classes)


def build_agent(problem: Problem, name: str, options: dict, seed: int) -> Agent:
    """Return the agent `name` for this problem."""
    config_class, agent = AGENTS[name]
    config = build_options(config_class, options)
    return agent(config, problem.space, problem.budgets, np.random.default_rng(seed))


def make_env(problem: Problem) -> CompressionEnv:
    """Return an environment of its own for one worker."""
    images, labels = problem.data.tensors(problem.data.validation)
    evaluator = Evaluator(problem.assembler, problem.space.policy_costs, images, labels, problem.precision)
    return CompressionEnv(problem.space, evaluator, problem.budgets)


def open_runner(problem: Problem) -> Runner:
    """Return the runner that the configuration asks for; close it after use."""
    section = problem.config.search
    if section.workers == 0:
        return LocalRunner(partial(make_env, problem))
    return RayRunner(partial(make_env, problem), section.workers, section.address or LOCAL)


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
        """Whether the strongest compression is within the limit."""
        return self.least <= self.limit


def feasibility_table(space: FeasibleSpace, budgets: Sequence[Budget]) -> list[Feasibility]:
    """Return one row for every limit of every budget."""
    least = space.costs(space.space.strongest[None])
    return [
        Feasibility(budget.name, cost, float(least[cost][0]), limit, space.dense_costs[cost])
        for budget in budgets
        for cost, limit in budget.limits.items()
    ]

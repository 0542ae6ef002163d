"""Budgets and policies that several benchmarks measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, cast

from secateur.agents.core import SequenceActor
from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.core import Budget, CompressionPolicy, Episode, InputError
from secateur.envs.model_graph import ModelGraph
from secateur.search.build import build_agent, build_front, prepare
from secateur.search.config import SearchConfig, parse_config
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem
from secateur.search.results.core import FrontPoint

POLICY_FIELDS = ("widths", "weight_bits", "activation_bits")
"""What a row holds of a policy."""


def policy_choices(policy: CompressionPolicy) -> dict[str, Any]:
    """Return a policy as the values of a row."""
    return {name: getattr(policy, name) for name in POLICY_FIELDS}


def check_agents(config: SearchConfig, names: Sequence[str]) -> None:
    """Raise InputError for an unknown agent, with the nearest known name."""
    values = config.model_dump(mode="json")
    for name in names:
        parse_config({**values, "search": {**values["search"], "agent": name, "options": {}}}, "--agent")


def choose_budget(problem: Problem, name: str | None) -> Budget:
    """Return the budget of that name, or the only one.

    Raises:
        InputError: if there is none of that name, or there are several and no name is given.
    """
    budgets = {budget.name: budget for budget in problem.budgets}
    if name is None and len(budgets) == 1:
        return problem.budgets[0]
    if name not in budgets:
        reason = f"There is no budget `{name}`" if name else "There are several budgets"
        known = ", ".join(budgets)
        raise InputError(f"{reason}; choose a `budget`: {known}.", f"{reason}; choose one with --budget: {known}.")
    return budgets[name]


def random_actors(problem: Problem, budget: Budget, count: int) -> list[SequenceActor]:
    """Return actors of random policies at the edge of the budget; the first ones do not depend on `count`."""
    agent = build_agent(replace(problem, budgets=(budget,)), "random", {}, problem.config.search.seed)
    return cast(list[SequenceActor], agent.ask(count))


def random_policies(problem: Problem, budget: Budget, count: int) -> list[CompressionPolicy]:
    """Return the policies of `random_actors`."""
    return [problem.space.decode(actor.sequence) for actor in random_actors(problem, budget, count)]


def allocate(problem: Problem, runner: Runner, agent: str, evaluations: int) -> tuple[FrontPoint | None, int]:
    """Return the best candidate of an agent with default options for the first budget, and the number of its evaluations.

    Returns:
        None in place of the candidate if nothing fits.
    """
    front, problem = build_front(problem), prepare(problem, agent, {})

    def on_episode(actor: object, episode: Episode) -> None:
        front.add(episode)

    done = run_loop(build_agent(problem, agent, {}, problem.config.search.seed), runner, evaluations, on_episode)
    best = front.best(problem.budgets[0].name, 1)
    return (best[0] if best else None), done


def inner_groups(graph: ModelGraph) -> tuple[bool, ...]:
    """Return for each group whether it lies inside a block: a single layer produces its channels.

    A depthwise convolution that passes the channels on does not count as a producer. Channels that are the sum of several layers
    belong to a residual stream, which every block reads: pruning it by the same ratio costs far more accuracy than it saves.
    """
    depthwise = {layer.name for layer in graph.geometry.layers if layer.depthwise}
    return tuple(len(set(group.producers) - depthwise) == 1 for group in graph.groups)


def uniform_policy(
    graph: ModelGraph, ratio: float, bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS), exclude: Sequence[str] = ()
) -> CompressionPolicy:
    """Return a policy with one prune ratio for all inner groups and one pair of bit-widths for all layers.

    Args:
        graph: the dense model's plan; channels that are excluded from pruning are in none of its groups.
        ratio: share of units that each inner group loses, in [0, 1).
        bits: (weight_bits, activation_bits).
        exclude: patterns of the names of layers that are not quantized.
    """
    widths = tuple(
        max(1, round((1 - ratio) * group.units)) if inner else group.units
        for group, inner in zip(graph.groups, inner_groups(graph), strict=True)
    )
    quantized = [
        layer.quantizable and not any(fnmatchcase(layer.name, pattern) for pattern in exclude) for layer in graph.geometry.layers
    ]
    weight_bits, activation_bits = (tuple(width if chosen else FLOAT_BITS for chosen in quantized) for width in bits)
    return CompressionPolicy(widths, weight_bits, activation_bits)

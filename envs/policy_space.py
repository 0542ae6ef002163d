"""The policies that can be chosen: the decisions, their order, what each action means, and every encoding of a policy.

A policy has five encodings; all conversions between them are here, each with its inverse:

| encoding | form | used by |
|---|---|---|
| action sequence | (num_steps, action_dim) in [0, 1] | agents, the environment |
| levels | (decisions,) integers, 0 = least compression | feasibility projection, costs |
| `CompressionPolicy` | kept units per group, bits per layer | evaluator, results |
| choices | {decision name: prune ratio or bits} | the Optuna study, tables |
| document | JSON lists of widths and bits | front.json, policy.json |

    sequence <-> levels     sequence_to_levels    levels_to_sequence      (both also for batches)
    levels   <-> policy     levels_to_policy      policy_to_levels
    policy   <-> choices    policy_to_choices     choices_to_policy
    policy   <-> document   policy_to_document    document_to_policy
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, InputError, LayerShapes
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph.plan import ChannelGroup, ModelGraph

KINDS = ("prune_ratio", "weight_bits", "activation_bits")
MAX_LEVELS = 64
"""Most widths of a group, evenly spaced: finer steps of a group of thousands of units do not differ in accuracy."""


@dataclass(frozen=True)
class SpaceConfig:
    """What may be chosen.

    Attributes:
        prune_ratio: (least, largest) share of a group's units removed, 0 <= least <= largest < 1; None: no pruning. A group
            with one possible width gets it without a decision.
        channel_multiple: the channels that a group gives to each of its layers are multiples of this, or dense. If a layer
            gets its channels from several sources, the number of removed channels is a multiple, so that a sum that was a
            multiple stays one. A group without such widths is not pruned.
        weight_bits, activation_bits: allowed bit-widths, 2..8 or 32; a single one is applied everywhere without a decision;
            None: 32.
        exclude: patterns of layer names that are neither pruned nor quantized.
    """

    prune_ratio: tuple[float, float] | None = (0.0, 0.9)
    channel_multiple: int = 1
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prune_ratio is not None and not 0 <= self.prune_ratio[0] <= self.prune_ratio[1] < 1:
            raise InputError(
                f"`space.prune_ratio` must be [least, largest] with 0 <= least <= largest < 1, but got "
                f"{list(self.prune_ratio)}. A ratio is the share of channels removed."
            )
        if self.channel_multiple < 1:
            raise InputError(f"`space.channel_multiple` must be at least 1, but got {self.channel_multiple}.")
        for name in KINDS[1:]:
            choices = getattr(self, name)
            if choices is not None and len(set(choices)) < max(len(choices), 1):
                fault = "names a width twice" if choices else "has no choice: leave it out"
                raise InputError(f"`space.{name}` {fault} (got {list(choices)}).")
            for bits in choices or ():
                if bits != FLOAT_BITS and not 2 <= bits <= 8:
                    raise InputError(f"`space.{name}` must be 2..8, or 32 for untouched, but got {bits}.")


@dataclass(frozen=True)
class Decision:
    """One thing to choose.

    Attributes:
        name: e.g. "prune_ratio/layer1.0.conv1"; unique.
        kind: one of `KINDS`.
        target: index of the group (prune_ratio) or of the layer (bits).
        levels: what the policy stores: widths or bit-widths, least compression first.
        values: what a reader sees: prune ratios or bit-widths.
        actions: (levels,) the action that means each level, increasing in [0, 1].
    """

    name: str
    kind: str
    target: int
    levels: tuple[int, ...]
    values: tuple[float, ...]
    actions: np.ndarray


class PolicySpace:
    """The decisions of a search, and the encodings of their policies (see the module).

    An action sequence holds the actions of an episode, (num_steps, action_dim) in [0, 1]. Each step belongs to a layer; its
    columns are the kinds of choices that exist anywhere in the space, 0 = least compression, 1 = strongest. `used` tells which
    entries choose something. `decisions` are in the order of `np.nonzero(used)`.

    Args:
        graph: of the dense model.
        config: what may be chosen.
    Raises:
        InputError: if there is nothing to choose.
    """

    def __init__(self, graph: ModelGraph, config: SpaceConfig):
        self.geometry = graph.geometry
        self.config = config
        self._base_widths = np.array(self.geometry.group_units)
        self._base_bits = [self._fixed_bits(kind) for kind in KINDS[1:]]
        steps = [step for index in range(len(self.geometry.layers)) for step in self._steps_of_layer(graph, index)]
        self.kinds = tuple(kind for kind in KINDS if any(kind in step for _, step in steps))
        self.decisions: tuple[Decision, ...] = tuple(step[kind] for _, step in steps for kind in self.kinds if kind in step)
        self.step_layers = tuple(layer for layer, _ in steps)
        self.num_steps, self.action_dim = len(steps), len(self.kinds)
        self.used = np.array([[kind in step for kind in self.kinds] for _, step in steps], bool).reshape(
            self.num_steps, self.action_dim
        )
        if not self.decisions:
            raise InputError(
                "The search space is empty: no group can be pruned and no layer has more than one bit-width. "
                "Widen `space.prune_ratio`, `space.weight_bits` or `space.activation_bits`."
            )
        self.num_levels = np.array([len(decision.levels) for decision in self.decisions])
        self._levels = np.zeros((len(self.decisions), self.num_levels.max()), int)
        for row, decision in zip(self._levels, self.decisions, strict=True):
            row[: len(decision.levels)] = decision.levels

    def _fixed_bits(self, kind: str) -> np.ndarray:
        """(L,) bit-widths before any decision: the least compression that the configuration allows."""
        allowed = getattr(self.config, kind)
        return np.array(
            [
                max(allowed) if allowed and layer.quantizable and not self._excluded(layer.name) else FLOAT_BITS
                for layer in self.geometry.layers
            ]
        )

    @property
    def activation_layers(self) -> tuple[str, ...]:
        """Names of the layers whose input some policy quantizes."""
        if min(self.config.activation_bits or (FLOAT_BITS,)) == FLOAT_BITS:
            return ()
        return tuple(layer.name for layer in self.geometry.layers if layer.quantizable and not self._excluded(layer.name))

    def _excluded(self, layer: str) -> bool:
        return any(fnmatchcase(layer, pattern) for pattern in self.config.exclude)

    def _steps_of_layer(self, graph: ModelGraph, index: int) -> list[tuple[int, dict[str, Decision]]]:
        """The layer's first step holds its bits and its first group; every further group takes a step of its own."""
        layer = self.geometry.layers[index]
        prunes = []
        if self.config.prune_ratio is not None:
            for target, group in enumerate(graph.groups):
                if group.producers[0] != layer.name:
                    continue
                if (decision := self._prune_decision(target, group, self.config.prune_ratio)) is not None:
                    prunes.append({"prune_ratio": decision})
        bits = {}
        for kind in KINDS[1:]:
            allowed = sorted(set(getattr(self.config, kind) or ()), reverse=True)
            if len(allowed) > 1 and layer.quantizable and not self._excluded(layer.name):
                actions = np.linspace(0, 1, len(allowed))
                bits[kind] = Decision(f"{kind}/{layer.name}", kind, index, tuple(allowed), tuple(allowed), actions)
        first = {**(prunes[0] if prunes else {}), **bits}
        return [(index, step) for step in [first, *prunes[1:]] if step]

    def _prune_decision(self, target: int, group: ChannelGroup, ratios: tuple[float, float]) -> Decision | None:
        low, high = ratios
        # Rounding guards against 0.1 * 30 = 3.0000000000000004 costing a channel.
        least, most = int(np.ceil(round((1 - high) * group.units, 9))), int(np.floor(round((1 - low) * group.units, 9)))
        possible = np.arange(most, max(least, 1) - 1, -1)
        widths = possible[self._aligned(target, possible)].tolist()
        self._base_widths[target] = widths[0] if widths else group.units
        if len(widths) < 2:
            return None
        if len(widths) > MAX_LEVELS:
            widths = [widths[i] for i in np.unique(np.linspace(0, len(widths) - 1, MAX_LEVELS).round().astype(int))]
        removed = 1 - np.array(widths) / group.units
        actions = (removed - removed[0]) / (removed[-1] - removed[0])
        values = tuple(removed.round(6).tolist())
        return Decision(f"prune_ratio/{group.name}", "prune_ratio", target, tuple(widths), values, actions)

    def _aligned(self, target: int, widths: np.ndarray) -> np.ndarray:
        """Return which widths of a group are dense or keep the channel multiple in every layer, (widths,) bool."""
        geometry, multiple = self.geometry, self.config.channel_multiple
        units = geometry.group_units
        removed = units[target] - widths[:, None]
        aligned = np.ones(len(widths), bool)
        for fixed, per_unit in ((geometry.out_fixed, geometry.out_per_unit), (geometry.in_fixed, geometry.in_per_unit)):
            several_sources = (fixed > 0) | (np.count_nonzero(per_unit, axis=0) > 1)
            dense_aligned = (fixed + units @ per_unit) % multiple == 0
            counts = np.where(several_sources & dense_aligned, removed, widths[:, None]) * per_unit[target]
            aligned &= (counts.round() % multiple == 0).all(axis=1)
        return aligned | (removed[:, 0] == 0)

    @cached_property
    def level_actions(self) -> tuple[np.ndarray, ...]:
        """Of each decision: the actions that mean its levels, increasing in [0, 1]."""
        return tuple(decision.actions for decision in self.decisions)

    @cached_property
    def weakest(self) -> np.ndarray:
        """(decisions,) levels of the least compression."""
        return np.zeros(len(self.decisions), int)

    @cached_property
    def strongest(self) -> np.ndarray:
        """(decisions,) levels of the strongest compression."""
        return self.num_levels - 1

    # ------------------------------------------------------------------------------------------------ sequence <-> levels

    def sequence_to_levels(self, sequences: np.ndarray) -> np.ndarray:
        """Return the nearest levels, (..., num_steps, action_dim) to (..., decisions)."""
        wanted = np.asarray(sequences)[..., self.used]
        nearest = [np.abs(wanted[..., i, None] - actions).argmin(axis=-1) for i, actions in enumerate(self.level_actions)]
        return np.stack(nearest, axis=-1)

    def levels_to_sequence(self, levels: np.ndarray) -> np.ndarray:
        """Return the action sequences that mean these levels, (..., decisions) to (..., num_steps, action_dim) float32.

        Unused entries are 0.
        """
        levels = np.asarray(levels)
        sequences = np.zeros((*levels.shape[:-1], self.num_steps, self.action_dim), np.float32)
        sequences[..., self.used] = np.stack([a[levels[..., i]] for i, a in enumerate(self.level_actions)], axis=-1)
        return sequences

    # -------------------------------------------------------------------------------------------------- levels <-> policy

    def levels_to_columns(self, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return widths (population, G), weight bits and activation bits (population, L) of levels (population, decisions)."""
        columns = []
        for kind, base in zip(KINDS, (self._base_widths, *self._base_bits), strict=True):
            column = np.empty((len(levels), len(base)), base.dtype)
            column[:] = base
            if kind in self._targets:
                which, targets = self._targets[kind]
                column[:, targets] = self._levels[which, levels[:, which]]
            columns.append(column)
        widths, weight_bits, activation_bits = columns
        return widths, weight_bits, activation_bits

    @cached_property
    def _targets(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{kind: (decision indices, their targets)}."""
        kinds = np.array([decision.kind for decision in self.decisions])
        targets = np.array([decision.target for decision in self.decisions])
        return {kind: (np.flatnonzero(kinds == kind), targets[kinds == kind]) for kind in self.kinds}

    def shapes(self, levels: np.ndarray) -> LayerShapes:
        """Return the shapes of levels (population, decisions)."""
        return self.geometry.shapes(*self.levels_to_columns(levels))

    def levels_to_policy(self, levels: np.ndarray) -> CompressionPolicy:
        """Return the policy of one level vector, (decisions,)."""
        return CompressionPolicy(*(tuple(column[0].tolist()) for column in self.levels_to_columns(levels[None])))

    def policy_to_levels(self, policy: CompressionPolicy) -> np.ndarray:
        """Return the levels of a policy, (decisions,).

        Raises:
            ValueError: if the policy is not of this space.
        """
        columns = dict(zip(KINDS, (policy.widths, policy.weight_bits, policy.activation_bits), strict=True))
        return np.array([decision.levels.index(columns[decision.kind][decision.target]) for decision in self.decisions])

    # ------------------------------------------------------------------------------------------------- policy <-> choices

    def policy_to_choices(self, policy: CompressionPolicy) -> dict[str, float]:
        """Return {decision name: prune ratio or bits}."""
        levels = self.policy_to_levels(policy)
        return {decision.name: decision.values[level] for decision, level in zip(self.decisions, levels, strict=True)}

    def choices_to_policy(self, choices: Mapping[str, float]) -> CompressionPolicy:
        """Return the policy of {decision name: prune ratio or bits}.

        Raises:
            ValueError: if the choices are not of this space.
        """
        if missing := [decision.name for decision in self.decisions if decision.name not in choices]:
            raise ValueError(f"no value is given for the decision '{missing[0]}'")
        return self.levels_to_policy(np.array([d.values.index(choices[d.name]) for d in self.decisions]))


# ---------------------------------------------------------------------------------------------------- policy <-> document


def policy_to_document(policy: CompressionPolicy) -> dict[str, list[int]]:
    """Return the policy as JSON values: kept units of each group, bits of each layer."""
    return {name: list(values) for name, values in asdict(policy).items()}


def document_to_policy(document: Mapping[str, Any]) -> CompressionPolicy:
    """Return the policy of a document."""
    return CompressionPolicy(**{name: tuple(values) for name, values in document.items()})

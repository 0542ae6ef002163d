"""The layers of a run: what each policy keeps of them, how sensitive they are, and their shares of the costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import FLOAT_BITS, CostModel, LayerShapes
from secateur.cost_models.device import Device
from secateur.envs.core import InputError
from secateur.envs.model_graph.plan import FrozenChannels, ModelGraph
from secateur.envs.policy_space import PolicySpace, SpaceConfig
from secateur.search.config import SearchConfig
from secateur.search.run.network import read_network
from secateur.search.run.sensitivities import read_sensitivities


@dataclass(frozen=True)
class LayerRow:
    """A layer under one policy.

    Attributes:
        layer: its name.
        channels, dense_channels: output channels that are kept, and those of the dense model.
        weight_bits, activation_bits: 32: not quantized.
        sensitivity: sum over the layer's choices of the change of the outputs by each alone, in nats; None: not measured.
        shares: {cost: share of the policy's total}; of the peak memory, the live bytes while the layer runs.
    """

    layer: str
    channels: int
    dense_channels: int
    weight_bits: int
    activation_bits: int
    sensitivity: float | None
    shares: Mapping[str, float]


@dataclass(frozen=True)
class LayerView:
    """Layers and choices of a run.

    Attributes:
        graph: structure of the dense model.
        space: choices.
        costs: {cost: model}.
        curves: (decisions, levels) sensitivities at evenly spaced actions; None: not measured.
    """

    graph: ModelGraph
    space: PolicySpace
    costs: Mapping[str, CostModel]
    curves: np.ndarray | None

    @cached_property
    def _index(self) -> list[dict[float, int]]:
        return [{value: level for level, value in enumerate(decision.values)} for decision in self.space.decisions]

    def levels(self, choices: Mapping[str, float]) -> list[int]:
        """Return the levels of a trial's choices.

        Raises:
            LookupError: if they are not of this space.
        """
        decisions = zip(self.space.decisions, self._index, strict=True)
        return [levels[choices[decision.name]] for decision, levels in decisions]

    @cached_property
    def sensitivities(self) -> list[list[float]] | None:
        """Of each decision: the sensitivity of each of its levels, in nats; None: not measured."""
        if self.curves is None:
            return None
        places = np.linspace(0, 1, self.curves.shape[1])
        pairs = zip(self.space.decisions, self.curves, strict=True)
        return [np.interp(decision.actions, places, curve).tolist() for decision, curve in pairs]

    @cached_property
    def decision_layers(self) -> list[int]:
        """Of each decision: the index of its layer; of a group, the layer that produces its channels first."""
        places = {layer.name: index for index, layer in enumerate(self.graph.geometry.layers)}
        pruned = "prune_ratio"
        return [
            places[self.graph.groups[decision.target].producers[0]] if decision.kind == pruned else decision.target
            for decision in self.space.decisions
        ]

    def shapes(self, levels: Sequence[Sequence[int]]) -> LayerShapes:
        """Return the shapes of policies, one row of levels each."""
        return self.space.shapes(np.array(levels, int).reshape(len(levels), len(self.space.decisions)))

    def shares(self, levels: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Return {cost: (policies, layers) share of each layer of the policy's total}."""
        shapes = self.shapes(levels)
        totals = {name: np.maximum(model.total(shapes), 1e-300)[:, None] for name, model in self.costs.items()}
        return {name: model.per_layer(shapes) / totals[name] for name, model in self.costs.items()}

    def rows(self, levels: Sequence[int], costs: Sequence[str]) -> list[LayerRow]:
        """Return the layers of one policy, with their shares of these costs."""
        shapes, shares = self.shapes([levels]), self.shares([levels])
        sensitivity = np.zeros(len(self.graph.geometry.layers))
        for decision, (layer, level) in enumerate(zip(self.decision_layers, levels, strict=True)):
            sensitivity[layer] += 0 if self.sensitivities is None else self.sensitivities[decision][level]
        return [
            LayerRow(
                layer.name,
                int(round(shapes.out_channels[0, index])),
                layer.out_channels,
                int(shapes.weight_bits[0, index]),
                int(shapes.activation_bits[0, index]),
                None if self.sensitivities is None else float(sensitivity[index]),
                {cost: float(shares[cost][0, index]) for cost in costs},
            )
            for index, layer in enumerate(self.graph.geometry.layers)
        ]

    def unpruned(self) -> list[FrozenChannels]:
        """Return the channels that no policy removes, with the reason: frozen by the network, or left out by `space`."""
        decided = {decision.target for decision in self.space.decisions if decision.kind == "prune_ratio"}
        found = list(self.graph.frozen)
        for index, group in enumerate(self.graph.groups):
            if index not in decided:
                config = self.space.config
                reason = (
                    "`space.prune_ratio` is null" if config.prune_ratio is None else "`space` leaves one width to choose from"
                )
                found.append(FrozenChannels(", ".join(group.producers), group.units, reason))
        return found

    def unquantized(self) -> list[str]:
        """Return the layers whose weights are never quantized although `space.weight_bits` is given."""
        if min(self.space.config.weight_bits or (FLOAT_BITS,)) == FLOAT_BITS:
            return []
        strongest = self.shapes([self.space.strongest.tolist()]).weight_bits[0]
        return [layer.name for layer, bits in zip(self.graph.geometry.layers, strongest, strict=True) if bits == FLOAT_BITS]


def read_layers(folder: Path, config: SearchConfig, document: Mapping[str, Any]) -> LayerView | None:
    """Return the layers of a run; None: an earlier version made it, and its layers are not known.

    Raises:
        InputError: if a file of the run is damaged.
    """
    graph = read_network(folder)
    if graph is None:
        return None
    try:
        space = PolicySpace(graph, SpaceConfig(**config.space.model_dump()))
    except IndexError as error:
        raise InputError(f"The layers of {folder} do not fit together: {error}.") from None
    models: dict[str, CostModel] = {name: model() for name, model in COST_MODELS.items()}
    models |= config.device.cost_models() if isinstance(config.device, Device) else {}
    known = {name: model for name, model in models.items() if name in document["dense"]["costs"]}
    measured = read_sensitivities(folder, space)
    return LayerView(graph, space, known, None if measured is None else measured.curves)

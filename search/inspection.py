"""What a configuration means for its model, before any search: layers, coupled groups, costs, and which budgets can be met."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rich.table import Table

from secateur.cost_models.device import Device
from secateur.envs.calibration import LayerPlan
from secateur.envs.core import Budget, InputError
from secateur.envs.costs import PolicyCosts
from secateur.envs.model_graph import ModelGraph
from secateur.envs.projection import FeasibilityProjection
from secateur.envs.tasks.core import Task
from secateur.search.build import (
    Feasibility,
    build_budgets,
    build_costs,
    build_model_and_graph,
    feasibility_table,
    planned_calibration,
    resolve_device,
)
from secateur.search.config import ConfigSource, Overrides, SearchConfig, load_config
from secateur.search.problem import StatusCallback
from secateur.search.results import tables
from secateur.search.results.formatting import amount


@dataclass(frozen=True)
class Inspection:
    """A configuration and its model.

    Attributes:
        config: the configuration.
        task: the metric, and the images with their splits.
        graph: layers, coupled groups, and what is never pruned.
        costs: the choices (`policy_space`), and the costs of the dense model (`dense`).
        budgets: with absolute limits.
        calibration: what the calibration would keep of each layer; None: no plug-in needs a calibration.
    """

    config: SearchConfig
    task: Task
    graph: ModelGraph
    costs: PolicyCosts
    budgets: tuple[Budget, ...]
    calibration: dict[str, LayerPlan] | None

    @cached_property
    def _projection(self) -> FeasibilityProjection:
        return FeasibilityProjection(self.costs)

    @cached_property
    def feasibility(self) -> list[Feasibility]:
        """One row for every limit of every budget, each limit by itself."""
        return feasibility_table(self._projection, self.budgets)

    def check(self) -> None:
        """Raise InputError unless every budget can be met with all its limits together."""
        if not all(row.satisfiable for row in self.feasibility):
            raise InputError("A budget cannot be met. Raise its limit, or allow stronger compression in `space`.")
        for budget in self.budgets:
            self._projection.check(budget)


def inspect(config: ConfigSource, overrides: Overrides = (), status: StatusCallback = lambda text: None) -> Inspection:
    """Return what a configuration means for its model; nothing is searched or written.

    Args:
        config: a configuration, the path of a YAML file, or its content as a dict.
        overrides: ["space.channel_multiple=8"] or {"space.channel_multiple": 8}; they win over `config`.
        status: called with a few words at each stage.
    Raises:
        InputError: if something in the configuration cannot be used.
    """
    settings = load_config(config, overrides)
    task, model, graph = build_model_and_graph(settings, status)
    settings = resolve_device(settings, model, graph, status)
    costs = build_costs(settings, graph)
    budgets, plans = build_budgets(settings, costs, task.metric), planned_calibration(settings, model, graph)
    return Inspection(settings, task, graph, costs, budgets, plans)


def report(inspection: Inspection) -> list[Table | str]:
    """Return the inspection for a terminal: tables, then lines."""
    settings, graph, costs = inspection.config, inspection.graph, inspection.costs
    most = settings.calibration["max_matrix_bytes"]
    shown = [tables.layer_table(graph, costs.policy_space), tables.group_table(graph)]
    optional = [tables.frozen_table(graph), tables.calibration_table(inspection.calibration or {}, most)]
    shown += [table for table in optional if table.row_count]
    dense = ", ".join(f"{cost} {amount(cost, value)}" for cost, value in costs.dense.items())
    images = inspection.task.samples("calibration")
    calibrated = min(images, settings.calibration["max_images"]) or None
    lines = [
        f"dense: {dense}",
        *tables.uncounted_lines(graph),
        *([tables.device_line(settings.device)] if isinstance(settings.device, Device) else []),
        *([] if calibrated is None else [tables.calibration_line(inspection.calibration, calibrated)]),
        f"data: {inspection.task.source}",
    ]
    return [*shown, tables.feasibility_report(inspection.feasibility), *lines]

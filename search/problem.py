"""The problem of a search: everything that is computed once, complete and never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from secateur.cost_models.device import Device
from secateur.envs.assembler import Assembler
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, without_drop
from secateur.envs.devices import CPU
from secateur.envs.evaluator import Precision
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.model_graph import ModelGraph
from secateur.envs.scores import Score
from secateur.envs.tasks.core import Task
from secateur.search.config import SearchConfig
from secateur.search.given import Given

StatusCallback = Callable[[str], None]
"""Called with each stage of a long operation, in a few words."""

Evaluated = Sequence[tuple[CompressionPolicy, Evaluation | str]]
"""Policies that are not evaluated again: with their evaluations, or the reasons why they have failed."""


@dataclass(frozen=True)
class Problem:
    """A search, ready to run. Picklable; workers share its numpy arrays without copies.

    Attributes:
        config: the resolved configuration.
        task: scores models; has the calibration, validation and test splits.
        assembler: turns policies into networks; holds the dense model and its graph.
        finalist_assembler: the same with the recoveries of the finalists.
        score: what the search maximizes.
        space: the decisions, with budgets that hold by construction; its metric is the score's.
        budgets: satisfiable budgets with absolute limits.
        dense: float32 metric and costs of the dense model on the validation split.
        precision: number format of the search's forward passes.
        given: the user's objects; None: the configuration names model and data.
        torch_device: where everything is computed; the user's objects stay on the CPU.
    """

    config: SearchConfig
    task: Task
    assembler: Assembler
    finalist_assembler: Assembler
    score: Score
    space: FeasibleSpace
    budgets: tuple[Budget, ...]
    dense: Evaluation
    precision: Precision
    given: Given | None = None
    torch_device: torch.device = CPU

    def on(self, device: torch.device) -> Problem:
        """Return the problem on another device: to send it to other processes, to compute there, or to export on the CPU."""
        if device == self.torch_device:
            return self
        assembler = self.assembler.on(device)
        finalists = replace(assembler, recoveries=self.finalist_assembler.recoveries)
        task, score = self.task.on(device), self.score.on(device)
        return replace(self, task=task, assembler=assembler, finalist_assembler=finalists, score=score, torch_device=device)

    @property
    def search_budgets(self) -> tuple[Budget, ...]:
        """The budgets of the search; if its score is not the metric, limits of the metric's loss hold for finalists only."""
        return self.budgets if self.score.metric == self.task.metric else tuple(map(without_drop, self.budgets))

    @property
    def graph(self) -> ModelGraph:
        """The dense model's plan."""
        return self.assembler.graph

    @property
    def device(self) -> Device | None:
        """The device of the latencies and energies, if the configuration names one."""
        return self.config.device if isinstance(self.config.device, Device) else None

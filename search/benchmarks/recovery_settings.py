"""Recovery settings that benchmarks compare, and a calibrated problem on which all of them can be applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.envs.assembler import Assembler
from secateur.envs.piece_cache import PieceCache
from secateur.envs.recovery import RECOVERIES
from secateur.search.build import build_plugin, build_problem
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import Problem, StatusCallback

RECOVERY_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "batch_norm": ("batch_norm",),
    "least_squares": ("least_squares",),
    "least_squares + batch_norm": ("least_squares", "batch_norm"),
    "sequential": ("sequential",),
    "sequential + batch_norm": ("sequential", "batch_norm"),
}
"""{name in tables and rows: recoveries, with default options, in the order in which they are applied}."""


def calibrated_problem(config: SearchConfig, status: StatusCallback) -> Problem:
    """Return the problem with recovery `least_squares` and score `metric`, in place of those of the configuration.

    The recovery makes calibration run; candidates are scored with the metric.
    """
    search = config.search.model_copy(update={"score": PluginEntry(name="metric")})
    changed = {"recovery": (PluginEntry(name="least_squares"),), "search": search}
    return build_problem(config.model_copy(update=changed), status)


def with_recoveries(assembler: Assembler, names: Sequence[str], **changes: Any) -> Assembler:
    """Return the assembler with these recoveries (default options), an empty cache, and other changes."""
    recoveries = [build_plugin(RECOVERIES, PluginEntry(name=name)) for name in names]
    return replace(assembler, recoveries=recoveries, cache=PieceCache(), **changes)

"""What the benchmarks share: a problem whose calibration has run, and its assembler under other recoveries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from secateur.envs.assembler import Assembler
from secateur.envs.piece_cache import PieceCache
from secateur.envs.recovery import RECOVERIES
from secateur.search.build import build_plugin, build_problem
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import Problem, StatusCallback


def calibrated_problem(config: SearchConfig, status: StatusCallback) -> Problem:
    """Return the problem with the recovery `least_squares`, whatever the configuration says: calibration runs for it."""
    return build_problem(config.model_copy(update={"recovery": (PluginEntry(name="least_squares"),)}), status)


def with_recoveries(assembler: Assembler, names: Sequence[str], **changes: Any) -> Assembler:
    """Return the assembler with these recoveries (default options), other changes, and an empty cache."""
    recoveries = [build_plugin(RECOVERIES, PluginEntry(name=name)) for name in names]
    return replace(assembler, recoveries=recoveries, cache=PieceCache(), **changes)

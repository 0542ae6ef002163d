"""How long one evaluation may take before its worker is taken for hanging."""

from __future__ import annotations

from secateur.envs.core import Episode

FIRST_SECONDS = 1800.0
"""The limit until an evaluation has finished: nothing is known about their length yet."""

LEAST_SECONDS = 60.0
"""The least limit: short evaluations wait for other processes of the machine, for a multiple of their own length."""

FACTOR = 20.0
"""The limit, by the longest evaluation so far."""


class EvaluationTimeout:
    """The time limit of evaluations: fixed, or derived from those that have finished.

    Args:
        seconds: the limit; "auto": FACTOR times the longest evaluation so far, at least LEAST_SECONDS.
    """

    def __init__(self, seconds: float | str = "auto"):
        self._fixed = None if isinstance(seconds, str) else float(seconds)
        self._longest: float | None = None

    @property
    def seconds(self) -> float:
        """The limit of the evaluations that run now."""
        if self._fixed is not None:
            return self._fixed
        return FIRST_SECONDS if self._longest is None else max(FACTOR * self._longest, LEAST_SECONDS)

    def add(self, episode: Episode) -> None:
        """Take a finished episode into account. A cached evaluation counts with the time that it took when it was made."""
        if episode.evaluation is not None:
            self._longest = max(self._longest or 0.0, episode.evaluation.seconds)

"""The metric of a task: its name, direction, range and unit, and what the search makes of a score."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.cost_models.core import InputError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAKEN = ("metric", "evaluation", "on_front", "fits", "state", "budget", "feasible", "images", "seconds", "failure")


@dataclass(frozen=True)
class Metric:
    """What a task scores models with.

    A *score* is a value of the metric, in its own unit. Agents see its *quality*: the score on a scale on which higher is better
    and 0 to 1 is the usual range, so that it can be weighed against shares of costs.

    Attributes:
        name: letters, digits and underscores; tables and columns carry it, and a budget may limit `NAME_drop`.
        higher_is_better: direction.
        unit: "%": a fraction that is shown in percent; otherwise text after the number, such as "dB".
        worst, best: ends of the range, in the order of quality; None: there is no such end.
        chance: score of a model that guesses, the reference point of the hypervolume; None: the worst score, or else quality 0.
    Raises:
        InputError: if a name cannot be used, or the ends contradict the direction.
    """

    name: str
    higher_is_better: bool = True
    unit: str = ""
    worst: float | None = None
    best: float | None = None
    chance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name in _TAKEN:
            raise InputError(
                f"A metric's name must be letters, digits and underscores, such as miou, and not one of {', '.join(_TAKEN)} "
                f"(got {self.name!r})."
            )
        if self.worst is not None and self.best is not None and self._sign * (self.best - self.worst) <= 0:
            higher = "higher" if self.higher_is_better else "lower"
            raise InputError(
                f"Of the metric `{self.name}`, {higher} is better, so its best score must be {higher} than its worst one "
                f"(got worst={self.worst:g}, best={self.best:g})."
            )

    @property
    def _sign(self) -> int:
        return 1 if self.higher_is_better else -1

    def quality(self, score: float, dense: float) -> float:
        """Return a score on the scale that agents see; it increases strictly with how good the score is.

        Both ends known: linear from 0 at the worst score to 1 at the best. Only the worst known: 1 at the dense model's score.
        Only the best known, as with errors: 1 at the best score and 1/2 at the dense model's distance from it, or at a distance
        of 1 if the dense model has the best score. No end known: 1/2 at the dense model's score (an S-shaped curve).

        Args:
            score: to be rescaled.
            dense: score of the dense model.
        """
        if self.worst is not None:
            return (score - self.worst) / self._span(self.worst, dense)
        if self.best is not None:
            return 1 / (1 + abs(self.best - score) / (abs(self.best - dense) or 1.0))
        gain = self._sign * (score - dense) / (abs(dense) or 1.0)
        return (1 + gain / (1 + abs(gain))) / 2

    def score(self, quality: float, dense: float) -> float:
        """Return the score of a quality: the inverse of `quality`, for qualities in (0, 1)."""
        if self.worst is not None:
            return self.worst + quality * self._span(self.worst, dense)
        quality = min(max(quality, 1e-9), 1 - 1e-9)
        if self.best is not None:
            return self.best - self._sign * (1 / quality - 1) * (abs(self.best - dense) or 1.0)
        place = 2 * quality - 1
        return dense + self._sign * place / (1 - abs(place)) * (abs(dense) or 1.0)

    def _span(self, worst: float, dense: float) -> float:
        """Return the difference between quality 1 and quality 0."""
        span = (self.best if self.best is not None else dense) - worst
        return span if span * self._sign > 0 else float(self._sign)  # a dense model at the worst score

    def chance_quality(self, dense: float) -> float:
        """Return the quality of a model that guesses."""
        reference = self.chance if self.chance is not None else self.worst
        return 0.0 if reference is None else self.quality(reference, dense)

    def drop(self, score: float, dense: float) -> float:
        """Return how much worse than the dense model a score is, in the metric's unit; negative if it is better."""
        return self._sign * (dense - score)

    def text(self, score: float) -> str:
        """Return a score with its unit: "93.25 %", "31.42 dB"."""
        return f"{100 * score:.2f} %" if self.unit == "%" else f"{score:.4g} {self.unit}".rstrip()

    def difference(self, amount: float) -> str:
        """Return a difference of scores with its unit: "1.5 points", "0.2 dB"."""
        return f"{100 * amount:g} points" if self.unit == "%" else f"{amount:g} {self.unit}".rstrip()

    @property
    def label(self) -> str:
        """The name as tables show it."""
        return _LABELS.get(self.name, self.name)


def loss_of(metric: Metric, quality: float, score: float, dense: float) -> float:
    """Return the difference of scores that a loss of this much quality makes, starting at `score`."""
    return metric.drop(metric.score(metric.quality(score, dense) - quality, dense), score)


def drop_name(metric: Metric) -> str:
    """Return the name under which a budget limits the loss of the metric."""
    return f"{metric.name}_drop"


_LABELS = {"top1": "top-1", "miou": "mIoU", "psnr": "PSNR", "ssim": "SSIM", "map": "mAP", "rmse": "RMSE"}

TOP1 = Metric("top1", unit="%", worst=0.0, best=1.0)
"""The share of images whose class is the most likely one; what runs of version 0.1 were scored with."""

DIVERGENCE = Metric("divergence", higher_is_better=False, best=0.0)
"""The mean difference of outputs from those of the dense model; 0 means equal."""

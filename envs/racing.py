"""Racing: a candidate that is clearly worse than an evaluated policy is not scored on all images.

Images are processed in a fixed random order. After about 1/8, 1/4 and 1/2 of them, a candidate c is compared with one
reference r on the processed images. Let w be the number of images that r classifies correctly and c does not, and b the number
of images that c classifies correctly and r does not; the other images give no information. If c is at least as good as r on
all images, each of the w + b images is one that only r classifies correctly with a probability of at most 1/2. Therefore

    p = P[Binomial(w + b, 1/2) >= w]                                                                               (1)

is the probability of a difference of at least this size: McNemar's test, exact and one-sided. The candidate is stopped if
p <= ERROR_RATE / 3, one third for each comparison (Bonferroni). A policy that would score at least as well as its reference
on all images is therefore stopped with a probability of at most ERROR_RATE, over the order of the images.

The reference is the policy with the best score among those that were scored on all images, meet every limit that the
candidate meets, and cost at most `COST_TOLERANCE` more in every objective. A stopped policy is therefore not needed for any
budget, and not on any Pareto front, except for differences in cost below the tolerance.

Source: McNemar 1947 for the test. Maron and Moore 1993 (Hoeffding races) for stopping clearly worse candidates.

Where we differ and why:
1. Images are compared in pairs; there is no Hoeffding bound on each score. Two compressions of one network are wrong on
   mostly the same images, so their difference is known with fewer images than their scores.
2. There is one reference, chosen by its score on all images. This choice does not depend on the order of the images, and
   further references would need their own part of the error rate.
3. Images are drawn without replacement, so w given w + b is hypergeometric. Its tail is below that of (1): this was checked
   for all w > b while at most 80 images of the split distinguish the two policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.envs.core import Evaluation

ERROR_RATE = 0.001
"""Largest probability that a policy is stopped although it is as good as its reference."""

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the images after which a candidate is compared with its reference."""

COST_TOLERANCE = 0.01
"""Relative difference by which a reference may cost more than the candidate."""


@dataclass(frozen=True)
class Race:
    """The choice of a reference for each candidate.

    Attributes:
        objectives: names of the costs among the objectives.
        limits: {cost: limit} of each budget.
    """

    objectives: Sequence[str]
    limits: Sequence[Mapping[str, float]]

    def reference(self, costs: Mapping[str, float], evaluated: Iterable[Evaluation]) -> np.ndarray | None:
        """Return which images the candidate's reference classifies correctly, (images,) bool; None if there is no reference.

        Args:
            costs: costs of the candidate.
            evaluated: evaluations of other policies.
        """
        met = [limits for limits in self.limits if _meets(costs, limits)]
        best = max((e for e in evaluated if self._comparable(e, costs, met)), key=lambda e: e.quality, default=None)
        return None if best is None or best.correct is None else unpack(best.correct, best.images)

    def _comparable(self, other: Evaluation, costs: Mapping[str, float], met: Sequence[Mapping[str, float]]) -> bool:
        return (
            other.correct is not None
            and all(other.costs[name] <= (1 + COST_TOLERANCE) * costs[name] for name in self.objectives)
            and all(_meets(other.costs, limits) for limits in met)
        )


def _meets(costs: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return all(costs[name] <= limit for name, limit in limits.items())


def is_clearly_worse(correct: np.ndarray, reference: np.ndarray) -> bool:
    """Return whether eq. (1) is at most one comparison's share of the error rate.

    Args:
        correct: which of the processed images the candidate classifies correctly, (processed,) bool.
        reference: the same for the reference, (at least processed,) bool.
    """
    reference = reference[: len(correct)]
    worse, better = int((reference & ~correct).sum()), int((correct & ~reference).sum())
    return worse > better and binomial_tail(worse + better, worse) <= ERROR_RATE / len(LOOKS)


def binomial_tail(trials: int, successes: int) -> float:
    """Return P[Binomial(trials, 1/2) >= successes], exact except for the final rounding."""
    term, total = 1, 0  # term is C(trials, k), with k descending from trials
    for k in range(trials, successes - 1, -1):
        total += term
        term = term * k // (trials - k + 1)
    return total / 2**trials


def pack(correct: np.ndarray) -> bytes:
    """Return (images,) bool as packed bits."""
    return np.packbits(correct).tobytes()


def unpack(bits: bytes, images: int) -> np.ndarray:
    """Return (images,) bool from packed bits."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=images).astype(bool)

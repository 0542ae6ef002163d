"""Racing: a candidate that is clearly worse than a known policy is not scored on all images.

Images come in a fixed random order. After about 1/8, 1/4 and 1/2 of them a candidate c is compared with one reference r,
on the images that both have seen. Let w be the images that r has correct and c wrong, b those that c has correct and r wrong;
the others say nothing. Were c at least as good as r on all images, every one of the w + b would fall to r with a chance of
at most 1/2, so that

    p = P[Binomial(w + b, 1/2) >= w]                                                                               (1)

is the chance of a difference like this one or larger: McNemar's test, exact and one-sided. The candidate is stopped where
p <= ERROR_RATE / 3, one third for each look (Bonferroni). Hence: a policy that would score at least as well as its
reference on all images is stopped with a probability of at most ERROR_RATE, over the order of the images.

The reference is the policy with the best score among those that were scored on all images, meet every limit that the
candidate meets, and cost at most `COST_TOLERANCE` more in every objective. So what is stopped is no loss to any budget, and
off every front, but for a difference in cost below the tolerance.

Source: McNemar 1947 for the test. Maron and Moore 1993 (Hoeffding races) for stopping what is clearly worse.

Where we differ and why:
1. Pairs instead of Hoeffding's bound on each score: two compressions of one network are wrong on much the same images, so
   the difference is known long before the scores are.
2. One reference, chosen by its score on all images: that choice does not depend on the order of the images, and every
   further reference would take its share of the error rate.
3. Images are drawn without replacement, so that w given w + b is hypergeometric. Its tail is below that of (1): checked
   for all w > b while at most 80 images of the split tell the two policies apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.envs.core import Evaluation

ERROR_RATE = 0.001
"""Largest probability of stopping a policy that is as good as its reference."""

LOOKS = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the images after which candidates are compared."""

COST_TOLERANCE = 0.01
"""A reference may cost this share more than the candidate."""


@dataclass(frozen=True)
class Race:
    """Who is compared with whom.

    Attributes:
        objectives: names of the costs that are traded against top-1.
        limits: {cost: limit} of each budget.
    """

    objectives: Sequence[str]
    limits: Sequence[Mapping[str, float]]

    def reference(self, costs: Mapping[str, float], known: Iterable[Evaluation]) -> np.ndarray | None:
        """Return which images the candidate's reference has correct, (images,) bool; None if nothing is comparable.

        Args:
            costs: of the candidate.
            known: what has been evaluated.
        """
        met = [limits for limits in self.limits if _meets(costs, limits)]
        best = max((e for e in known if self._comparable(e, costs, met)), key=lambda e: e.top1, default=None)
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
    """Return whether eq. (1) is at most one look's share of the error rate.

    Args:
        correct: which of the first images the candidate has correct, (seen,) bool.
        reference: the same of the reference, (at least seen,) bool.
    """
    reference = reference[: len(correct)]
    worse, better = int((reference & ~correct).sum()), int((correct & ~reference).sum())
    return worse > better and binomial_tail(worse + better, worse) <= ERROR_RATE / len(LOOKS)


def binomial_tail(trials: int, successes: int) -> float:
    """Return P[Binomial(trials, 1/2) >= successes], exactly but for the last rounding."""
    term, total = 1, 0  # C(trials, k) from k = trials down
    for k in range(trials, successes - 1, -1):
        total += term
        term = term * k // (trials - k + 1)
    return total / 2**trials


def pack(correct: np.ndarray) -> bytes:
    """Return the bits of (images,) bool."""
    return np.packbits(correct).tobytes()


def unpack(bits: bytes, images: int) -> np.ndarray:
    """Return (images,) bool."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=images).astype(bool)

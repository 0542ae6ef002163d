"""At which channel counts to measure, and what a fine scan says about the counts between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.cost_models.latency_table import Axis, count_kinds

STEPS = (1, 2, 4, 8, 16, 32)
"""What blocks of channels may have."""
SMALL = 16
"""Up to here an axis is measured densely, because kernels change at few channels."""
MARGIN, NEGLIGIBLE = 1.1, 0.015
"""A simpler staircase is taken if its error is at most the smallest one times the first, or at most the second (noise)."""


@dataclass(frozen=True)
class Density:
    """How many channel counts of an axis are measured.

    Attributes:
        small, large: counts of one kind up to `SMALL`, and above it, evenly spaced on a logarithmic scale.
        multiples: how many kinds of multiples a staircase may have.
    """

    small: int = 4
    large: int = 5
    multiples: int = 2


FULL, QUICK = Density(), Density(small=1, large=3, multiples=1)


def measured_counts(
    largest: int, multiples: tuple[int, ...] = (), step: int = 1, coarse: bool = False, density: Density = FULL
) -> tuple[int, ...]:
    """Return the channel counts to measure on an axis that goes up to `largest`.

    Args:
        multiples, step: the staircase, see `Axis`; every kind of counts gets points of its own.
        coarse: few points, for layers of millions of weights, whose time is that of reading them.
        density: how many points.
    """
    if largest <= 4:
        return tuple(range(1, largest + 1))
    if coarse:
        return tuple(sorted({1, max(1, largest // 16), max(1, largest // 4), largest // 2, largest}))
    every = np.arange(1, largest + 1)
    kinds = count_kinds(every, multiples)
    chosen = {1, largest}
    for kind in range(len(multiples) + 1):
        counts = every[kinds == kind]
        if multiples and kind == len(multiples):
            # Halfway between multiples: what a remainder costs on average. Kernels change at 16 channels.
            middle = counts[counts % multiples[-1] == multiples[-1] // 2]
            chosen.update(count for count in (SMALL - 1, SMALL + 1) if count in counts)
        else:
            middle = counts
        small, large = middle[middle <= SMALL], middle[middle > SMALL]
        if kind == 0 and step > 1:  # within a step nothing changes
            large = large[large % step == 0]
        chosen.update(_spread(small, density.small, np.linspace), _spread(large, density.large, np.geomspace))
    return tuple(sorted(int(count) for count in chosen))


def _spread(counts: np.ndarray, number: int, spacing: Callable[..., np.ndarray]) -> list[int]:
    """Return the counts nearest to `number` evenly spaced ones, first and last included."""
    if len(counts) <= number:
        return counts.tolist()
    wanted = spacing(counts[0], counts[-1], number)
    return [int(counts[np.abs(counts - value).argmin()]) for value in wanted]


def find_staircase(
    counts: Sequence[int], milliseconds: Sequence[float], density: Density = FULL
) -> tuple[tuple[int, ...], int, float]:
    """Return (multiples, step, mean relative error) of the simplest staircase that explains a scan nearly best.

    A candidate's error is that of predicting the whole scan from the counts that would be measured.

    Args:
        counts: 1, 2, ..., largest.
        milliseconds: the time at each.
        density: of the measured counts.
    """
    times = np.array(milliseconds)
    # Multiples of 8 or 16 are few, but policies choose them: a count weighs more, the rarer its power of two is.
    powers = np.gcd(np.array(counts), STEPS[-1])
    weights = 1 / np.sqrt(np.array([(powers == power).sum() for power in powers]))
    errors = {}
    for multiples, step in _candidates(counts[-1] // 2, density.multiples):
        axis = Axis(measured_counts(counts[-1], multiples, step, density=density), multiples, step)
        lower, upper, weight = (part[1:] for part in axis.coordinates())
        known = times[np.array(axis.counts) - 1]
        predicted = known[lower] * (1 - weight) + known[upper] * weight
        errors[multiples, step] = float(np.average(np.abs(predicted / times - 1), weights=weights))
    limit = max(min(errors.values()) * MARGIN, NEGLIGIBLE)
    (multiples, step), error = next(item for item in errors.items() if item[1] <= limit)
    return multiples, step, error


def _candidates(largest: int, most_multiples: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield (multiples, step), simplest first."""
    kinds: list[tuple[int, ...]] = [()] + [(multiple,) for multiple in STEPS[1:]]
    kinds += [(high, low) for low in STEPS[1:] for high in STEPS[1:] if low < high]
    for multiples in kinds:
        if len(multiples) > most_multiples:
            continue
        least = multiples[0] if multiples else 1
        for step in STEPS:
            if least <= step <= max(largest, 1):
                yield multiples, step


def plot(counts: Sequence[int], milliseconds: Sequence[float], height: int = 8) -> str:
    """Return the scan as text: one column per count."""
    times = np.array(milliseconds)
    levels = np.ceil(times / times.max() * height).astype(int)
    rows = ["".join("█" if level >= row else " " for level in levels) for row in range(height, 0, -1)]
    ruler = "".join("|" if count % 8 == 0 else "." for count in counts)
    return "\n".join([f"{1e3 * times.max():8.1f} µs {rows[0]}", *(" " * 12 + row for row in rows[1:]), " " * 12 + ruler])

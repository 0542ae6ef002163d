"""Pareto maths: violations of constraints, fronts, hypervolume, crowding, and an archive of policies.

All objectives here are *minimized*. The objectives of an episode are minus its reward vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import moocore
import numpy as np

from secateur.envs.core import CompressionPolicy


def violation(constraints: Mapping[str, float]) -> float:
    """Return the sum of the positive constraints: 0 is feasible, NaN counts as infinite."""
    total = sum(max(value, 0.0) if value == value else np.inf for value in constraints.values())
    return float(total)


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Return which points, (n, num_objectives), no other point dominates, (n,) bool.

    Equal points are all kept. Points with a NaN or an infinity are never among them.
    """
    points = np.asarray(points, float)
    keep = np.isfinite(points).all(axis=1)
    if keep.any():
        keep[keep] = moocore.is_nondominated(points[keep], keep_weakly=True)
    return keep


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume that the points dominate, up to the reference point; larger is better.

    Args:
        points: (n, num_objectives), minimized, any order, dominated ones allowed; n may be 0. Points with a NaN or an
            infinity are left out, and a point that is not below the reference in every objective adds nothing.
        reference: (num_objectives,), the worst value of interest of each objective.
    Source: Zitzler & Thiele 1998; computed by moocore.
    """
    points = np.asarray(points, float)
    points = points[np.isfinite(points).all(axis=1)] if len(points) else points
    return float(moocore.hypervolume(points, ref=np.asarray(reference, float))) if len(points) else 0.0


def crowding_distance(points: np.ndarray) -> np.ndarray:
    """Return the crowding distance of each point of a front, (n,): the summed sides of the box between its neighbors.

    Each objective is scaled to its range on the front. The extreme points of every objective get infinity.
    Source: Deb et al. 2002, NSGA-II, section III-B.
    """
    points = np.asarray(points, float)
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


class Archive:
    """The non-dominated policies among all that were added.

    Scores stay as they were measured. The best of many noisy scores is an overestimate (the winner's curse), so winners are
    scored again on images that the search did not use.
    """

    def __init__(self) -> None:
        self.policies: list[CompressionPolicy] = []
        self.objectives = np.empty((0, 0))
        """(n, num_objectives), minimized, one row per policy."""

    def __len__(self) -> int:
        return len(self.policies)

    def add(self, policy: CompressionPolicy, objectives: np.ndarray) -> bool:
        """Return whether the policy, whose minimized `objectives` are (num_objectives,), is now in the archive.

        A policy that is in the archive already keeps its first score.
        """
        if policy in self.policies:
            return False
        policies = [*self.policies, policy]
        points = np.vstack([self.objectives.reshape(-1, len(objectives)), objectives])
        kept = np.flatnonzero(non_dominated(points))
        self.policies, self.objectives = [policies[i] for i in kept], points[kept]
        return len(points) - 1 in kept

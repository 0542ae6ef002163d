import itertools

import numpy as np
import pytest

from secateur.agents.pareto import Archive, crowding_distance, hypervolume, non_dominated, violation
from secateur.envs.core import CompressionPolicy


def policy(number):
    return CompressionPolicy((number,), (), ())


def dominates(first, second):
    return np.all(first <= second) and np.any(first < second)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_front_is_what_pairwise_comparison_leaves(objectives):
    points = np.random.default_rng(objectives).integers(0, 4, (60, objectives)).astype(float)
    expected = [not any(dominates(other, point) for other in points) for point in points]
    np.testing.assert_array_equal(non_dominated(points), expected)


def test_front_by_construction():
    share = np.linspace(0, 1, 7)
    front = np.stack([share, 1 - share], axis=1)
    points = np.vstack([front + 0.1, front, front[:2]])
    np.testing.assert_array_equal(non_dominated(points), [False] * 7 + [True] * 9)


def test_points_that_are_not_numbers_are_never_on_the_front():
    points = np.array([[np.nan, 0], [0, 1], [-np.inf, 5], [1, 0]])
    np.testing.assert_array_equal(non_dominated(points), [False, True, False, True])
    assert non_dominated(np.empty((0, 2))).shape == (0,)


def test_hypervolume_of_boxes():
    assert hypervolume(np.array([[1.0, 1, 1]]), np.array([3, 4, 5])) == pytest.approx(2 * 3 * 4)
    # Two boxes, 2 x 1 and 1 x 2, that share 1 x 1; the third point is dominated, the fourth beyond the reference.
    points = np.array([[1.0, 2], [2, 1], [2, 2], [0, 3]])
    assert hypervolume(points, np.array([3, 3])) == pytest.approx(3)


def test_hypervolume_of_a_staircase():
    steps = 10
    points = np.array([[i, steps - 1 - i] for i in range(steps)]) / steps
    assert hypervolume(points, np.ones(2)) == pytest.approx((steps + 1) / (2 * steps))


def test_hypervolume_of_nothing():
    assert hypervolume(np.empty((0, 2)), np.ones(2)) == 0
    assert hypervolume(np.array([[np.nan, 0]]), np.ones(2)) == 0


def test_crowding_is_the_neighbors_box_scaled_by_the_range():
    points = np.array([[0.0, 40], [1, 10], [3, 5], [4, 0]])
    np.testing.assert_allclose(crowding_distance(points), [np.inf, 3 / 4 + 35 / 40, 3 / 4 + 10 / 40, np.inf])
    np.testing.assert_array_equal(crowding_distance(np.zeros((3, 1)))[1:2], [0])


def test_violation_counts_only_violated_constraints():
    assert violation({"a": -0.5, "b": 0.25, "c": 0.5}) == 0.75
    assert violation({"a": -0.5}) == violation({}) == 0
    assert violation({"a": np.nan}) == np.inf


def test_archive_keeps_the_front_of_all_that_was_added():
    points = np.random.default_rng(0).random((50, 3))
    archive = Archive()
    for number, point in enumerate(points):
        archive.add(policy(number), point)
    expected = {policy(int(i)): tuple(points[i]) for i in np.flatnonzero(non_dominated(points))}
    assert dict(zip(archive.policies, map(tuple, archive.objectives), strict=True)) == expected


def test_archive_tells_whether_it_took_the_policy():
    archive = Archive()
    assert archive.add(policy(0), np.array([1.0, 1]))
    assert not archive.add(policy(1), np.array([2.0, 1]))
    assert not archive.add(policy(2), np.array([np.nan, 0]))
    assert archive.add(policy(3), np.array([1.0, 1]))  # another policy with the same scores
    assert archive.add(policy(4), np.array([0.5, 1]))
    assert archive.policies == [policy(4)]


def test_archive_keeps_the_first_score_of_a_policy():
    archive = Archive()
    archive.add(policy(0), np.array([1.0]))
    assert not archive.add(policy(0), np.array([0.0]))
    np.testing.assert_array_equal(archive.objectives, [[1.0]])


def test_archive_does_not_depend_on_the_order():
    points = np.random.default_rng(1).integers(0, 5, (6, 2)).astype(float)
    fronts = set()
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        archive = Archive()
        for number in order:
            archive.add(policy(number), points[number])
        fronts.add(frozenset(archive.policies))
    assert len(fronts) == 1

"""Sensitivities are the divergences that they status, and lines between what was measured."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.envs.core import Sensitivities
from secateur.envs.sensitivity import LEVELS, WORST, measure_sensitivities
from secateur.envs.tasks.core import kl_divergence

IMAGES = torch.linspace(-1, 1, 7 * 3).view(7, 3, 1, 1)


class Shifted(nn.Module):
    """Scores three classes by three pixels; every choice shifts one class by its strength."""

    def __init__(self, shifts):
        super().__init__()
        self.shifts = torch.tensor(shifts)

    def forward(self, images):
        return images.flatten(1) + self.shifts


@pytest.fixture
def space(feasible_space):
    return feasible_space(prune_ratio=(0.0, 0.9), weight_bits=(2, 4, 8)).policy_space


def network(space, asked=None):
    """The first choice shifts the first class, and so on; the fourth does nothing, the fifth gives NaN."""

    def make(policy):
        if asked is not None:
            asked.append(policy)
        actions = space.levels_to_sequence(space.policy_to_levels(policy))[space.used]
        shifts = [2.0 * actions[0], actions[1], actions[2] if actions[4] == 0 else float("nan")]
        return Shifted(shifts)

    return make


def test_curves_are_mean_divergences_of_the_class_probabilities(space):
    curves = measure_sensitivities(space, network(space), IMAGES.split(3), kl_divergence)
    assert curves.shape == (len(space.decisions), 65) and (curves[:, 0] == 0).all()
    dense = torch.log_softmax(IMAGES.flatten(1), 1)
    for index, shift in enumerate([2.0, 1.0, 1.0]):
        moved = torch.log_softmax(IMAGES.flatten(1) + shift * torch.eye(3)[index], 1)
        expected = nn.functional.kl_div(moved, dense, log_target=True, reduction="batchmean")
        assert curves[index, -1] == pytest.approx(float(expected), rel=0.01)
    assert (np.diff(curves[:3]) >= 0).all()
    assert (curves[3] == 0).all()
    assert curves[4, -1] == WORST


def test_few_networks_are_made_and_each_differs_in_one_choice(space):
    asked, told = [], []
    measure_sensitivities(space, network(space, asked), [IMAGES], kl_divergence, told.append)
    assert len(asked) == len(set(asked)) <= 1 + LEVELS * len(space.decisions)
    levels = [space.policy_to_levels(policy) for policy in asked]
    assert (levels[0] == space.weakest).all()
    assert all((other != levels[0]).sum() == 1 for other in levels[1:])
    assert told[-1].endswith(f"{len(space.decisions)} of {len(space.decisions)}")


def test_a_choice_that_cannot_be_tried_is_the_worst_and_ends_nothing(space):
    def make(policy):
        if policy.widths[0] < 3:
            raise RuntimeError("singular")
        return network(space)(policy)

    curves = measure_sensitivities(space, make, [IMAGES], kl_divergence)
    assert curves[0, -1] == WORST and 0 < curves[0, 16] < 1 and curves[1, -1] < 1


def test_lines_are_drawn_between_points():
    curves = Sensitivities(np.array([[0.0, 1.0, 3.0], [0.0, 0.0, 8.0]]))
    np.testing.assert_allclose(curves(np.array([[0.25, 0.75], [1.0, 1.0], [-1.0, 2.0]])), [[0.5, 4.0], [3.0, 8.0], [0.0, 8.0]])
    assert curves(np.zeros((2, 3, 2))).shape == (2, 3, 2)

"""Sensitivity: the effect of each choice alone on the outputs of the model. One layer is compressed, all others are untouched.

    divergence_i(s) = mean over images of KL(least compression || choice i alone at action s), in nats                   (1)

on class probabilities; other tasks have their own divergence.

Source: ZeroQ (Cai et al. 2020, arXiv:2001.00281, eq. 6) for bit-widths; here for prune ratios too, after the search's recovery.
Sums of powers of (1) over all choices predict which of two policies scores better, before any policy is evaluated.

Images are needed, labels are not. Four levels per choice are measured, with linear interpolation between them: 64 images and four
levels rank random policies of ResNet-56 as well as 256 images and eight levels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.envs.core import CompressionPolicy
from secateur.envs.inputs import Inputs
from secateur.envs.memory import run_model
from secateur.envs.policy_space import PolicySpace

log = logging.getLogger(__name__)

Divergence = Callable[[Any, Any], torch.Tensor]

IMAGES = 64
LEVELS = 4
"""Number of images, and of levels per choice, that are measured."""
POINTS = 65
"""Number of points of a stored curve: actions 0, 1/64 ... 1."""
WORST = 10.0
"""Divergence in nats of a network that fails, or whose outputs are not finite."""


def measure_sensitivities(
    space: PolicySpace,
    network: Callable[[CompressionPolicy], nn.Module],
    inputs: Sequence[Inputs],
    divergence: Divergence,
    status: Callable[[str], None] = lambda text: None,
) -> np.ndarray:
    """Return the curves of every choice, (entries, POINTS); see `Sensitivities` in envs/core.py.

    Args:
        space: the decisions.
        network: returns the network of a policy.
        inputs: batches of inputs.
        divergence: that of two batches of outputs, per sample (`Task.divergence`).
        status: progress callback.
    """
    least = space.weakest
    dense = _outputs(network(space.levels_to_policy(least)), inputs)
    curves = np.zeros((len(space.decisions), POINTS), np.float32)
    for index, decision in enumerate(space.decisions):
        status(f"measuring the sensitivity of choice {index + 1} of {len(space.decisions)}")
        wanted = np.arange(1, LEVELS + 1) / LEVELS
        levels = np.unique(np.abs(decision.actions[:, None] - wanted).argmin(axis=0))
        measured = {0.0: 0.0}
        for level in levels[levels > least[index]]:
            alone = least.copy()
            alone[index] = level
            found = _mean_divergence(dense, partial(network, space.levels_to_policy(alone)), inputs, divergence)
            measured[float(decision.actions[level])] = max(found, 0.0) if np.isfinite(found) else WORST
        curves[index] = np.interp(np.linspace(0, 1, POINTS), list(measured), list(measured.values()))
    return curves


def _mean_divergence(
    dense: Sequence[Any], make: Callable[[], nn.Module], inputs: Sequence[Inputs], divergence: Divergence
) -> float:
    """Return the mean divergence; NaN if the network cannot be made or run, as any policy of a search may fail."""
    try:
        moved = _outputs(make(), inputs)
    except Exception as error:
        log.warning("a sensitivity could not be measured: %s: %s", type(error).__name__, error)
        return float("nan")
    return float(torch.cat([divergence(*pair) for pair in zip(dense, moved, strict=True)]).mean())


@torch.inference_mode()
def _outputs(network: nn.Module, inputs: Sequence[Inputs]) -> list[Any]:
    return [run_model(network, batch) for batch in inputs]

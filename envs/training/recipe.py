"""How a compressed network is trained: the options of training with distillation, and learning rates by number of epochs.

A repaired network is damaged by a large learning rate: in the public logs of DepGraph, a ResNet-56 with 88.85 % falls to 85.26 %
after one epoch at 0.01 and needs sixty epochs to return, but has 92.9 % after one epoch at 0.001. So a short training starts
with a small learning rate that only falls; a long one can afford to raise it first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from secateur.cost_models.core import NonNegative, Positive, Range, check_fields

LONG = 15
"""Number of epochs from which on a training is long."""

SHORT_RATE, LONG_RATE = 2.5e-3, 1e-2
"""Learning rates: at the start of a short training, and the largest one of a long training."""

WARM_UP, START, END = 0.3, 0.1, 1e-3
"""A long training: share of its steps in which the learning rate rises, and its first and last rate by the largest one."""


@dataclass(frozen=True)
class DistillationConfig:
    """Training of a compressed network with knowledge distillation from the dense model: SGD with momentum.

    The loss is (1 - w) task loss + w T^2 KL(dense || compressed), with the scores of both networks divided by the temperature T
    (Hinton et al. 2015, arXiv:1503.02531). Where the outputs are no class scores, the task's divergence stands in for T^2 KL.

    Attributes:
        epochs: number of passes over the training samples; 0: no training. The last epoch counts, never the best one.
        batch_size: largest number of samples per step.
        learning_rate: the largest one; None: 0.0025 for the schedule `cosine`, 0.01 for `one_cycle`.
        schedule: "cosine": the learning rate falls to zero along half a cosine; "one_cycle": it rises from a tenth for 30 % of
            the steps and falls to a thousandth; "auto": `cosine` for fewer than 15 epochs, else `one_cycle`.
        momentum: of the optimizer.
        weight_decay: of all parameters.
        temperature: T of the loss; higher values give more weight to the classes that are unlikely.
        distillation: w of the loss; 0: the dense model is not used, 1: labels are not used.
        label_smoothing: share of the task loss that is spread over all classes; class scores only.
        ema: decay per step of the running average of the weights, which takes the place of the last weights; 0: no average.
        shift: images are shifted by up to this many pixels in each direction; the border is filled with black.
        flip: whether half of the images, drawn in every epoch, are mirrored left to right; not for digits or text.
        estimator: how weights with bits are trained: "straight_through"; "learned_step" (LSQ) trains the scales of weights and
            inputs too; "soft" (DSQ) has the gradient of a smooth staircase; "asymptotic" (AQE) moves from float to the grid.
        precision: number format of activations and products; weights are float32 with "bfloat16" (autocast) too.
        seed: random seed for the order of the images, shifts and flips.
    """

    epochs: Annotated[int, Range(least=0)] = 5
    batch_size: Annotated[int, Range(least=2)] = 128
    learning_rate: Annotated[float | None, Range(above=0)] = None
    schedule: Literal["auto", "cosine", "one_cycle"] = "auto"
    momentum: Annotated[float, Range(least=0, below=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    temperature: Positive = 4.0
    distillation: Annotated[float, Range(least=0, most=1)] = 0.9
    label_smoothing: Annotated[float, Range(least=0, below=1)] = 0.0
    ema: Annotated[float, Range(least=0, below=1)] = 0.0
    shift: Annotated[int, Range(least=0)] = 0
    flip: bool = False
    estimator: Literal["straight_through", "learned_step", "soft", "asymptotic"] = "straight_through"
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "the training")

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the learning-rate schedule, and set the optimizer to its first rate.

        Args:
            optimizer: with any learning rate.
            steps: number of steps of the whole training.
        """
        one_cycle = self.schedule == "one_cycle" or (self.schedule == "auto" and self.epochs >= LONG)
        rate = self.learning_rate or (LONG_RATE if one_cycle else SHORT_RATE)
        if one_cycle and steps > 1 / WARM_UP:  # too few steps have no cycle
            return torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                rate,
                steps,
                pct_start=WARM_UP,
                cycle_momentum=False,
                div_factor=1 / START,
                final_div_factor=START / END,
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

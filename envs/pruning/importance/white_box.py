"""White-Box: a mask per class and channel is trained; channels with small masks are important for no class.

With M (classes, units) initialized to 1, the activations of an image of class y are multiplied by

    M_y + sum over other classes c of e_c M_c,  e_c drawn from U(0, 1)                                           (1)

and only M is trained, with the loss cross-entropy + sparsity * |sum over classes M|. The score is |sum over classes M|.

Source: Zhang et al. 2022 (White-Box), TNNLS, the class-wise mask and its score.

Where we differ and why:
1. (1) is divided by the sum of its coefficients, so masks of 1 do not change the network: batch norms keep their statistics,
   while in the paper they adapt during tens of epochs.
2. The mask is applied to the inputs of a group's readers, after batch norm and nonlinearity: a coupled group has one such
   activation per unit, but several producers.
3. The masks are trained for a few epochs with Adam on calibration images, not for the paper's whole training; the weights are
   frozen in both. Adam's steps have equal size in all layers, so a few steps are enough.
4. Scores and sparsity are means over the classes (and units), not sums, so the same settings work for different networks.
5. Groups that no layer module reads are ranked by the L1 norm of their producers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cost_models.core import Count, InputError, NonNegative, Positive, check_fields
from secateur.envs.inputs import call_model
from secateur.envs.pruning.importance.common.readers import input_channels
from secateur.envs.pruning.importance.common.unit_slices import mean_l1_norm
from secateur.envs.pruning.importance.core import DenseModel


@dataclass(frozen=True)
class WhiteBoxConfig:
    """Training of the masks.

    Attributes:
        epochs: passes over the images.
        learning_rate: learning rate of Adam.
        sparsity: weight of the mean |mask| in the loss. A trained network has almost no loss on its training images, so the
            masks do not change without this term (ResNet-56 on CIFAR-10, half of every block's inner channels removed
            and refitted, 8,000 test images, at a learning rate of 0.02: 62.5 % with 0, 80.0 with 1, 82.1 with 5).
        max_images: largest number of calibration images.
        batch_size: images per step.
    """

    epochs: Count = 3
    learning_rate: Positive = 0.03
    sparsity: NonNegative = 5.0
    max_images: Count = 512
    batch_size: Count = 32

    def __post_init__(self) -> None:
        check_fields(self, "the importance `white_box`")


@dataclass(frozen=True)
class WhiteBox:
    """Absolute value of the mean over the classes of each unit's trained masks."""

    config: WhiteBoxConfig = WhiteBoxConfig()
    needs_images: ClassVar[bool] = True

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; trains masks on a copy of the model."""
        masked = _MaskedModel(dense)
        if masked.masks:
            self._train(masked, dense)
        return tuple(
            masked.masks[group.name].detach().double().mean(0).abs().cpu().numpy()
            if group.name in masked.masks
            else mean_l1_norm(dense.model, group)
            for group in dense.graph.groups
        )

    def _train(self, masked: _MaskedModel, dense: DenseModel) -> None:
        generator = torch.Generator().manual_seed(int(dense.rng.integers(2**63)))
        ((images, labels),) = dense.first_batches(self.config.max_images, self.config.max_images)
        if labels.dim() != 1 or labels.is_floating_point():
            raise InputError("`importance: white_box` needs one class per image. Choose another importance.")
        masks = list(masked.masks.values())
        optimizer = torch.optim.Adam(masks, self.config.learning_rate)
        for _ in range(self.config.epochs):
            for order in torch.randperm(len(images), generator=generator).split(dense.fitting(self.config.batch_size)):
                picked = order.to(labels.device)
                masked.coefficients = class_coefficients(labels[picked], masked.classes, generator)
                scores = torch.cat([mask.mean(0) for mask in masks])
                loss = F.cross_entropy(call_model(masked.model, images[picked]), labels[picked])
                optimizer.zero_grad()
                (loss + self.config.sparsity * scores.abs().mean()).backward()
                optimizer.step()


class _MaskedModel:
    """A copy of the dense model with masked inputs of all readers; `coefficients` (images, classes) are set for each batch."""

    def __init__(self, dense: DenseModel) -> None:
        self.model = copy.deepcopy(dense.model).eval().requires_grad_(False)
        with torch.no_grad():
            scores = call_model(self.model, dense.first_images(1))
        if not isinstance(scores, Tensor) or scores.dim() != 2:
            raise InputError("`importance: white_box` needs a model that returns class scores. Choose another importance.")
        self.classes = scores.shape[1]
        self.coefficients = scores.new_empty(0, self.classes)
        self.masks: dict[str, Tensor] = {}
        for group in dense.graph.groups:
            for name in group.consumers:
                channels = input_channels(self.model, group, name)
                if channels is not None:
                    self.masks.setdefault(group.name, scores.new_ones(self.classes, group.units).requires_grad_())
                    self.model.get_submodule(name).register_forward_pre_hook(self._hook(group.name, channels))

    def _hook(self, group: str, channels: Tensor) -> Callable:
        def mask_input(layer: nn.Module, inputs: tuple) -> tuple:
            x = inputs[0]
            axis = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
            per_unit = self.coefficients @ self.masks[group]  # eq. (1), (images, units)
            factors = x.new_ones(len(x), x.shape[axis]).index_copy(
                1, channels.flatten(), per_unit.repeat_interleave(channels.shape[1], dim=1)
            )
            shape = [len(x), *[1] * (x.dim() - 1)]
            shape[axis] = -1
            return (x * factors.view(shape), *inputs[1:])

        return mask_input


def class_coefficients(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return the coefficients of eq. (1) over their sum, (images, classes): 1 for the image's class, U(0, 1) for the others."""
    drawn = torch.rand(len(labels), classes, generator=generator).to(labels.device).scatter(1, labels[:, None], 1.0)
    return drawn / drawn.sum(1, keepdim=True)

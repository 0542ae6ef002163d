"""A small anchor-free detector for the generated scenes of `secateur.envs.tasks.scenes`, trained in some minutes.

Configuration: `model: {factory: "secateur:scene_detector", part: network, weights: trained, input: [1, 64, 64]}`,
`data: {name: digit_scene_boxes, train: rest, ...}`, `task: detection`.

Source: Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object Detection", arXiv:1904.01355; feature pyramid: Lin et al.
2017, arXiv:1612.03144; loss of the classes: Lin et al. 2017, "Focal Loss", arXiv:1708.02002.

Where we differ and why:
1. Two levels, and a box belongs to a level by its area: a narrow digit could lie between the positions of the coarse level.
2. Distances are softplus, not exp: rounding errors of the outputs are not amplified.
3. The head has no normalization, because both levels share it and their statistics differ (FCOS has group norms).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss, sigmoid_focal_loss

from secateur.envs.tasks.supervised import SupervisedTask
from secateur.envs.tasks.training import Progress, Recipe, cached_weights

RECIPE = Recipe(epochs=10, batch_size=16, learning_rate=0.004, weight_decay=1e-3, shift=0, optimizer="adamw")

STRIDES = (4, 8)
"""Pixels between two positions, on the fine and on the coarse level."""

LARGEST_FINE = 240.0
"""Boxes of at most this area in pixels belong to the fine level, the others to the coarse one. Half of the scenes' boxes do."""

CENTER = 1.5
"""A box belongs to the positions inside it, at most this many strides from its center along each axis."""

LEAST_SCORE, MOST_BOXES, NMS_OVERLAP = 0.1, 20, 0.5
"""Answers have at least this score; at most so many per image; of two boxes of a class with a larger overlap, one is kept."""

RARE = 0.01
"""Score of every class before training: most positions show no digit (Lin et al. 2017, Section 4.1)."""

Raw = Mapping[str, Tensor]
"""What the network returns: classes (N, P, classes), distances (N, P, 4) and centerness (N, P, 1), all unbounded."""


# --------------------------------------------------------------------------------------------------------------- network


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 3x3 convolution with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class Head(nn.Module):
    """Raw outputs of one level, each (N, positions, values), row by row; both levels share the head.

    Args:
        width: channels of the pyramid.
        classes: number of classes.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.class_tower = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.box_tower = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.classes = RareClasses(width, classes, 3, 1, 1)
        self.distances = nn.Conv2d(width, 4, 3, 1, 1)
        self.centerness = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes = self.box_tower(x)
        maps = {
            "classes": self.classes(self.class_tower(x)),
            "distances": self.distances(boxes),
            "centerness": self.centerness(boxes),
        }
        return {name: values.flatten(2).transpose(1, 2) for name, values in maps.items()}


class RareClasses(nn.Conv2d):
    """A convolution whose outputs begin at the logarithmic odds of `RARE`."""

    def reset_parameters(self) -> None:
        """Draw new weights."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.constant_(self.bias, math.log(RARE / (1 - RARE)))


class Network(nn.Module):
    """Raw outputs at all positions of both levels, the fine level first, from images (N, C, H, W).

    This is the part of the detector that can be traced. Height and width are multiples of the larger stride.

    Args:
        widths: channels at strides 2, 4 and 8.
        pyramid: channels of the pyramid.
        classes: number of classes.
        channels: channels of the images.
    """

    def __init__(self, widths: Sequence[int], pyramid: int, classes: int, channels: int) -> None:
        super().__init__()
        first, fine, coarse = widths
        self.stem = _convolution(channels, first, 2)
        self.fine = nn.Sequential(_convolution(first, fine, 2), _convolution(fine, fine))
        self.coarse = nn.Sequential(_convolution(fine, coarse, 2), _convolution(coarse, coarse), _convolution(coarse, coarse))
        self.lateral_fine, self.lateral_coarse = nn.Conv2d(fine, pyramid, 1), nn.Conv2d(coarse, pyramid, 1)
        self.smooth_fine, self.smooth_coarse = _convolution(pyramid, pyramid), _convolution(pyramid, pyramid)
        self.head = Head(pyramid, classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.fine(self.stem(images))
        top = self.lateral_coarse(self.coarse(fine))
        below = self.lateral_fine(fine) + F.interpolate(top, scale_factor=2, mode="nearest")
        levels = [self.head(self.smooth_fine(below)), self.head(self.smooth_coarse(top))]
        return {name: torch.cat([level[name] for level in levels], dim=1) for name in levels[0]}


class SceneDetector(nn.Module):
    """A detector that is called like those of torchvision.

    Args:
        network: see `Network`.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Return {boxes, scores, labels} of each image; in training mode the losses.

        Args:
            images: of one size, (C, H, W) each.
            targets: boxes (n, 4) and labels (n,), 1, 2, ..., of each image; needed in training mode.
        """
        batch = torch.stack(list(images))
        height, width = batch.shape[2:]
        raw, grid = self.network(batch), positions(height, width).to(batch.device)
        if self.training:
            assert targets is not None, "training needs targets"
            return losses(raw, grid, targets)
        return [answer({name: values[n] for name, values in raw.items()}, grid, (height, width)) for n in range(len(batch))]


# ------------------------------------------------------------------------------------------------------ boxes and positions


def positions(height: int, width: int) -> Tensor:
    """Return x, y and stride of every position of an image in pixels, (P, 3), in the order of the raw outputs."""
    levels = []
    for stride in STRIDES:
        y, x = torch.meshgrid(*(torch.arange(stride / 2, size, stride) for size in (height, width)), indexing="ij")
        levels.append(torch.stack([x.flatten(), y.flatten(), torch.full((x.numel(),), float(stride))], dim=1))
    return torch.cat(levels)


def to_boxes(distances: Tensor, grid: Tensor) -> Tensor:
    """Return the boxes x1, y1, x2, y2 in pixels, (..., P, 4).

    Args:
        distances: raw distances to the left, top, right and bottom edge, (..., P, 4); softplus of them is in strides.
        grid: their positions, (P, 3), from `positions`.
    """
    left_top, right_bottom = (F.softplus(distances) * grid[:, 2:]).split(2, dim=-1)
    return torch.cat([grid[:, :2] - left_top, grid[:, :2] + right_bottom], dim=-1)


def assign(boxes: Tensor, grid: Tensor) -> Tensor:
    """Return for each position the index of the box that it must find, (P,); -1: none. The smallest one wins.

    Args:
        boxes: (n, 4).
        grid: (P, 3), from `positions`.
    """
    if not len(boxes):
        return grid.new_full((len(grid),), -1, dtype=torch.int64)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(1)
    of_level = (grid[:, None, 2] == STRIDES[0]) == (areas <= LARGEST_FINE)
    away = grid[:, None, :2] - (boxes[:, :2] + boxes[:, 2:]) / 2  # (P, n, 2): from the centers
    near = away.abs() <= torch.minimum(sides / 2, CENTER * grid[:, None, 2:])
    smallest, index = torch.where(of_level & near.all(2), areas, torch.inf).min(1)
    return torch.where(smallest.isfinite(), index, -1)


def centerness(boxes: Tensor, points: Tensor) -> Tensor:
    """Return 1 for points at the center of their box, and towards 0 at its edges, (n,); eq. (3) of FCOS.

    Args:
        boxes: (n, 4).
        points: x and y, (n, 2), inside the boxes.
    """
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(before, after) / torch.maximum(before, after)).prod(1).sqrt()


# --------------------------------------------------------------------------------------------------------- loss and answers


def losses(raw: Raw, grid: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the losses of classes (focal), boxes (generalized overlap) and centerness (cross-entropy), each a scalar.

    All are sums over the batch, by the number of positions with a box; boxes are weighted by their centerness.

    Args:
        raw: outputs of the network.
        grid: (P, 3), from `positions`.
        targets: boxes (n, 4) and labels (n,), 1, 2, ..., of each image.
    """
    wanted = torch.zeros_like(raw["classes"])
    images, places, boxes = [], [], []
    for image, target in enumerate(targets):
        found = assign(target["boxes"], grid)
        place = (found >= 0).nonzero().flatten()
        wanted[image, place, target["labels"][found[place]] - 1] = 1
        images.append(torch.full_like(place, image))
        places.append(place)
        boxes.append(target["boxes"][found[place]])
    at, true = (torch.cat(images), torch.cat(places)), torch.cat(boxes)
    points = grid[at[1]]
    center = centerness(true, points[:, :2])
    overlap = generalized_box_iou_loss(to_boxes(raw["distances"][at], points), true)
    count = max(len(true), 1)
    return {
        "classes": sigmoid_focal_loss(raw["classes"], wanted, reduction="sum") / count,
        "boxes": (overlap * center).sum() / center.sum().clamp_min(1e-6),
        "centerness": F.binary_cross_entropy_with_logits(raw["centerness"][at].squeeze(1), center, reduction="sum") / count,
    }


def answer(raw: Raw, grid: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return boxes (n, 4), scores (n,) and labels (n,), 1, 2, ..., of one image, best score first.

    The score is the geometric mean of class score and centerness, as in the later version of FCOS.

    Args:
        raw: outputs of the network for the image, without the first axis.
        grid: (P, 3), from `positions`.
        size: height and width of the image.
    """
    all_scores = (raw["classes"].sigmoid() * raw["centerness"].sigmoid()).sqrt()
    place, label = (all_scores >= LEAST_SCORE).nonzero(as_tuple=True)
    scores = all_scores[place, label]
    boxes = clip_boxes_to_image(to_boxes(raw["distances"], grid)[place], size)
    kept = batched_nms(boxes, scores, label, NMS_OVERLAP)[:MOST_BOXES]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": label[kept] + 1}


# ------------------------------------------------------------------------------------------------------------------ factory


def scene_detector(
    widths: Sequence[int] = (16, 32, 64), pyramid: int = 32, classes: int = 10, channels: int = 1
) -> SceneDetector:
    """Return the untrained detector: 15 convolutions, 151,000 parameters."""
    return SceneDetector(Network(tuple(widths), pyramid, classes, channels))


def train_weights(model: nn.Module, task: SupervisedTask, progress: Progress | None = None) -> Path:
    """Return a cached weights file of `model` trained on the task's training split; see `secateur.envs.tasks.models`."""
    return cached_weights("scene_detector", model, task, RECIPE, progress)

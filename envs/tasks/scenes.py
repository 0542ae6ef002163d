"""Generated scenes: a few handwritten digits at random places of a 64x64 gray image, with the class of every pixel and boxes.

The digits are the scans that scikit-learn ships, enlarged. Training scenes, the first half of the test scenes and the second half
use different scans. So validation and test scenes share no scan if `data.validation` is half of the test scenes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

SIZE = 64
"""Height and width of a scene in pixels."""

TRAIN_SCENES, TEST_SCENES = 3000, 1000

MOST_DIGITS = 4
"""Most digits in one scene; at least one is in each."""

DIGIT_SIZES = (16, 24)
"""Smallest and largest side of an enlarged scan in pixels."""

SOFT_EDGE = (0.35, 0.65)
"""Brightness of an enlarged scan that becomes paper, and that becomes ink: strokes get edges of about one pixel."""

NOISE = 0.04
"""Standard deviation of the pixel noise; black is 0 and white 1."""

DIGITS_TRAIN = 1000
"""How many of scikit-learn's 1,797 digits are training images; the others are the test images."""

TRIES = 64
"""How many random arrangements of a scene are tried at once."""

CLASSES = ("background", *"0123456789")


@dataclass(frozen=True)
class Scenes:
    """Some scenes.

    Attributes:
        images: (N, 1, 64, 64) float32 in [0, 1].
        masks: (N, 64, 64) uint8, the class of each pixel: 0 for the background, 1 + d for a stroke of the digit d.
        boxes: (N, 4, 5) float32, for each digit the left, top, right and bottom edges of its strokes in pixels, and its class as
            in `masks`; the class of unused rows is -1, as `detection` takes them.
        scans: (N, 4) int64, the index of each digit's scan; -1 in unused rows.
    """

    images: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    scans: np.ndarray


def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's handwritten digits in a drawn order, (1797, 8, 8) in 0..16, and their classes, (1797,) int64.

    The first `DIGITS_TRAIN` are training images. The file is ordered by writer, so the order is drawn. The draw never changes,
    because trained weights are cached.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits  # only the digits need scikit-learn

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.images[order], digits.target.astype(np.int64)[order]


def digit_scenes(noise: float = NOISE) -> tuple[Scenes, Scenes]:
    """Return the training scenes and the test scenes, always the same.

    Args:
        noise: standard deviation of the pixel noise; it changes nothing but the pixels.
    """
    pixels, digits = digit_scans()
    middle = (DIGITS_TRAIN + len(digits)) // 2
    parts = [
        (np.arange(DIGITS_TRAIN), TRAIN_SCENES),
        (np.arange(DIGITS_TRAIN, middle), TEST_SCENES // 2),
        (np.arange(middle, len(digits)), TEST_SCENES - TEST_SCENES // 2),
    ]
    train, first, second = (
        draw_scenes(pixels / 16, digits, allowed, count, seed, noise) for seed, (allowed, count) in enumerate(parts)
    )
    test = Scenes(
        *(np.concatenate([getattr(first, name), getattr(second, name)]) for name in ("images", "masks", "boxes", "scans"))
    )
    return train, test


def draw_scenes(pixels: np.ndarray, digits: np.ndarray, allowed: np.ndarray, count: int, seed: int, noise: float) -> Scenes:
    """Return random scenes.

    Args:
        pixels: all scans, (scans, 8, 8) in [0, 1].
        digits: their classes, (scans,) in 0..9.
        allowed: indices of the scans that may be used.
        count: number of scenes.
        seed: random seed.
        noise: standard deviation of the pixel noise.
    """
    rng = np.random.default_rng(seed)
    enlarged = {size: _enlarged(pixels, size) for size in range(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1)}
    images = np.empty((count, 1, SIZE, SIZE), np.float32)
    masks = np.zeros((count, SIZE, SIZE), np.uint8)
    boxes = np.zeros((count, MOST_DIGITS, 5), np.float32)
    boxes[:, :, 4] = -1
    scans = np.full((count, MOST_DIGITS), -1)
    for scene in range(count):
        paper, contrast = rng.uniform(0, 0.3), rng.uniform(0.4, 0.7)
        ink = np.zeros((SIZE, SIZE))
        chosen = rng.choice(allowed, rng.integers(1, MOST_DIGITS + 1), replace=False)
        sizes = rng.integers(DIGIT_SIZES[0], DIGIT_SIZES[1] + 1, len(chosen))
        for row, (scan, size, (top, left)) in enumerate(zip(chosen, sizes, _places(sizes, rng), strict=True)):
            strokes, label = enlarged[size][scan], 1 + digits[scan]
            window = (slice(top, top + size), slice(left, left + size))
            ink[window] = strokes
            masks[scene][window][strokes > 0.5] = label
            rows, columns = np.nonzero(strokes > 0.5)
            edges = (left + columns.min(), top + rows.min(), left + columns.max() + 1, top + rows.max() + 1)
            boxes[scene, row], scans[scene, row] = (*edges, label), scan
        images[scene, 0] = paper + contrast * ink
    # The noise has its own random numbers: scenes with and without noise show the same digits.
    images += noise * np.random.default_rng((seed, 1)).standard_normal(images.shape, np.float32)
    return Scenes(images.clip(0, 1), masks, boxes, scans)


def _places(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return random top left corners of squares that do not overlap, (squares, 2): row and column."""
    while True:
        corners = rng.integers(0, (SIZE - sizes + 1)[:, None], (TRIES, len(sizes), 2))
        starts, ends = corners[:, :, None], (corners + sizes[:, None])[:, None]
        before = starts < ends  # along both axes: square i starts before square j ends
        overlaps = (before & before.swapaxes(1, 2)).all(3)
        free = np.flatnonzero(overlaps.sum((1, 2)) == len(sizes))  # each square overlaps itself only
        if len(free):
            return corners[free[0]]


def _enlarged(scans: np.ndarray, size: int) -> np.ndarray:
    """Return scans (N, 8, 8) in [0, 1] as strokes with sharp edges, (N, size, size) in [0, 1]."""
    smooth = interpolate(torch.from_numpy(scans)[:, None], (size, size), mode="bicubic")[:, 0].numpy()
    paper, ink = SOFT_EDGE
    return ((smooth - paper) / (ink - paper)).clip(0, 1)

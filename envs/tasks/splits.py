"""The splits of a task, and how a dataset is divided into them.

The rule: calibration images come from the training images. Validation images (for rewards only) and test images (for final
numbers only) are disjoint. Pretrained weights have usually been trained on every training image. By default, validation is
therefore the first part of the *test* files, and the final numbers come from the rest of them (`validation_from="test"`). If
the weights were trained on only some of the training images, the others can be held out as validation images instead
("train"). If a dataset has no training images, all three splits are drawn from its test images, without overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from secateur.envs.core import InputError
from secateur.envs.devices import CPU, move
from secateur.envs.piece_cache import PieceCache

REST = "rest"
"""Stands for a number of images: all images of that part that are left."""


MOVED_BYTES = 8_000_000_000
"""Largest memory of the samples that stay on another device than the CPU, shared equally by the splits."""


@dataclass(frozen=True)
class Split:
    """Images, or other inputs, with what a task compares the outputs with.

    Attributes:
        images: (N, C, H, W) uint8 in 0..255, or (N, ...) float32 already normalized.
        labels: (N,) int64 classes, or the (N, ...) targets of the task.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if not (self.images.ndim == 4 and self.images.dtype == np.uint8) and self.images.dtype != np.float32:
            raise InputError(
                "The images of a split must be (N, C, H, W) in uint8, or (N, ...) in float32, "
                f"but got {self.images.shape} in {self.images.dtype}."
            )
        if self.labels.shape[:1] != (len(self.images),):
            raise InputError(f"There are {len(self.images)} images, but labels of shape {self.labels.shape}.")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Memory of images and labels in bytes."""
        return self.images.nbytes + self.labels.nbytes

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return images and labels in main memory, as they are; the memory is shared."""
        return torch.from_numpy(self.images), torch.from_numpy(self.labels)

    def at(self, indices: np.ndarray) -> Split:
        """Return the samples at these indices."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class TaskData:
    """The splits of one task.

    Attributes:
        calibration: images for the statistics of activations, from the training images if there are any; None if not
            requested.
        validation: images for rewards only.
        test: images for final numbers only.
        train: images for fine-tuning; they contain the calibration images and never a validation image. None if not requested.
        mean, std: one number per channel; a uint8 image x becomes (x / 255 - mean) / std.
        num_classes: labels are 0 .. num_classes - 1; 0: the targets are no classes.
        classes: names of the classes.
        source: one sentence that says which images are in which split.
        device: where `tensors` and `at` put samples.
        moved: samples that stay there, so that they are moved once.
    """

    calibration: Split | None
    validation: Split
    test: Split
    train: Split | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    classes: tuple[str, ...]
    source: str
    device: torch.device = CPU
    moved: PieceCache = field(default_factory=lambda: PieceCache(MOVED_BYTES), compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.classes) != self.num_classes:
            raise InputError(f"The task has {self.num_classes} classes, but {len(self.classes)} class names.")
        for name, split in self.splits.items():
            _check_split(name, split, self)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that exist, by name."""
        named = {"calibration": self.calibration, "validation": self.validation, "test": self.test, "train": self.train}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input, usually (channels, height, width)."""
        return self.validation.images.shape[1:]

    def tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return a split as network input: images (N, C, H, W) float32 normalized, and the labels as they are."""
        return self.normalized(*split.tensors())

    def at(self, split: str, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return samples of a split as network input; on another device than the CPU they stay, if the whole split fits."""
        samples = self.splits[split]

        def make() -> tuple[Tensor, Tensor]:
            images, labels = samples.at(indices).tensors()
            return move(images, self.device), move(labels, self.device)

        if self.device == CPU or samples.nbytes > self.moved.max_bytes / len(self.splits):
            return self.normalized(*make())
        return self.normalized(*self.moved.get((split, indices.tobytes()), make))

    def normalized(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples as network input, on the device."""
        images, labels = move(images, self.device), move(labels, self.device)
        if images.dtype == torch.uint8:
            mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
            images = (images.float() / 255 - mean) / std
        return images, labels

    def on(self, device: torch.device) -> TaskData:
        """Return the data with samples on a device."""
        return self if device == self.device else replace(self, device=device, moved=PieceCache(self.moved.max_bytes))


def _check_split(name: str, split: Split, data: TaskData) -> None:
    if not len(split):
        raise InputError(f"`data.{name}` has no images; at least one is needed.")
    shape, expected = split.images.shape[1:], data.image_shape
    if shape != expected:
        raise InputError(
            f"`data.{name}` has images of {shape_text(shape)}, but `data.validation` has images of {shape_text(expected)}."
        )
    uint8 = split.images.dtype == np.uint8
    if uint8 and (len(data.mean) != shape[0] or len(data.std) != shape[0] or min(data.std) <= 0):
        raise InputError(
            f"`data.mean` and `data.std` need one number per channel ({shape[0]}), std above 0, "
            f"but got {list(data.mean)} and {list(data.std)}."
        )


@dataclass(frozen=True)
class Pool:
    """The training or test part of a dataset; only the images that are picked are read.

    Attributes:
        labels: (N,) int64 classes, or (N, ...) targets.
        read: indices (n,) -> images (n, C, H, W) uint8, or float32 normalized.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def pick(self, indices: np.ndarray) -> Split:
        """Return the images and labels at these indices."""
        return Split(np.ascontiguousarray(self.read(indices)), self.labels[indices])


def array_pool(images: np.ndarray, labels: np.ndarray) -> Pool:
    """Return a pool of images (N, C, H, W) uint8 or float32 that are in memory."""
    return Pool(labels, images.__getitem__)


@dataclass(frozen=True)
class Dataset:
    """A dataset before it is divided into splits.

    Attributes:
        train: its training images; None if it has none.
        test: its test images.
        classes: names of the classes.
        mean, std: one number per channel, as in `TaskData`.
    """

    train: Pool | None
    test: Pool
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def split_dataset(
    name: str,
    dataset: Dataset,
    *,
    calibration: int | str,
    validation: int | str,
    test: int | str,
    train: int | str,
    validation_from: str,
    seed: int,
) -> TaskData:
    """Return the splits of a dataset; arguments and errors as in `load_data`."""
    if validation_from not in ("test", "train"):
        raise InputError(f'`data.validation_from` must be "test" or "train", but got "{validation_from}".')
    if dataset.train is None:
        if train or validation_from == "train":
            raise InputError(
                f"`data.name: {name}` has no training images, so `data.train` must be 0 (got {train}) "
                f'and `data.validation_from` "test" (got "{validation_from}").'
            )
        return _split_without_training(name, dataset, calibration, validation, test, seed)
    # Test images keep the order of the files, so that another program can reproduce "the first N".
    test_order = np.arange(len(dataset.test.labels))
    train_order = np.random.default_rng(seed).permutation(len(dataset.train.labels))
    if validation_from == "test":
        held_out, final = _take(test_order, "test images", validation=validation, test=test)
        validation_split, fitting = dataset.test.pick(held_out), train_order
        origin = f"the first {len(held_out)} test images; test is the {len(final)} test images after those"
    else:
        (final,) = _take(test_order, "test images", test=test)
        held_out, fitting = _hold_out(train_order, validation)
        validation_split = dataset.train.pick(held_out)
        origin = f"{len(held_out)} training images that no other split has; test is the first {len(final)} test images"
    (calibration_indices,) = _take(fitting, "training images", calibration=calibration)
    (train_indices,) = _take(fitting, "training images", train=train)
    tuning = f"; fine-tuning has {len(train_indices)} training images, those included" if len(train_indices) else ""
    return _task_data(
        dataset,
        calibration=_pick_any(dataset.train, calibration_indices),
        validation=validation_split,
        test=dataset.test.pick(final),
        train=_pick_any(dataset.train, train_indices),
        source=f"{name}: validation is {origin}; calibration is {len(calibration_indices)} training images{tuning} "
        f"(training images are drawn with seed {seed}).",
    )


def _split_without_training(
    name: str, dataset: Dataset, calibration: int | str, validation: int | str, test: int | str, seed: int
) -> TaskData:
    """Return three disjoint splits of the test images; they are drawn, because files are often sorted by class."""
    order = np.random.default_rng(seed).permutation(len(dataset.test.labels))
    parts = _take(order, "test images", calibration=calibration, validation=validation, test=test)
    return _task_data(
        dataset,
        calibration=_pick_any(dataset.test, parts[0]),
        validation=dataset.test.pick(parts[1]),
        test=dataset.test.pick(parts[2]),
        train=None,
        source=f"{name}: there are no training images; calibration is {len(parts[0])}, validation {len(parts[1])} and test "
        f"{len(parts[2])} of the {len(order)} test images, disjoint (drawn with seed {seed}).",
    )


def _task_data(
    dataset: Dataset, calibration: Split | None, validation: Split, test: Split, train: Split | None, source: str
) -> TaskData:
    classes = dataset.classes
    return TaskData(calibration, validation, test, train, dataset.mean, dataset.std, len(classes), classes, source)


def _pick_any(pool: Pool, indices: np.ndarray) -> Split | None:
    """Return the images at these indices, None if there are no indices."""
    return pool.pick(indices) if len(indices) else None


def _hold_out(order: np.ndarray, validation: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Return the validation images, and the others, for calibration and fine-tuning, at least one."""
    if not isinstance(validation, int):
        raise InputError('`data.validation: rest` needs `data.validation_from: "test"`; give a number of images.')
    if validation >= len(order):
        raise InputError(f"There are {len(order)} training images, too few for `data.validation: {validation}`.")
    return order[:validation], order[validation:]


def _take(order: np.ndarray, what: str, **counts: int | str) -> list[np.ndarray]:
    """Return consecutive parts of `order`, one per count, each at least one long unless its count is 0."""
    fixed = sum(count for count in counts.values() if isinstance(count, int))
    rests = [field for field, count in counts.items() if count == REST]
    requested = ", ".join(f"`data.{field}: {count}`" for field, count in counts.items())
    if len(rests) > 1:
        raise InputError(f"Only one of {requested} can be `rest`: both come from the {len(order)} {what}.")
    if fixed + len(rests) > len(order):
        raise InputError(f"There are {len(order)} {what}, too few for {requested}. Request fewer.")
    parts, start = [], 0
    for count in counts.values():
        length = count if isinstance(count, int) else len(order) - fixed
        parts.append(order[start : start + length])
        start += length
    return parts


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape for a message, e.g. "3x32x32"."""
    return "x".join(str(size) for size in shape)

"""Images for calibration, rewards and final numbers: what is in which split, and readers of the usual layouts.

The rule that the splits keep: calibration comes from the training images; validation (rewards only) and test (final
numbers only) are disjoint. Pretrained weights have usually seen every training image, so validation is by default the
first part of the *test* files and the final numbers come from the rest of them (`validation_from="test"`). Where the
weights are known not to have seen them, a part of the training images can be held out instead ("train"). A dataset
without training images gives all three splits from its test images, still disjoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import did_you_mean, import_object

REST = "rest"
"""In place of a count: all images of that part that are left."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Also what the published CIFAR-10 ResNets were trained with."""

CROP_SHARE = 0.875
"""Side of the centre crop over the shorter side of the resized image: the usual 224 of 256."""

DIGITS_TRAIN = 1000
"""How many of scikit-learn's 1,797 digits are training images; the others are the test images."""


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        images: (N, C, H, W), uint8 in 0..255 or float32 already normalised.
        labels: (N,) int64.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (np.uint8, np.float32):
            raise InputError(
                "The images of a split must be (N, C, H, W) in uint8 or float32, "
                f"but got {self.images.shape} in {self.images.dtype}."
            )
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise InputError(
                f"The labels of {len(self.images)} images must be ({len(self.images)},) in int64, "
                f"but got {self.labels.shape} in {self.labels.dtype}."
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TaskData:
    """The splits of one task.

    Attributes:
        calibration: from the training images if there are any; statistics of activations come from these. None if not
            asked for.
        validation: for rewards only.
        test: for final numbers only.
        train: for fine-tuning (contains the calibration images, never a validation image); None if not asked for.
        mean, std: per channel; a uint8 image x becomes (x / 255 - mean) / std.
        num_classes: labels are 0 .. num_classes - 1.
        classes: their names.
        source: one sentence that says which images are in which split.
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
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.validation.images.shape[1:]

    def tensors(self, split: Split) -> tuple[Tensor, Tensor]:
        """Return a split as network input: images (N, C, H, W) float32 normalised, labels (N,) int64."""
        images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
        if images.dtype == torch.uint8:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            images = (images.float() / 255 - mean) / std
        return images, labels

    def check_outputs(self, outputs: int) -> None:
        """Raise InputError unless a network with this many outputs fits the classes."""
        if outputs != self.num_classes:
            raise InputError(
                f"The model has {outputs} outputs, but the data has {self.num_classes} classes. "
                "Set the number of classes in `model.args`, or check `data.name`."
            )


def _check_split(name: str, split: Split, data: TaskData) -> None:
    if not len(split):
        raise InputError(f"`data.{name}` has no images; at least one is needed.")
    shape, expected = split.images.shape[1:], data.image_shape
    if shape != expected:
        raise InputError(f"`data.{name}` has images of {_times(shape)}, but `data.validation` of {_times(expected)}.")
    if len(data.mean) != shape[0] or len(data.std) != shape[0] or min(data.std) <= 0:
        raise InputError(
            f"`data.mean` and `data.std` need one number per channel ({shape[0]}), std above 0, "
            f"but got {list(data.mean)} and {list(data.std)}."
        )
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= data.num_classes:
        raise InputError(f"Labels of `data.{name}` must be in 0..{data.num_classes - 1}, but are in {low}..{high}.")


# ----------------------------------------------------------------------------------------------- from dataset to splits


@dataclass(frozen=True)
class Pool:
    """The training or test part of a dataset, whose images are read only when they are picked.

    Attributes:
        labels: (N,) int64.
        read: indices (n,) -> images (n, C, H, W) uint8, or float32 normalised.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def pick(self, indices: np.ndarray) -> Split:
        return Split(np.ascontiguousarray(self.read(indices)), self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """What a reader in `DATASETS` returns; `train` is None where there are no training images."""

    train: Pool | None
    test: Pool
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_data(
    name: str,
    root: str | Path | None = None,
    *,
    calibration: int | str = 512,
    validation: int | str,
    test: int | str = REST,
    train: int | str = 0,
    validation_from: str = "test",
    seed: int = 0,
    input_shape: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> TaskData:
    """Return the splits of a dataset; the same arguments give the same images.

    Args:
        name: a key of `DATASETS`, or "package.module:function" of a function that takes root, calibration, validation,
            test, train, validation_from and seed as keywords and returns a `TaskData` (`split_dataset` makes one).
        root: folder of the files; unused by "digits".
        calibration, validation, test, train: number of images, or "rest". Calibration images are drawn from the
            training images and may be in `train` too; 0 of these two mean that the split is None. Where the dataset has
            no training images, calibration, validation and test are drawn from the test images, without overlap.
        validation_from: "test" or "train", see the top of this file.
        seed: of the draw from the training images, or from the test images where there are no others.
        input_shape: (channels, height, width) of the model; "image_folder" resizes to it, the others are checked.
        mean, std: per channel, instead of the dataset's own.
    Raises:
        InputError: if a name is unknown, files are missing or unreadable, or counts or shapes do not fit.
    """
    counts = {"calibration": calibration, "validation": validation, "test": test, "train": train}
    for field, count in counts.items():
        _check_count(field, count)
    if ":" in name:
        data = _call(name, root=root, validation_from=validation_from, seed=seed, **counts)
    else:
        dataset = _reader(name)(root, input_shape)
        data = split_dataset(name, dataset, validation_from=validation_from, seed=seed, **counts)
    overrides = {"mean": mean, "std": std}
    data = replace(data, **{field: tuple(values) for field, values in overrides.items() if values is not None})
    if input_shape is not None and tuple(input_shape) != data.image_shape:
        raise InputError(
            f"The images of `data.name: {name}` are {_times(data.image_shape)}, "
            f"but `model.input` is {_times(input_shape)}. Set `model.input` to the shape of the images."
        )
    return data


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
    # Test images keep the order of the files, so that "the first N" is something another program can reproduce.
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
    return TaskData(
        calibration=dataset.train.pick(calibration_indices) if len(calibration_indices) else None,
        validation=validation_split,
        test=dataset.test.pick(final),
        train=dataset.train.pick(train_indices) if len(train_indices) else None,
        mean=dataset.mean,
        std=dataset.std,
        num_classes=len(dataset.classes),
        classes=dataset.classes,
        source=f"{name}: validation is {origin}; calibration is {len(calibration_indices)} training images{tuning} "
        f"(training images are drawn with seed {seed}).",
    )


def _split_without_training(
    name: str, dataset: Dataset, calibration: int | str, validation: int | str, test: int | str, seed: int
) -> TaskData:
    """Return three disjoint splits of the test images; drawn, because files are often sorted by class."""
    order = np.random.default_rng(seed).permutation(len(dataset.test.labels))
    parts = _take(order, "test images", calibration=calibration, validation=validation, test=test)
    splits = [dataset.test.pick(part) if len(part) else None for part in parts]
    return TaskData(
        *splits,
        train=None,
        mean=dataset.mean,
        std=dataset.std,
        num_classes=len(dataset.classes),
        classes=dataset.classes,
        source=f"{name}: there are no training images; calibration is {len(parts[0])}, validation {len(parts[1])} and test "
        f"{len(parts[2])} of the {len(order)} test images, disjoint (drawn with seed {seed}).",
    )


def _hold_out(order: np.ndarray, validation: int | str) -> tuple[np.ndarray, np.ndarray]:
    """Return the validation images and those that are left for calibration and fine-tuning, at least one."""
    if validation == REST:
        raise InputError('`data.validation: rest` needs `data.validation_from: "test"`; give a number of images.')
    if validation >= len(order):
        raise InputError(f"There are {len(order)} training images, too few for `data.validation: {validation}`.")
    return order[:validation], order[validation:]


def _take(order: np.ndarray, what: str, **counts: int | str) -> list[np.ndarray]:
    """Return consecutive parts of `order`, one per count, each at least one long unless its count is 0."""
    fixed = sum(count for count in counts.values() if count != REST)
    rests = [field for field, count in counts.items() if count == REST]
    asked = ", ".join(f"`data.{field}: {count}`" for field, count in counts.items())
    if len(rests) > 1:
        raise InputError(f"Only one of {asked} can be `rest`: both come from the {len(order)} {what}.")
    if fixed + len(rests) > len(order):
        raise InputError(f"There are {len(order)} {what}, too few for {asked}. Ask for fewer.")
    parts, start = [], 0
    for count in counts.values():
        length = len(order) - fixed if count == REST else count
        parts.append(order[start : start + length])
        start += length
    return parts


def _check_count(field: str, count: int | str) -> None:
    least = 0 if field in ("train", "calibration") else 1
    if count == REST or (isinstance(count, int) and not isinstance(count, bool) and count >= least):
        return
    raise InputError(f"`data.{field}` must be a whole number of images from {least} on, or `rest`, but got {count!r}.")


def _call(path: str, **arguments) -> TaskData:
    _, function = import_object(path, "data.name")
    if not callable(function):
        raise InputError(f"`data.name: {path}` must be a function, but is {type(function).__name__}.")
    try:
        data = function(**arguments)
    except InputError:
        raise
    except Exception as error:  # the user's function runs arbitrary code
        raise InputError(f"`data.name: {path}` failed: {type(error).__name__}: {error}") from error
    if not isinstance(data, TaskData):
        raise InputError(f"`data.name: {path}` must return an secateur.envs.tasks.data.TaskData, but got {type(data).__name__}.")
    return data


def _reader(name: str) -> Callable[..., Dataset]:
    if name not in DATASETS:
        raise InputError(
            f"`data.name: {name}` is unknown.{did_you_mean(name, DATASETS)} "
            f'Known: {", ".join(DATASETS)}, or "package.module:function".'
        )
    return DATASETS[name]


# -------------------------------------------------------------------------------------------------------------- readers


def read_digits(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return scikit-learn's bundled handwritten digits: 1,000 training and 797 test images, drawn at random.

    They are 1x8x8; a larger `input_shape` with one channel enlarges them by bilinear interpolation.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits  # only this reader needs scikit-learn

    digits = load_digits()
    # The file is ordered by writer, so the parts are drawn; always alike, because trained weights are cached.
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = torch.from_numpy(digits.images[order, None] * (255 / 16))
    if input_shape is not None and input_shape[0] == 1 and min(input_shape[1:]) > 8:
        pixels = interpolate(pixels, tuple(input_shape[1:]), mode="bilinear")
    images = pixels.round().numpy().astype(np.uint8)
    labels = digits.target.astype(np.int64)[order]
    train, test = (array_pool(images[part], labels[part]) for part in (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None)))
    return Dataset(train, test, tuple("0123456789"), mean=(0.305,), std=(0.376,))


def read_cifar10(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return CIFAR-10 from torchvision's layout or from the `cifar10.npz` that `convert_tiles` writes."""
    layout = (
        "`cifar-10-batches-py/` as torchvision unpacks it, or `cifar10.npz` from `python -m secateur.envs.tasks.convert_tiles`"
    )
    folder = _folder(root, layout)
    archive = folder / "cifar10.npz"
    if archive.is_file():
        parts = _read_npz(archive)
        classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        train, test = (array_pool(x.transpose(0, 3, 1, 2), y.astype(np.int64)) for x, y in parts)
        return Dataset(train, test, classes, IMAGENET_MEAN, IMAGENET_STD)
    return _read_torchvision("CIFAR10", folder, layout, IMAGENET_MEAN, IMAGENET_STD)


def read_cifar100(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return CIFAR-100 from torchvision's layout."""
    layout = "`cifar-100-python/` as torchvision unpacks it"
    return _read_torchvision("CIFAR100", _folder(root, layout), layout, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276))


def read_fashion_mnist(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return Fashion-MNIST, 1x28x28, from torchvision's layout."""
    layout = "`FashionMNIST/raw/` with the four uncompressed idx files, as torchvision unpacks it"
    return _read_torchvision("FashionMNIST", _folder(root, layout), layout, (0.286,), (0.353,))


def read_image_folder(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return torchvision's ImageFolder layout: `train/<class>/*` and `val/<class>/*` (files of any size).

    Images are resized to `input_shape`: the shorter side to size / 0.875, then a centre crop. Files are sorted by
    class, so each part is shuffled once, always alike: "the first N" must not be the first class.
    """
    if input_shape is None:
        raise InputError("`data.name: image_folder` needs `model.input: [channels, height, width]`.")
    if input_shape[0] not in (1, 3):
        raise InputError(f"`data.name: image_folder` gives 1 or 3 channels, but `model.input` has {input_shape[0]}.")
    layout = "`train/<class>/` and `val/<class>/` with image files"
    folder = _folder(root, layout)
    train, test = (_image_files(folder / part, layout) for part in ("train", "val"))
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(f"`train/` and `val/` in {folder} must hold the same classes, but only one has `{only[0]}`.")
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if input_shape[0] == 3 else ((0.449,), (0.226,))
    return Dataset(_file_pool(train, input_shape), _file_pool(test, input_shape), tuple(train.classes), mean, std)


def read_arrays(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return a .npz file that `root` names: x_test (N, H, W, C) uint8, y_test (N,), and optionally x_train, y_train, classes.

    `classes` holds one name per class; without it there are as many classes as labels, called by their number.
    """
    holds = "x_test (N, H, W, C) in uint8 and y_test (N,), and optionally x_train, y_train and classes"
    path = Path(root or "").expanduser()
    if not path.is_file():
        raise InputError(f"`data.root: {root}` must name a .npz file that holds {holds}.")
    arrays = _read_arrays(path, holds)
    pools = {part: _checked_pool(arrays, part, path, holds) for part in ("train", "test") if f"x_{part}" in arrays}
    if "test" not in pools:
        raise InputError(f"`data.root: {path}` has no x_test. It must hold {holds}.")
    count = 1 + max(int(pool.labels.max(initial=0)) for pool in pools.values())
    classes = tuple(map(str, arrays["classes"].tolist() if "classes" in arrays else range(count)))
    channels = arrays["x_test"].shape[3]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    return Dataset(pools.get("train"), pools["test"], classes, mean, std)


def _checked_pool(arrays: Mapping[str, np.ndarray], part: str, path: Path, holds: str) -> Pool:
    images, labels = arrays[f"x_{part}"], arrays.get(f"y_{part}", np.empty(0))
    if images.dtype != np.uint8 or images.ndim != 4 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(
            f"`data.root: {path}` must hold {holds}, but x_{part} is {images.shape} in {images.dtype} "
            f"and y_{part} {labels.shape} in {labels.dtype}."
        )
    return array_pool(images.transpose(0, 3, 1, 2), labels.astype(np.int64))


DATASETS: Mapping[str, Callable[..., Dataset]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "fashion_mnist": read_fashion_mnist,
    "image_folder": read_image_folder,
    "arrays": read_arrays,
}
"""Readers by name: (root, input_shape) -> Dataset."""


def _folder(root: str | Path | None, layout: str) -> Path:
    if root is None or not str(root):
        raise InputError(f"`data.root` must name the folder that holds {layout}.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"`data.root: {root}` is not a folder. It must hold {layout}.")
    return folder


def array_pool(images: np.ndarray, labels: np.ndarray) -> Pool:
    """Return a pool of images (N, C, H, W) uint8 or float32 that are in memory."""
    return Pool(labels, images.__getitem__)


def _read_arrays(path: Path, holds: str) -> dict[str, np.ndarray]:
    """Return all arrays of a .npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy raises half a dozen kinds on damaged archives
        raise InputError(f"`data.root: {path}` cannot be read ({error}). It must be a .npz file that holds {holds}.") from error


def _read_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(train images, labels), (test images, labels)], images (N, 32, 32, 3) uint8."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            parts = [(archive[f"x_{part}"], archive[f"y_{part}"]) for part in ("train", "test")]
    except Exception as error:  # numpy raises half a dozen kinds on damaged archives
        raise InputError(
            f"{path} cannot be read ({error}). It must hold x_train, y_train, x_test, y_test; "
            "write it again with `python -m secateur.envs.tasks.convert_tiles`."
        ) from error
    for images, labels in parts:
        if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1]:
            raise InputError(
                f"{path} must hold images (N, 32, 32, 3) in uint8 and labels (N,), "
                f"but has {images.shape} in {images.dtype} and {labels.shape}."
            )
    return parts


def _read_torchvision(kind: str, folder: Path, layout: str, mean, std) -> Dataset:
    from torchvision import datasets

    try:
        train, test = (getattr(datasets, kind)(folder, train=part, download=False) for part in (True, False))
    except Exception as error:  # torchvision raises what the damaged file happens to cause
        raise InputError(f"`data.root: {folder}` has no complete {kind}: it must hold {layout}.") from error
    pools = [array_pool(_channels_first(np.asarray(part.data)), np.asarray(part.targets, np.int64)) for part in (train, test)]
    return Dataset(*pools, tuple(train.classes), mean, std)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _image_files(folder: Path, layout: str):
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:  # no folder, no class folders, or a class without images
        raise InputError(f"`data.root: {folder.parent}` must hold {layout}: {error}") from error


def _file_pool(files, input_shape: tuple[int, int, int]) -> Pool:
    order = np.random.default_rng(0).permutation(len(files.samples))
    paths = [files.samples[index][0] for index in order]
    labels = np.array([files.samples[index][1] for index in order], np.int64)

    def read(indices: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            images = list(threads.map(lambda index: decode_image(paths[index], input_shape), indices))
        return np.stack(images) if images else np.empty((0, *input_shape), np.uint8)

    return Pool(labels, read)


def decode_image(path: str, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return one file resized and centre-cropped, (C, H, W) uint8.

    Raises:
        InputError: if the file is not an image.
    """
    channels, height, width = input_shape
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is not an image that can be read: {error}") from error
    scale = max(height / image.height, width / image.width) / CROP_SHARE
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _times(shape) -> str:
    return "x".join(str(size) for size in shape)

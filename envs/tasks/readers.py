"""Readers of datasets, one per layout on disk; a new one is a function and a line in `DATASETS`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate

from secateur.envs.core import InputError
from secateur.envs.tasks.scenes import CLASSES, DIGITS_TRAIN, digit_scans, digit_scenes
from secateur.envs.tasks.splits import Dataset, Pool, array_pool
from secateur.envs.tasks.synthetic import draw_dataset

if TYPE_CHECKING:  # torchvision is imported by the readers that need it
    from torchvision.datasets import ImageFolder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels; the published CIFAR-10 ResNets were trained with them too."""

IGNORED = 255
"""Label of pixels that have no class."""

CROP_SHARE = 0.875
"""Side of the center crop over the shorter side of the resized image: the usual 224 of 256."""


MAX_RATIO = 100
"""Of the sides of an image in a folder; a longer one would be enlarged to gigabytes."""

MAX_CLASSES = 100_000


def read_digits(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return scikit-learn's bundled handwritten digits: 1,000 training and 797 test images, drawn at random.

    They are 1x8x8; a larger `input_shape` with one channel enlarges them by bilinear interpolation.
    """
    scans, labels = digit_scans()
    pixels = torch.from_numpy(scans[:, None] * (255 / 16))
    if input_shape is not None and input_shape[0] == 1 and min(input_shape[1:]) > 8:
        pixels = interpolate(pixels, tuple(input_shape[1:]), mode="bilinear")
    images = pixels.round().numpy().astype(np.uint8)
    train, test = (array_pool(images[part], labels[part]) for part in (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None)))
    return Dataset(train, test, tuple("0123456789"), mean=(0.305,), std=(0.376,))


def read_digit_scenes(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return the scenes of `secateur.envs.tasks.scenes`, 1x64x64, with the class of every pixel; no files are needed."""
    train, test = (array_pool(_bytes(part.images), part.masks) for part in digit_scenes())
    return Dataset(train, test, CLASSES, mean=(0.197,), std=(0.172,))


def read_digit_scene_boxes(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return the generated scenes, 1x64x64, with the boxes of their digits as `detection` takes them; the classes are 0..9."""
    # Class 0 of the masks is the background, which has no boxes; -1 fills up.
    before = np.array([0, 0, 0, 0, 1], np.float32)
    train, test = (
        array_pool(_bytes(part.images), np.where(part.boxes[..., 4:] > 0, part.boxes - before, part.boxes))
        for part in digit_scenes()
    )
    return Dataset(train, test, CLASSES[1:], mean=(0.197,), std=(0.172,))


def _bytes(images: np.ndarray) -> np.ndarray:
    """Return images in [0, 1] as uint8."""
    return (255 * images).round().astype(np.uint8)


def read_digit_scenes_x2(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return the generated scenes without noise as targets, 1x64x64, and their averages over 2x2 pixels as inputs, 1x32x32.

    Both are float32 in [0, 1].
    """
    train, test = (_halved_pool(part.images) for part in digit_scenes(noise=0.0))
    return Dataset(train, test, (), mean=(0.0,), std=(1.0,))


def read_cifar10_x2(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return photographs of CIFAR-10 as targets, 3x32x32, and their averages over 2x2 pixels as inputs, 3x16x16.

    Both are float32 in [0, 1]. They are the first 8,000 training and the first 2,000 test images.
    """
    photographs = read_cifar10(root, input_shape)
    assert photographs.train is not None, "CIFAR-10 has training images"
    train, test = (
        _halved_pool(pool.read(np.arange(min(most, len(pool.labels)))).astype(np.float32) / 255)
        for pool, most in ((photographs.train, 8000), (photographs.test, 2000))
    )
    return Dataset(train, test, (), mean=(0.0,) * 3, std=(1.0,) * 3)


def _halved_pool(images: np.ndarray) -> Pool:
    """Return a pool whose targets are the images (N, C, H, W), and whose inputs are their averages over 2x2 pixels."""
    return array_pool(avg_pool2d(torch.from_numpy(images), 2).numpy(), images)


def read_synthetic(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return the generated images of `secateur.envs.tasks.synthetic`, 3x8x8 in 6 classes; no files are needed."""
    return draw_dataset()


def read_cifar10(root: str | Path | None, input_shape: tuple[int, int, int] | None) -> Dataset:
    """Return CIFAR-10 from torchvision's layout or from the `cifar10.npz` that `convert_tiles` writes."""
    layout = (
        "`cifar-10-batches-py/` as torchvision unpacks it, or `cifar10.npz` from `python -m secateur.envs.tasks.convert_tiles`"
    )
    folder = _folder(root, layout)
    archive = folder / "cifar10.npz"
    if isfile(archive):
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

    Images are resized to `input_shape`: the shorter side becomes size / 0.875, then the center is cropped. Files are sorted
    by class, so each part is shuffled, always with the same seed: "the first N" must not be the first class.
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
    """Return the .npz file `root`: x_test, y_test, and optionally x_train, y_train and classes.

    Inputs are images (N, H, W, C) uint8, or float32 (N, ...) as the model takes them. Targets are classes (N,), a class of every
    pixel (N, H, W), or float32 (N, ...) for other tasks. `classes` holds one name per class; without it, the classes are 0 to the
    largest label, 255 of pixels left out, and their numbers are their names.
    """
    holds = "x_test (N, H, W, C) in uint8 or (N, ...) in float32 and y_test (N, ...), and optionally x_train, y_train and classes"
    path = Path(root or "").expanduser()
    if not isfile(path):
        raise InputError(f"`data.root: {root}` must name a .npz file that holds {holds}.")
    arrays = _read_arrays(path, holds)
    pools = {part: _checked_pool(arrays, part, path, holds) for part in ("train", "test") if f"x_{part}" in arrays}
    if "test" not in pools:
        raise InputError(f"`data.root: {path}` has no x_test. It must hold {holds}.")
    count = max(_count_classes(pool.labels) for pool in pools.values())
    if count > MAX_CLASSES:
        raise InputError(f"`data.root: {path}` has labels up to {count - 1:,}; at most {MAX_CLASSES:,} classes are read.")
    classes = tuple(map(str, arrays["classes"].tolist() if "classes" in arrays else range(count)))
    channels = arrays["x_test"].shape[-1] if arrays["x_test"].dtype == np.uint8 else 1
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)
    return Dataset(pools.get("train"), pools["test"], classes, mean, std)


def _count_classes(labels: np.ndarray) -> int:
    """Return the number of classes; 0: the targets are no classes."""
    if labels.dtype.kind == "f":
        return 0
    known = labels if labels.ndim == 1 else labels[labels != IGNORED]
    return 1 + int(known.max(initial=0))


def _checked_pool(arrays: Mapping[str, np.ndarray], part: str, path: Path, holds: str) -> Pool:
    inputs, targets = arrays[f"x_{part}"], arrays.get(f"y_{part}", np.empty(0))
    images = inputs.dtype == np.uint8 and inputs.ndim == 4
    known = targets.dtype.kind in "iu" or targets.dtype == np.float32
    if not (images or inputs.dtype == np.float32) or targets.shape[:1] != inputs.shape[:1] or not known:
        raise InputError(
            f"`data.root: {path}` must hold {holds}, but x_{part} is {inputs.shape} in {inputs.dtype} "
            f"and y_{part} {targets.shape} in {targets.dtype}."
        )
    classes = targets.astype(np.int64) if targets.dtype.kind in "iu" and targets.ndim == 1 else targets
    return array_pool(inputs.transpose(0, 3, 1, 2) if images else inputs, classes)


DATASETS: Mapping[str, Callable[..., Dataset]] = {
    "digits": read_digits,
    "digit_scenes": read_digit_scenes,
    "digit_scene_boxes": read_digit_scene_boxes,
    "digit_scenes_x2": read_digit_scenes_x2,
    "synthetic": read_synthetic,
    "cifar10": read_cifar10,
    "cifar10_x2": read_cifar10_x2,
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
    if not isdir(folder):
        raise InputError(f"`data.root: {root}` is not a folder. It must hold {layout}.")
    return folder


def _read_arrays(path: Path, holds: str) -> dict[str, np.ndarray]:
    """Return all arrays of a .npz file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy raises many kinds of errors on damaged archives
        raise InputError(f"`data.root: {path}` cannot be read ({error}). It must be a .npz file that holds {holds}.") from error


def _read_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(train images, labels), (test images, labels)], images (N, 32, 32, 3) uint8."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            parts = [(archive[f"x_{part}"], archive[f"y_{part}"]) for part in ("train", "test")]
    except Exception as error:  # numpy raises many kinds of errors on damaged archives
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


def _read_torchvision(kind: str, folder: Path, layout: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    from torchvision import datasets

    try:
        train, test = (getattr(datasets, kind)(folder, train=part, download=False) for part in (True, False))
    except Exception as error:  # torchvision raises whatever error the damaged file causes
        raise InputError(f"`data.root: {folder}` has no complete {kind}: it must hold {layout}.") from error
    train_pool, test_pool = (
        array_pool(_channels_first(np.asarray(part.data)), np.asarray(part.targets, np.int64)) for part in (train, test)
    )
    return Dataset(train_pool, test_pool, tuple(train.classes), mean, std)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def _image_files(folder: Path, layout: str) -> ImageFolder:
    from torchvision import datasets

    try:
        return datasets.ImageFolder(folder)
    except FileNotFoundError as error:  # no folder, no class folders, or a class without images
        raise InputError(f"`data.root: {folder.parent}` must hold {layout}: {error}") from error


def _file_pool(files: ImageFolder, input_shape: tuple[int, int, int]) -> Pool:
    order = np.random.default_rng(0).permutation(len(files.samples))
    paths = [files.samples[index][0] for index in order]
    labels = np.array([files.samples[index][1] for index in order], np.int64)

    def read(indices: np.ndarray) -> np.ndarray:
        with ThreadPoolExecutor() as threads:
            images = list(threads.map(lambda index: decode_image(paths[index], input_shape), indices))
        return np.stack(images) if images else np.empty((0, *input_shape), np.uint8)

    return Pool(labels, read)


def decode_image(path: str, input_shape: tuple[int, int, int]) -> np.ndarray:
    """Return one image file, resized and with its center cropped, (C, H, W) uint8.

    Raises:
        InputError: if the file is not an image.
    """
    channels, height, width = input_shape
    try:
        with warnings.catch_warnings(), Image.open(path) as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if max(file.size) > MAX_RATIO * min(file.size):
                raise ValueError(f"it has {file.width} x {file.height} pixels, and one side is {MAX_RATIO} times the other")
            image = file.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow's readers raise whatever a damaged file causes
        raise InputError(f"{path} is not an image that can be read: {error}") from error
    scale = max(height / image.height, width / image.width) / CROP_SHARE
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)

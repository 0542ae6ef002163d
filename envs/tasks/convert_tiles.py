"""Convert CIFAR-10 from stacked WebP tiles to one array file: `python -m secateur.envs.tasks.convert_tiles SOURCE TARGET`.

SOURCE holds `train_00.webp`, `train_01.webp` and so on, `test_00.webp` and so on, each with 32x32 images stacked vertically,
and `train_labels.npy` and `test_labels.npy`. The command writes TARGET/cifar10.npz with x_train, y_train, x_test and y_test:
images (N, 32, 32, 3) uint8, labels (N,) uint8. `data.root: TARGET` then works with `data.name: cifar10`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from os.path import isfile
from pathlib import Path

import numpy as np
from PIL import Image

from secateur.envs.core import InputError


def read_tiles(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the "train" or "test" part: images (N, 32, 32, 3) and labels (N,), both uint8.

    Raises:
        InputError: if files are missing or the counts disagree.
    """
    tiles, label_file = sorted(source.glob(f"{part}_*.webp")), source / f"{part}_labels.npy"
    if not tiles or not isfile(label_file):
        raise InputError(f"{source} must hold {part}_00.webp, {part}_01.webp and so on, and {part}_labels.npy.")
    labels = np.load(label_file, allow_pickle=False).astype(np.uint8)
    images = np.concatenate([_read_tile(tile) for tile in tiles])
    if len(images) != len(labels):
        raise InputError(f"{source} has {len(images)} {part} images but {len(labels)} labels; is a tile missing?")
    return images, labels


def _read_tile(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3)


def convert(source: Path, target: Path) -> dict[str, str]:
    """Write TARGET/cifar10.npz and return the SHA-256 of each part's decoded images."""
    (x_train, y_train), (x_test, y_test) = (read_tiles(source, part) for part in ("train", "test"))
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / "cifar10.unfinished.npz"
    np.savez(unfinished, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    os.replace(unfinished, target / "cifar10.npz")
    return {part: hashlib.sha256(images.tobytes()).hexdigest() for part, images in (("train", x_train), ("test", x_test))}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    try:
        digests = convert(source, target)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    for part, digest in digests.items():
        print(f"sha256 of the {part} images: {digest}")
    print(f"wrote {target / 'cifar10.npz'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

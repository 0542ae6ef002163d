"""Turns CIFAR-10 as stacked WebP tiles into one array file: `python -m secateur.envs.tasks.convert_tiles SOURCE TARGET`.

SOURCE holds `train_00.webp` .. and `test_00.webp` .., each with 32x32 images stacked vertically, and
`train_labels.npy`, `test_labels.npy`. TARGET/cifar10.npz gets x_train, y_train, x_test, y_test: images
(N, 32, 32, 3) uint8, labels (N,) uint8. `data.root: TARGET` then works with `data.name: cifar10`.
"""

from __future__ import annotations

import hashlib
import os
import sys
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
    if not tiles or not label_file.is_file():
        raise InputError(f"{source} must hold {part}_00.webp .. and {part}_labels.npy.")
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
    arrays, digests = {}, {}
    for part in ("train", "test"):
        arrays[f"x_{part}"], arrays[f"y_{part}"] = read_tiles(source, part)
        digests[part] = hashlib.sha256(arrays[f"x_{part}"].tobytes()).hexdigest()
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / "cifar10.unfinished.npz"
    np.savez(unfinished, **arrays)
    os.replace(unfinished, target / "cifar10.npz")
    return digests


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

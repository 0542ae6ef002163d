"""Turns a zip of labelled images into one array file: `python -m secateur.envs.tasks.convert_sample SOURCE TARGET [--turn]`.

SOURCE holds `images.zip`, whose files are called `<class index>_<anything>` and have one size, and `classes.csv` with the
columns `index` and `name`. TARGET (a .npz file) gets x_test (N, H, W, 3) uint8, y_test (N,) int64 and classes: what
`data.name: arrays` reads with `data.root: TARGET`. There is no training part, so calibration comes from these images too.

--turn turns the images by 180 degrees. Networks that come from TensorFlow need it when their strided convolutions were
padded at the bottom and right only: with turned kernels and turned images, torch's padding computes the same.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from secateur.envs.core import InputError


def read_sample(source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, H, W, 3) uint8, labels (N,) int64 and class names, images in the order of their names.

    Raises:
        InputError: if files are missing, unreadable or do not fit each other.
    """
    archive, table = source / "images.zip", source / "classes.csv"
    if not archive.is_file() or not table.is_file():
        raise InputError(f"{source} must hold images.zip and classes.csv.")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"index", "name"} <= rows[0].keys() or [row["index"] for row in rows] != list(map(str, range(len(rows)))):
        raise InputError(f"{table} must have the columns index (0, 1, 2 and so on) and name.")
    images, labels = _read_images(archive)
    if not images:
        raise InputError(f"{archive} holds no images.")
    if len({image.shape for image in images}) > 1:
        raise InputError(f"The images in {archive} have different sizes; resize them to one first.")
    if max(labels) >= len(rows):
        raise InputError(f"{archive} has an image of class {max(labels)}, but {table} ends at {len(rows) - 1}.")
    return np.stack(images), np.array(labels, np.int64), np.array([row["name"] for row in rows])


def _read_images(archive: Path) -> tuple[list[np.ndarray], list[int]]:
    images, labels = [], []
    try:
        with zipfile.ZipFile(archive) as files:
            for name in sorted(name for name in files.namelist() if not name.endswith("/")):
                label = Path(name).name.partition("_")[0]
                if not label.isdecimal():
                    raise InputError(f"{archive}: `{name}` must start with the index of its class and an underscore.")
                with Image.open(io.BytesIO(files.read(name))) as image:
                    images.append(np.asarray(image.convert("RGB")))
                labels.append(int(label))
    except (zipfile.BadZipFile, OSError) as error:  # Pillow's errors are OSErrors
        raise InputError(f"{archive} cannot be read: {error}") from error
    return images, labels


def convert(source: Path, target: Path, turn: bool = False) -> int:
    """Write TARGET and return the number of images."""
    if target.suffix != ".npz":
        raise InputError(f"The file to write must end in .npz, but got {target}.")
    images, labels, classes = read_sample(source)
    if turn:
        images = images[:, ::-1, ::-1]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished.npz")
    np.savez(unfinished, x_test=images, y_test=labels, classes=classes)
    os.replace(unfinished, target)
    return len(images)


def main(arguments: list[str]) -> int:
    paths = [argument for argument in arguments if argument != "--turn"]
    if len(paths) != 2 or len(arguments) > 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        count = convert(*map(Path, paths), turn="--turn" in arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {count} images to {paths[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

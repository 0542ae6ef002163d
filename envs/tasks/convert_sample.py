"""Convert a zip of labeled images to one array file: `python -m secateur.envs.tasks.convert_sample SOURCE TARGET [--turn]`.

SOURCE holds `images.zip`, whose files have names `<class index>_<anything>` and the same image size, and `classes.csv` with
the columns `index` and `name`. The command writes TARGET (a .npz file) with x_test (N, H, W, 3) uint8, y_test (N,) int64 and
classes: `data.name: arrays` reads it with `data.root: TARGET`. There is no training part, so calibration images come from
these images too.

--turn rotates the images by 180 degrees. Networks that come from TensorFlow need it if their strided convolutions were
padded at the bottom and right only: with rotated kernels and rotated images, torch's padding gives the same results.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import zipfile
from os.path import isfile
from pathlib import Path

import numpy as np
from PIL import Image

from secateur.envs.core import InputError


def read_sample(source: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, H, W, 3) uint8, labels (N,) int64 and class names, with the images in the order of their names.

    Raises:
        InputError: if files are missing, unreadable or inconsistent.
    """
    archive, table = source / "images.zip", source / "classes.csv"
    if not isfile(archive) or not isfile(table):
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
        raise InputError(f"{archive} has an image of class {max(labels)}, but the last class in {table} is {len(rows) - 1}.")
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
        count = convert(Path(paths[0]), Path(paths[1]), turn="--turn" in arguments)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {count} images to {paths[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

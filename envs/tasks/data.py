"""Data of a task by name: `load_data` reads a dataset and divides it into splits.

`secateur.envs.tasks.splits` says which images may be in which split; `secateur.envs.tasks.readers` reads the layouts on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.envs.core import InputError
from secateur.envs.tasks.imports import current_name, did_you_mean, import_object
from secateur.envs.tasks.readers import DATASETS
from secateur.envs.tasks.splits import REST, Dataset, Pool, Split, TaskData, array_pool, shape_text, split_dataset

__all__ = ["DATASETS", "REST", "Dataset", "Pool", "Split", "TaskData", "array_pool", "load_data", "split_dataset"]


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
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> TaskData:
    """Return the splits of a dataset; the same arguments give the same images.

    Args:
        name: a key of `DATASETS`, or "package.module:function" of a function that takes root, calibration, validation,
            test, train, validation_from and seed as keywords and returns a `TaskData` (`split_dataset` makes one).
        root: folder of the files; "digits" and the scenes made of them do not use it.
        calibration, validation, test, train: number of images, or "rest". Calibration images are drawn from the
            training images and may be in `train` too. If calibration or train is 0, that split is None. If the dataset has
            no training images, calibration, validation and test are drawn from the test images, without overlap.
        validation_from: "test" or "train", see `secateur.envs.tasks.splits`.
        seed: random seed for drawing from the training images, or from the test images if there are no training images.
        input_shape: (channels, height, width) of the model; "image_folder" resizes its images to it, the shape of all other
            images must be equal to it.
        mean, std: one number per channel; None: the dataset's own.
    Raises:
        InputError: if a name is unknown, files are missing or unreadable, or counts or shapes do not fit.
    """
    counts = {"calibration": calibration, "validation": validation, "test": test, "train": train}
    for field, count in counts.items():
        _check_count(field, count)
    name = current_name(name)
    if ":" in name:
        data = _call(name, root=root, validation_from=validation_from, seed=seed, **counts)
    else:
        dataset = _reader(name)(root, input_shape)
        data = split_dataset(name, dataset, validation_from=validation_from, seed=seed, **counts)
    data = replace(data, mean=data.mean if mean is None else tuple(mean), std=data.std if std is None else tuple(std))
    if input_shape is not None and tuple(input_shape) != data.image_shape:
        raise InputError(
            f"The images of `data.name: {name}` are {shape_text(data.image_shape)}, "
            f"but `model.input` is {shape_text(input_shape)}. Set `model.input` to the shape of the images."
        )
    return data


def _check_count(field: str, count: int | str) -> None:
    least = 0 if field in ("train", "calibration") else 1
    if count == REST or (isinstance(count, int) and not isinstance(count, bool) and count >= least):
        return
    raise InputError(f"`data.{field}` must be a whole number of images, at least {least}, or `rest`, but got {count!r}.")


def _call(path: str, **arguments: Any) -> TaskData:
    """Return what the user's function returns."""
    _, function = import_object(path, "data.name")
    if not callable(function):
        raise InputError(f"`data.name: {path}` must be a function, but is {type(function).__name__}.")
    try:
        data = function(**arguments)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # the user's function runs arbitrary code
        raise InputError(f"`data.name: {path}` failed: {type(error).__name__}: {error}") from error
    if not isinstance(data, TaskData):
        raise InputError(f"`data.name: {path}` must return a secateur.envs.tasks.data.TaskData, but got {type(data).__name__}.")
    return data


def _reader(name: str) -> Callable[..., Dataset]:
    if name not in DATASETS:
        raise InputError(
            f"`data.name: {name}` is unknown.{did_you_mean(name, DATASETS)} "
            f'Known: {", ".join(DATASETS)}, or "package.module:function".'
        )
    return DATASETS[name]

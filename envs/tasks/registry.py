"""The tasks in the box by name. A new one is a file and a line in `TASKS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from secateur.envs.tasks.classification import Classification, ClassificationConfig
from secateur.envs.tasks.detection import Detection, DetectionConfig
from secateur.envs.tasks.regression import Regression, RegressionConfig
from secateur.envs.tasks.restoration import Restoration, RestorationConfig
from secateur.envs.tasks.segmentation import Segmentation, SegmentationConfig
from secateur.envs.tasks.splits import TaskData
from secateur.envs.tasks.supervised import SupervisedTask

TASKS: Mapping[str, tuple[type, type[SupervisedTask]]] = {
    "classification": (ClassificationConfig, Classification),
    "segmentation": (SegmentationConfig, Segmentation),
    "restoration": (RestorationConfig, Restoration),
    "detection": (DetectionConfig, Detection),
    "regression": (RegressionConfig, Regression),
}
"""{name: (class of its options, task)}; a task is made as `task(data, options)`."""


def build_task(name: str, options: Mapping[str, Any], data: TaskData) -> SupervisedTask:
    """Return the task `name` with these options on these data.

    Raises:
        InputError: if the data do not suit the task.
    """
    config_class, task = TASKS[name]
    return task(data, TypeAdapter(config_class).validate_python(options))  # type: ignore[call-arg]

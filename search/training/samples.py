"""What a compressed network is trained on."""

from __future__ import annotations

from secateur.envs.core import InputError
from secateur.envs.parts import PartTask
from secateur.envs.tasks.core import all_samples
from secateur.envs.tasks.data import REST, load_data
from secateur.envs.tasks.splits import TaskData
from secateur.envs.tasks.supervised import SupervisedTask
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import Samples, labeled_samples, unlabeled_samples
from secateur.search.config import SearchConfig
from secateur.search.problem import Problem


def load_training_data(config: SearchConfig) -> TaskData:
    """Return the data of the configuration with `data.train`, or with all training images where it is 0; there may be none."""
    arguments = {**config.data.model_dump(), "input_shape": config.model.input}
    if config.data.train:
        return load_data(**arguments)
    try:
        return load_data(**{**arguments, "train": REST})
    except InputError:  # a data set without training images
        return load_data(**arguments)


def training_samples(problem: Problem, config: DistillationConfig) -> tuple[Samples, str]:
    """Return the training images with labels, or else the calibration samples without; and one sentence about them.

    Raises:
        InputError: if there is neither, or the recipe does not suit them.
    """
    if isinstance(problem.task, PartTask):
        reason = "Parts of a model are trained without the labels of the whole"
    elif not isinstance(problem.task, SupervisedTask):
        reason = "A task of functions has no training images"
    else:
        data = load_training_data(problem.config).on(problem.torch_device)
        if data.train is not None:
            if (config.shift or config.flip) and data.train.labels.ndim > 1:
                raise InputError(
                    "`shift` and `flip` of the training move the images but not their targets, which are arrays here. Set "
                    "`finalize.training.shift` to 0 and `finalize.training.flip` to false."
                )
            samples = labeled_samples(data, data.train, config.shift, config.flip)
            return samples, f"The networks are trained on {samples.count} images with labels."
        reason = "There are no training images"
    return _calibration_samples(problem, config, reason)


def _calibration_samples(problem: Problem, config: DistillationConfig, reason: str) -> tuple[Samples, str]:
    count = problem.task.samples("calibration")
    if not count:
        raise InputError(f"{reason}, and `data.calibration` is 0: there is nothing to train on. Set `data.calibration`.")
    if config.distillation == 0:
        raise InputError(f"{reason}, so `finalize.training.distillation` must be above 0: only the dense model can be imitated.")
    samples = unlabeled_samples(all_samples(problem.task, "calibration")[0], config.shift, config.flip)
    imitated = f"the networks imitate the dense model's outputs for the {count} calibration samples, without labels"
    return samples, f"{reason}: {imitated}."

"""Makes a network from a configuration: `model.factory` builds it, `model.weights` fills it.

`factory` is a network of ours ("secateur:resnet56"), of torchvision ("torchvision:resnet18"), or the user's own
("package.module:function").

`weights` is a file (safetensors, or torch.save of a state dict or a checkpoint; see weights.py) or the word "trained": then
the module of the factory must offer

    def train_weights(model: nn.Module, task: SupervisedTask, progress: Progress | None = None) -> Path

It trains a network like `model` for the task on `task.data.train`, or finds a trained one in its cache, and returns a weights
file. `secateur.envs.tasks.digits` is an example.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from secateur.envs.core import InputError
from secateur.envs.model_graph.plain_layers import make_weights_plain, unwrapped
from secateur.envs.tasks.imports import OBJECT, current_name, did_you_mean, import_object
from secateur.envs.tasks.supervised import SupervisedTask
from secateur.envs.tasks.training import Progress
from secateur.envs.tasks.weights import load_weights

log = logging.getLogger(__name__)

OURS, TORCHVISION = "secateur:", "torchvision:"
"""What the names of built-in factories start with."""

_CIFAR = "secateur.envs.tasks.cifar_resnet"
FACTORIES = {
    **{name: f"{_CIFAR}:{name}" for name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg16_bn")},
    "digits": "secateur.envs.tasks.digits:digits_resnet",
    "synthetic": "secateur.envs.tasks.synthetic:synthetic_net",
    "unet": "secateur.envs.tasks.unet:unet",
    "edsr": "secateur.envs.tasks.edsr:edsr",
    "scene_detector": "secateur.envs.tasks.scene_detector:scene_detector",
}
"""{name: function}: "secateur:<name>" in a configuration calls the function. The CIFAR networks take 3x32x32 images,
"digits" 1x8x8, "synthetic" 3x8x8, "unet" and "scene_detector" 1x64x64; "edsr" takes 1x32x32 and gives 1x64x64."""

TRAINED = "trained"
"""Given in place of a weights file: the network is trained with the recipe of its module."""


def load_model(
    factory: str,
    weights: str | Path | None = None,
    factory_args: Mapping[str, object] | None = None,
    task: SupervisedTask | None = None,
    progress: Progress | None = None,
    status: Callable[[str], None] = log.info,
) -> nn.Module:
    """Return the network, float32, in eval mode.

    Args:
        factory: "secateur:resnet56", "torchvision:resnet18" or "package.module:function".
        weights: a file, "trained", or None for the factory's own initialization.
        factory_args: keyword arguments of the factory.
        task: needed by "trained" only.
        progress: callback of the training, called after each epoch.
        status: called with one line that says what was taken from a weights file that holds more than a state dict.
    Raises:
        InputError: if the factory is unknown or fails, or the weights are missing, unreadable, for another model or not finite.
    """
    model = call_factory(*find_factory(factory, factory_args), factory)
    if weights == TRAINED:
        weights = _train(factory, model, task, progress)
    if weights is not None:
        load_weights(model, weights, status)
    check_weights(model, f"The network of `model.factory: {factory}`")
    model = model.float().eval()
    if changed := make_weights_plain(model):
        log.warning(
            "Computed weights (spectral norm, weight norm, masks, standardization) are stored as plain weights in the searched "
            f"network: {', '.join(changed[:5])}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}."
        )
    return model


def check_weights(model: nn.Module, what: str) -> None:
    """Raise InputError if a parameter or a batch norm's statistics are not finite; masks in other buffers may be infinite."""
    statistics = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    for name, tensor in (*model.named_parameters(), *statistics):
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise InputError(
                f"{what} is damaged: `{name}` holds NaN or infinite values. Repair it, or "
                "name a file of trained weights in `model.weights`."
            )


def build_model(factory: str, factory_args: Mapping[str, object] | None = None) -> nn.Module:
    """Return the network that the factory builds, in eval mode, with the factory's own initialization and plain weights."""
    model = call_factory(*find_factory(factory, factory_args), factory).eval()
    make_weights_plain(model)
    return model


def call_factory(function: Callable[..., object], arguments: Mapping[str, object], factory: str) -> nn.Module:
    """Return the network that `function` builds, without wrappers; `factory` is its name in errors."""
    try:
        model = function(**arguments)
    except (Exception, SystemExit) as error:  # the user's factory runs arbitrary code
        raise InputError(
            f"`model.factory: {factory}` failed with arguments {arguments}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"`model.factory: {factory}` must return a torch.nn.Module, but got {type(model).__name__}.")
    if (inner := unwrapped(model)) is not model:
        log.warning(f"`model.factory: {factory}` returns {type(model).__name__}: the {type(inner).__name__} inside it is used.")
    return inner


def find_factory(
    factory: str, factory_args: Mapping[str, object] | None = None
) -> tuple[Callable[..., object], dict[str, object]]:
    """Return the function that `factory` names, not yet called, and the arguments to call it with.

    Raises:
        InputError: if there is no such function.
    """
    factory, arguments = current_name(factory), dict(factory_args or {})
    if factory.startswith(OBJECT):
        raise InputError(
            f"The model was a Python object, `{factory.removeprefix(OBJECT)}`, so it cannot be built by name. Pass it: "
            "load_compressed(folder, model), or continue with the `Run` that secateur.search returned."
        )
    if factory.startswith(TORCHVISION):
        return _find_in_torchvision(factory, arguments)
    name = factory.removeprefix(OURS)
    if name != factory and name not in FACTORIES:
        raise InputError(
            f"`model.factory: {factory}`: secateur has no model `{name}`.{did_you_mean(name, FACTORIES)} "
            f"Known: {', '.join(FACTORIES)}."
        )
    _, function = import_object(factory if name == factory else FACTORIES[name], "model.factory")
    if not callable(function):
        raise InputError(f"`model.factory: {factory}` must be a function, but is {type(function).__name__}.")
    return function, arguments


def _find_in_torchvision(factory: str, arguments: dict[str, object]) -> tuple[Callable[..., object], dict[str, object]]:
    from torchvision import models

    name, kinds = factory.removeprefix(TORCHVISION), (models, models.detection, models.segmentation, models.video)
    known = [one for kind in kinds for one in models.list_models(module=kind)]
    if name not in known:
        raise InputError(f"`model.factory: {factory}`: torchvision has no model `{name}`.{did_you_mean(name, known)}")
    builder = models.get_model_builder(name)
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": True, **arguments}  # without it, torchvision warns
    downloads = [option for option in ("weights", "weights_backbone") if option in inspect.signature(builder).parameters]
    return builder, {**dict.fromkeys(downloads), **arguments}


def _train(factory: str, model: nn.Module, task: SupervisedTask | None, progress: Progress | None) -> Path:
    """Return the weights file that the factory's module trains."""
    train_weights = getattr(inspect.getmodule(find_factory(factory)[0]), "train_weights", None)
    if train_weights is None:
        raise InputError(
            f"`model.weights: trained` needs a function `train_weights` beside `model.factory: {factory}`. "
            "Name a weights file instead."
        )
    if task is None or task.data.train is None:
        raise InputError('`model.weights: trained` needs training images: load the data with train="rest".')
    return train_weights(model, task, progress)

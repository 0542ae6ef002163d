"""Makes a network from a configuration: `model.factory` builds it, `model.weights` fills it.

`factory` is a network of ours ("secateur:resnet56"), of torchvision ("torchvision:resnet18"), or the user's own
("package.module:function").

`weights` is a file (safetensors, or torch.save of a state dict) or the word "trained": then the module of the factory
must offer

    def train_weights(model: nn.Module, data: TaskData, progress: Progress | None = None) -> Path

It trains a network like `model` on `data.train`, or finds a trained one in its cache, and returns a weights file.
`secateur.envs.tasks.digits` is an example.
"""

from __future__ import annotations

import inspect
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.envs.core import InputError
from secateur.envs.model_graph.plain_layers import make_weights_plain, unwrapped
from secateur.envs.tasks.imports import current_name, did_you_mean, import_object
from secateur.envs.tasks.splits import TaskData
from secateur.envs.tasks.training import Progress

log = logging.getLogger(__name__)

OURS, TORCHVISION = "secateur:", "torchvision:"
"""What the names of built-in factories start with."""

_CIFAR = "secateur.envs.tasks.cifar_resnet"
FACTORIES = {
    **{name: f"{_CIFAR}:{name}" for name in ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "vgg16_bn")},
    "digits": "secateur.envs.tasks.digits:digits_resnet",
    "synthetic": "secateur.envs.tasks.synthetic:synthetic_net",
}
"""{name: function}: "secateur:<name>" in a configuration calls the function. The CIFAR networks take 3x32x32 images,
"digits" 1x8x8, "synthetic" 3x8x8."""

TRAINED = "trained"
"""Given in place of a weights file: the network is trained with the recipe of its module."""

NESTING_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys of a checkpoint under which training scripts store the state dict."""

NAME_PREFIXES = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile add to every tensor's name."""


def load_model(
    factory: str,
    weights: str | Path | None = None,
    factory_args: Mapping[str, object] | None = None,
    data: TaskData | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Return the network, float32, in eval mode.

    Args:
        factory: "secateur:resnet56", "torchvision:resnet18" or "package.module:function".
        weights: a file, "trained", or None for the factory's own initialization.
        factory_args: keyword arguments of the factory.
        data: needed by "trained" only.
        progress: callback of the training, called after each epoch.
    Raises:
        InputError: if the factory is unknown or fails, or the weights are missing, unreadable or for another model.
    """
    model = call_factory(*find_factory(factory, factory_args), factory)
    if weights == TRAINED:
        weights = _train(factory, model, data, progress)
    if weights is not None:
        load_weights(model, weights)
    model = model.float().eval()
    if changed := make_weights_plain(model):
        log.warning(
            f"{len(changed)} layers compute their weights (spectral norm, weight norm, masks, standardization). In the searched "
            f"network the computed weights are stored, and the layers are plain layers of PyTorch: {', '.join(changed[:5])}"
            f"{', ...' if len(changed) > 5 else '.'}"
        )
    return model


def build_model(factory: str, factory_args: Mapping[str, object] | None = None) -> nn.Module:
    """Return the network that the factory builds, in eval mode, with the factory's own initialization and plain weights."""
    model = call_factory(*find_factory(factory, factory_args), factory).eval()
    make_weights_plain(model)
    return model


def call_factory(function: Callable[..., object], arguments: Mapping[str, object], factory: str) -> nn.Module:
    """Return the network that `function` builds, without wrappers; `factory` is its name in errors."""
    try:
        model = function(**arguments)
    except Exception as error:  # the user's factory runs arbitrary code
        raise InputError(
            f"`model.factory: {factory}` failed with arguments {arguments}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"`model.factory: {factory}` must return a torch.nn.Module, but got {type(model).__name__}.")
    if (inner := unwrapped(model)) is not model:
        log.warning(f"`model.factory: {factory}` returns {type(model).__name__}: the {type(inner).__name__} inside it is used.")
    return inner


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Fill `model` in place from a weights file; tensors are cast to the model's precision.

    Raises:
        InputError: if the file is missing or unreadable, wants to execute code, or belongs to another architecture.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"`model.weights: {path}` is not a file.")
    tensors = _plain_names(_read_tensors(path))
    _check_names(model, tensors, path)
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise InputError(f"`model.weights: {path}` is damaged: `{broken[0]}` holds NaN or infinite values.")
    model.load_state_dict(tensors, strict=False)  # names and shapes are checked above, with clearer messages


def find_factory(
    factory: str, factory_args: Mapping[str, object] | None = None
) -> tuple[Callable[..., object], dict[str, object]]:
    """Return the function that `factory` names, not yet called, and the arguments to call it with.

    Raises:
        InputError: if there is no such function.
    """
    factory, arguments = current_name(factory), dict(factory_args or {})
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

    name, known = factory.removeprefix(TORCHVISION), models.list_models(module=models)
    if name not in known:
        raise InputError(f"`model.factory: {factory}`: torchvision has no model `{name}`.{did_you_mean(name, known)}")
    if name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": True, **arguments}  # without it, torchvision warns
    return models.get_model_builder(name), {"weights": None, **arguments}


def is_model_factory(function: object) -> bool:
    """Return whether this is a class of modules, or a function of torchvision's models or of a module that holds such a class.

    A name in a file of somebody else is called only if this is true: the file can name `os:system` as well as a network.
    """
    if isinstance(function, type):
        return issubclass(function, nn.Module)
    if not inspect.isfunction(function):
        return False
    home = function.__module__
    if home.partition(".")[0] == "torch":  # torch's functions make no networks, but torch.export.load reads pickles
        return False
    known = list(vars(sys.modules[home]).values()) if home in sys.modules else []
    return home.startswith("torchvision.models.") or any(
        isinstance(value, type) and issubclass(value, nn.Module) for value in known
    )


def _train(factory: str, model: nn.Module, data: TaskData | None, progress: Progress | None) -> Path:
    """Return the weights file that the factory's module trains."""
    train_weights = getattr(inspect.getmodule(find_factory(factory)[0]), "train_weights", None)
    if train_weights is None:
        raise InputError(
            f"`model.weights: trained` needs a function `train_weights` beside `model.factory: {factory}`. "
            "Name a weights file instead."
        )
    if data is None or data.train is None:
        raise InputError('`model.weights: trained` needs training images: load the data with train="rest".')
    return train_weights(model, data, progress)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"`model.weights: {path}` is not a readable safetensors file: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise any error
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or _is_bare_pickle(path)):
            raise InputError(
                f"`model.weights: {path}` is a pickle that wants to execute code, so it was not loaded. "
                "Save the tensors alone: torch.save(model.state_dict(), path)."
            ) from error
        raise InputError(f"`model.weights: {path}` is damaged or not a file of torch.save.") from error
    for key in NESTING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(map(_is_named_tensor, content.items())):
        raise InputError(
            f"`model.weights: {path}` must hold a state dict (tensors by name), optionally under one of "
            f"{', '.join(NESTING_KEYS)}. Save it with torch.save(model.state_dict(), path)."
        )
    return dict(content)


def _is_named_tensor(entry: tuple[object, object]) -> bool:
    name, tensor = entry
    return isinstance(name, str) and isinstance(tensor, Tensor)


def _is_bare_pickle(path: Path) -> bool:
    """Return whether the file starts like one of pickle.dump, with the opcode of the protocol."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in NAME_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_names(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if names or shapes differ; the message names the first difference of each kind."""
    expected = model.state_dict()
    # Files from before torch 0.4.1, and some converters, lack the batch counters, which inference does not read.
    missing = [name for name in expected if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in expected]
    other = [name for name in tensors if name in expected and tensors[name].shape != expected[name].shape]
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing, first `{missing[0]}` {_shape(expected[missing[0]])}")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown, first `{unexpected[0]}` {_shape(tensors[unexpected[0]])}")
    if other:
        name = other[0]
        parts.append(
            f"{len(other)} have another shape, first `{name}`: file {_shape(tensors[name])}, model {_shape(expected[name])}"
        )
    if parts:
        raise InputError(f"`model.weights: {path}` belongs to another architecture than `model.factory`: {'; '.join(parts)}.")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))

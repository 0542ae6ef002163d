"""Builds a compressed model from an export folder: JSON and safetensors, no pickles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.core import InputError
from secateur.envs.inputs import call_model, described_inputs
from secateur.envs.model_graph.plain_layers import make_weights_plain
from secateur.envs.pruning.slicing import resize_model, set_written_sizes
from secateur.envs.pruning.view_sizes import restore_view_sizes
from secateur.envs.quantization.estimators import ESTIMATORS
from secateur.envs.quantization.fake_quantize import set_activation_grid, set_quantized_weight
from secateur.envs.quantization.packing import unpack_bits
from secateur.envs.quantization.quantizers import ActivationGrid, QuantizedWeight
from secateur.envs.quantization.trainable import DEFAULT, make_trainable
from secateur.envs.tasks.imports import OBJECT
from secateur.envs.tasks.models import build_model, call_factory, find_factory
from secateur.envs.tasks.trust import check_trusted
from secateur.search.export.files import CODES, LEVELS, POLICY, SCALE, WEIGHTS, check_file, read_export

Factory = str | Callable[..., nn.Module] | nn.Module | None
"""What the user names: a factory "package.module:function", the function itself, or the dense model. None: see policy.json."""


def load_compressed(
    folder: str | Path, factory: Factory = None, trainable: bool | str = False, trust: Collection[str] = ()
) -> nn.Module:
    """Return the compressed model in an export folder, in eval mode; its weights equal the scored ones bit for bit.

    Nothing is unpickled. The factory that policy.json names is called if it is one of secateur or torchvision, or in a module
    that is trusted (envs/tasks/trust.py). With `factory` it is not called.

    Args:
        folder: of the export.
        factory: called in place of the one that policy.json names, with the same arguments; a function, or its name. Or the dense
            model, which is copied.
        trainable: whether quantized weights are trained: each has a float weight beside it, which is rounded to the same grid in
            every forward pass and gets the gradient of the rounded one (envs/quantization/trainable.py). Call `train()` before,
            and `secateur.save_compressed` after training. Or the name of an estimator (envs/quantization/estimators), such as
            "learned_step", which trains the scales too.
        trust: modules that policy.json may name.
    Raises:
        InputError: if the folder is no export, its files are damaged or were changed, the code of the model has changed, or
            policy.json names a module that is not trusted.
    """
    folder = Path(folder)
    if isinstance(trainable, str) and trainable not in ESTIMATORS:
        raise InputError(f"`trainable` must be true, false or an estimator ({', '.join(ESTIMATORS)}), but got {trainable!r}.")
    document = read_export(folder)
    try:
        packed = _read_weights(folder / WEIGHTS, document["weights_sha256"])
        model = build_dense(document["model"], factory, trust).float().eval()
        set_written_sizes(model, document.get("sizes", {}))  # exports of earlier versions have none
        restore_view_sizes(model, document.get("views", {}))
        restore_layers(model, packed, document["layers"])
        with torch.inference_mode():
            if not document["model"].get("part"):  # the inputs are those of the parts
                call_model(model, described_inputs(document["model"]))
    except InputError:
        raise
    except Exception as error:  # a hand-edited file can break any step above in its own way
        raise InputError(f"{folder / POLICY} does not fit the model: {type(error).__name__}: {error}") from error
    if trainable:
        make_trainable(model, trainable if isinstance(trainable, str) else DEFAULT)
        loaded: Any = model
        loaded.compressed_from, loaded.trusted = folder, tuple(trust)
    return model


def build_dense(model: Mapping[str, Any], factory: Factory = None, trust: Collection[str] = ()) -> nn.Module:
    """Return the network before compression; a function that policy.json names is called only if its module is trusted."""
    if isinstance(factory, nn.Module):
        dense = copy.deepcopy(factory)
        return _plain_network(lambda **arguments: dense, {}, type(factory).__name__)
    if isinstance(factory, str):
        return build_model(factory, model["args"])
    if factory is not None:
        return _plain_network(factory, model["args"], model["factory"])
    if not model["factory"].startswith(OBJECT):
        check_trusted(model["factory"], "model.factory", POLICY, trust)
    return _plain_network(*find_factory(model["factory"], model["args"]), model["factory"])


def _plain_network(factory: Callable[..., object], arguments: Mapping[str, object], name: str) -> nn.Module:
    """Return the factory's network in eval mode with plain weights, as the search has it."""
    model = call_factory(factory, arguments, name).eval()
    make_weights_plain(model)
    return model


def _read_weights(path: Path, checksum: str) -> dict[str, Tensor]:
    check_file(path, checksum)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def restore_layers(model: nn.Module, packed: Mapping[str, Tensor], layers: list[dict[str, Any]]) -> None:
    """Give a freshly built dense model the stored tensors, their shapes and the quantizers, in place."""
    tensors = {name: tensor for name, tensor in packed.items() if not name.endswith((CODES, SCALE, LEVELS))}
    quantized = {}
    for layer in layers:
        if layer["weight_bits"] != FLOAT_BITS:
            name, shape = layer["name"], tuple(layer["weight_shape"])
            stream = packed[name + CODES].numpy().astype(np.uint8, copy=False)
            codes = torch.from_numpy(unpack_bits(stream, layer["weight_bits"], shape))
            quantized[name] = QuantizedWeight(codes, packed[name + SCALE], layer["weight_bits"], packed.get(name + LEVELS))
            tensors[f"{name}.weight"] = quantized[name].dequantize()
    expected = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if missing := sorted(expected - set(tensors)):
        raise InputError(f"The export has no tensor `{missing[0]}`, which the factory makes: the model's code has changed.")
    resize_model(model, tensors)
    for layer in layers:
        module = model.get_submodule(layer["name"])
        if layer["name"] in quantized:
            set_quantized_weight(module, quantized[layer["name"]])
        if layer["activation_bits"] != FLOAT_BITS:
            set_activation_grid(module, ActivationGrid(**layer["activation_grid"]))

"""Fills a network from a weights file: finds the state dict in a checkpoint and the network's names in it.

Training scripts store more than the tensors of a network. Recognized are:

- state dicts under a key of the checkpoint ("model", "net", "model_ema", ...), also several levels deep;
- names with a prefix: of DataParallel, torch.compile, AveragedModel, Lightning, or of any module that holds the network;
- entries of tools: thop's operation counters, AveragedModel's number of updates.

Nothing pickled is executed: `torch.load` reads tensors, numbers, text and containers only.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.envs.core import InputError

log = logging.getLogger(__name__)

NESTING_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema", "params")
"""Keys of a checkpoint under which training scripts store the state dict; the first one that holds tensors is taken."""

NAME_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that wrappers add to every tensor's name; removed for messages about files of another architecture."""

TOOL_ENTRIES = ("total_ops", "total_params", "n_averaged")
"""Last parts of the names of entries that belong to no network: thop's counters, and the counter of AveragedModel."""


def load_weights(model: nn.Module, path: str | Path, status: Callable[[str], None] = log.info) -> None:
    """Fill `model` in place from a weights file; tensors are cast to the model's precision.

    Args:
        model: the network.
        path: safetensors file, or file of torch.save.
        status: called with one line that says what was taken, if the file holds more than the network's state dict.
    Raises:
        InputError: if the file is missing or unreadable, wants to execute code, or belongs to another architecture.
    """
    path = Path(path).expanduser()
    if not isfile(path):
        raise InputError(f"`model.weights: {path}` is not a file.")
    found, place = _state_dict(_read(path), path)
    tensors, names = _own_tensors(model, found, path)
    _check_names(model, tensors, path)
    _check_values(tensors, path)
    model.load_state_dict(tensors, strict=False)  # names and shapes are checked above, with clearer messages
    if notes := [*place, *names]:
        status(f"weights from {path.name}: {'; '.join(notes)}")


def _read(path: Path) -> Any:
    """Return the content of a weights file."""
    if path.suffix == ".safetensors" or _is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"`model.weights: {path}` is not a readable safetensors file: {error}") from error
    try:
        # Training scripts often store their arguments; a Namespace only holds values.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # they concern pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise any error
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in str(error) or _is_bare_pickle(path)):
            raise InputError(
                f"`model.weights: {path}` is a pickle that wants to execute code, so it was not loaded. "
                "Save the tensors alone: torch.save(model.state_dict(), path)."
            ) from error
        raise InputError(f"`model.weights: {path}` is damaged or not a file of torch.save.") from error


def _is_safetensors(path: Path) -> bool:
    """Return whether a file of any name starts like a safetensors file: the size of a JSON object, then the object."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _is_bare_pickle(path: Path) -> bool:
    """Return whether the file starts like one of pickle.dump, with the opcode of the protocol."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the state dict in the content of a file, and notes about where it was found."""
    keys: list[str] = []
    others: list[str] = []
    while isinstance(content, Mapping) and not _is_state_dict(content):
        found = [key for key in content if _holds_tensors(content[key])]
        known = [key for key in NESTING_KEYS if key in found]
        if not known and len(found) != 1:
            break
        key = (known or found)[0]
        keys, others = [*keys, key], [other for other in found if other != key]
        content = content[key]
    if not _is_state_dict(content):
        raise InputError(
            f"`model.weights: {path}` must hold a state dict (tensors by name), optionally under one of "
            f"{', '.join(NESTING_KEYS)}. Save it with torch.save(model.state_dict(), path)."
        )
    notes = [f"the tensors under `{'.'.join(keys)}` are used"] if keys else []
    if others:
        notes.append(f"those under {_listed(others)} are not")
    return dict(content), notes


def _is_state_dict(content: object) -> bool:
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


def _holds_tensors(content: object, depth: int = 3) -> bool:
    """Return whether this is a state dict or a mapping that has one under a string, at most `depth` levels deeper."""
    if _is_state_dict(content):
        return True
    inner = content.items() if isinstance(content, Mapping) and depth else ()
    return any(isinstance(key, str) and _holds_tensors(value, depth - 1) for key, value in inner)


def _own_tensors(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the network's tensors with its own names, and notes about prefixes and tensors that were left out."""
    expected = model.state_dict()
    of_tools = [name for name in tensors if name not in expected and name.rpartition(".")[2] in TOOL_ENTRIES]
    rest = {name: tensor for name, tensor in tensors.items() if name not in of_tools}
    prefixes = _prefixes(rest, expected)
    if len(prefixes) > 1:
        raise InputError(
            f"`model.weights: {path}` holds several networks like `model.factory`, under {_listed(prefixes)}. "
            "Save the state dict of the one that you want."
        )
    prefix = prefixes[0] if prefixes else _common_prefix(rest)
    own = {name.removeprefix(prefix): tensor for name, tensor in rest.items() if name.startswith(prefix)}
    outside = [name for name in rest if not name.startswith(prefix)]
    notes = [f"the prefix `{prefix}` of the names is removed"] if prefix else []
    if ignored := [*of_tools, *outside]:
        notes.append(f"{len(ignored)} other entries are ignored, first `{ignored[0]}`")
    return own, notes


def _prefixes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes with which the file has all of the network's tensors, in the same shapes; [""] if it needs none."""
    needed = {name: tensor.shape for name, tensor in expected.items() if not _may_be_missing(name)}
    if not needed:
        return [""]
    first = next(iter(needed))
    ends = [name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fitting = [end for end in ends if all(shapes.get(end + name) == shape for name, shape in needed.items())]
    return [""] if "" in fitting else fitting


def _common_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Return the wrappers' prefixes that all names have."""
    prefix = ""
    while following := [p for p in NAME_PREFIXES if tensors and all(name.startswith(prefix + p) for name in tensors)]:
        prefix += following[0]
    return prefix


def _may_be_missing(name: str) -> bool:
    """Return whether files often lack this tensor: the batch counters, which inference does not read."""
    return name.endswith("num_batches_tracked")  # files from before torch 0.4.1, and some converters


def _check_names(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if names or shapes differ; the message names the first difference of each kind."""
    expected = model.state_dict()
    missing = [name for name in expected if name not in tensors and not _may_be_missing(name)]
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


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise InputError if a tensor is no plain array of finite real numbers."""
    for name, tensor in tensors.items():
        if kind := _special_kind(tensor):
            raise InputError(
                f"`model.weights: {path}`: `{name}` is a {kind} tensor, but weights must be dense arrays of real numbers. "
                "Convert it before saving, for example with `to_dense()` or `dequantize()`."
            )
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise InputError(f"`model.weights: {path}` is damaged: `{name}` holds NaN or infinite values.")


def _special_kind(tensor: Tensor) -> str:
    """Return what makes a tensor unusable as a weight, "" if nothing does."""
    if tensor.is_meta:
        return "meta"
    if tensor.is_quantized:
        return "quantized"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else "sparse"
    return "complex" if tensor.is_complex() else ""


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

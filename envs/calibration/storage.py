"""Storage of calibrations on disk, as safetensors with a JSON header: they are computed once per network."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from secateur.envs.calibration.calibrate import calibrate
from secateur.envs.calibration.core import Calibration, CalibrationConfig, LayerStatistics
from secateur.envs.inputs import Inputs, tensors_of_inputs
from secateur.envs.model_graph.plan import ModelGraph

logger = logging.getLogger(__name__)

MAX_FOLDER_BYTES = 2_000_000_000
"""Memory limit for the stored calibrations; the least recently used files are deleted first."""


def cached_calibration(
    model: nn.Module,
    graph: ModelGraph,
    images: Inputs,
    config: CalibrationConfig,
    folder: Path,
    status: Callable[[str], None] = logger.info,
) -> Calibration:
    """Return the result of `calibrate`; it is read from `folder` if it is stored there, otherwise computed and stored.

    A file that is damaged or has another key is replaced. If the folder is not writable, nothing is stored and a warning is
    logged.

    Args:
        model, graph, images, config: arguments of `calibrate`.
        folder: folder of the stored calibrations; it is created if it does not exist.
        status: status callback.
    """
    key = _key(model, graph, images, config)
    path = folder / f"{key}.safetensors"
    if path.exists():
        try:
            calibration = load_calibration(path, key)
            os.utime(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("The calibration in %s is damaged and is computed again: %s", path, error)
        else:
            status(f"calibration read from {path}")
            return calibration
    status("calibrating")
    calibration = calibrate(model, graph, images, config)
    try:
        save_calibration(calibration, path, key)
        _shrink(folder, MAX_FOLDER_BYTES)
    except OSError as error:
        logger.warning("The calibration cannot be stored in %s, so the next start computes it again: %s", folder, error)
    return calibration


def save_calibration(calibration: Calibration, path: Path, key: str) -> None:
    """Write a calibration with its key. Missing folders are created; the file is written completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    layers = []
    for index, (name, layer) in enumerate(calibration.layers.items()):
        arrays |= {f"{index}.moments": layer.moments, f"{index}.samples": layer.samples}
        values = {field: getattr(layer, field) for field in ("kind", "low", "high", "area", "count")}
        layers.append({"name": name, **values})
    header: dict[str, Any] = {"key": key, "images": calibration.images, "config": asdict(calibration.config), "layers": layers}
    header["checksum"] = _checksum(header, arrays)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    try:
        save_file(arrays, unfinished, metadata={"secateur": json.dumps(header)})
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def load_calibration(path: Path, key: str) -> Calibration:
    """Return the calibration in a file.

    Raises:
        ValueError: if the file has another key, or not the content that was written.
        SafetensorError, OSError, ValueError, KeyError, TypeError: if it is damaged.
    """
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["secateur"])
        if header["key"] != key:
            raise ValueError(f"its key is {header['key']}")
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if header.pop("checksum") != _checksum(header, arrays):
        raise ValueError("its checksum is another one")
    layers = {
        layer.pop("name"): LayerStatistics(moments=arrays[f"{index}.moments"], samples=arrays[f"{index}.samples"], **layer)
        for index, layer in enumerate(header["layers"])
    }
    return Calibration(layers, header["images"], CalibrationConfig(**header["config"]))


def _checksum(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return a hash of the content of a file."""
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _key(model: nn.Module, graph: ModelGraph, images: Inputs, config: CalibrationConfig) -> str:
    """Return a hash of everything that determines a calibration: code, architecture, weights, images, configuration."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(f"{model}{graph.geometry.layers}{graph.operations}{astuple(config)}".encode())
    inputs = [("", x) for x in tensors_of_inputs(images[: config.max_images])]
    tensors = [*model.named_parameters(), *model.named_buffers(), *inputs]
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shrink(folder: Path, most: int) -> None:
    """Delete the least recently used calibrations until the others need at most `most` bytes."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > most:
            file.unlink(missing_ok=True)

"""Writes a compressed model that was trained in Python as an export, and verifies it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from secateur.cost_models.device import parse_device
from secateur.envs.core import InputError
from secateur.envs.inputs import described_inputs, tensors_of_inputs
from secateur.envs.model_graph import analyze
from secateur.envs.parts import PartTask, parts_of, take_parts
from secateur.envs.quantization.trainable import make_quantized
from secateur.envs.tasks.core import Task, first_inputs
from secateur.envs.training.checkpoint import network_tensors
from secateur.search.config import Overrides
from secateur.search.export.execution import layers_in_float
from secateur.search.export.files import ONNX, POLICY, WEIGHTS, read_export
from secateur.search.export.load import Factory, build_dense, load_compressed
from secateur.search.export.onnx_export import LayerExecution, export_onnx
from secateur.search.export.tasks import load_task
from secateur.search.export.verification import Verification
from secateur.search.export.verify import shapes_of, verify_export
from secateur.search.export.write import (
    RANGE_IMAGES,
    check_same_outputs,
    draft_of,
    layer_entries,
    packed_tensors,
    write_document,
)

TRAINED_IN_PYTHON = {"samples": "The network was trained in Python after it was loaded from an export."}


def save_compressed(
    model: nn.Module,
    folder: str | Path,
    source: str | Path | None = None,
    *,
    overrides: Overrides = (),
    factory: Factory = None,
    task: Task | None = None,
    trust: Collection[str] | None = None,
) -> Verification:
    """Write a compressed model that was trained after loading as an export, verify it, and return the result.

    Policy, costs and grids are those of the export that the model was loaded from; weights and scores are new. The model is left
    as it is, so training can go on.

    Args:
        model: from `load_compressed(..., trainable=True)`, trained.
        folder: must not exist, or be empty. Nothing is left in it if anything fails.
        source: the export that the model was loaded from; None: as `load_compressed` has noted it.
        overrides: ["data.root=FOLDER"] or {"data.root": FOLDER}, for data that has moved.
        factory: as in `load_compressed`.
        task: scores the model, in place of the task and the data that policy.json names.
        trust: modules that policy.json may name; None: those that `load_compressed` was given.
    Raises:
        InputError: if the folder is not free, the export is not known, or the model is not that of the export.
        RuntimeError: if the model that is read back computes something else.
    """
    source = getattr(model, "compressed_from", None) if source is None else source
    trust = getattr(model, "trusted", ()) if trust is None else trust
    if source is None:
        raise InputError(
            "The model was not loaded with `load_compressed(folder, trainable=True)`. Name its export: `source=folder`."
        )
    document = read_export(source)
    network = copy.deepcopy(model).cpu().float().eval()
    make_quantized(network)
    _check_same_layers(network, load_compressed(source, factory, trust=trust), Path(source))
    scored: Task = load_task(document, overrides, factory, trust) if task is None else task
    dense = build_dense(document["model"], factory, trust).float().eval()
    if paths := document["model"].get("part"):
        scored, dense = take_parts(scored.task if isinstance(scored, PartTask) else scored, dense, paths)
    part = parts_of(scored, network)
    with draft_of(Path(folder)) as draft:
        save_file(packed_tensors(network), draft / WEIGHTS)
        document["execution"] = [asdict(one) for one in _write_onnx(draft / ONNX, part, dense, scored, document)]
        document["scores"] |= {split: _score(scored, part, split) for split in ("validation", "test")}
        document["layers"], document["training"] = layer_entries(part), TRAINED_IN_PYTHON
        write_document(draft, document, Path(folder).name)
        loaded = parts_of(scored, load_compressed(draft, factory, trust=trust))
        check_same_outputs(loaded, part, first_inputs(scored, "validation", 16)[0])
    return verify_export(folder, overrides=overrides, factory=factory, task=task, trust=trust)


def _check_same_layers(network: nn.Module, exported: nn.Module, source: Path) -> None:
    """Raise InputError unless a network has the tensors and grids of an exported one, with any values of the weights."""
    shapes, wanted = ({name: tuple(x.shape) for name, x in network_tensors(one)} for one in (network, exported))
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            found, expected = (of.get(name, "missing") for of in (shapes, wanted))
            raise InputError(f"The model is not that of {source}: `{name}` is {found}, but {expected} there.")
    grids, wanted_grids = (_grids(one) for one in (network, exported))
    for name in {**wanted_grids, **grids}:
        if grids.get(name) != wanted_grids.get(name):
            raise InputError(
                f"The model is not that of {source}: layer `{name}` has other bits or another zero point. "
                "Load it with `load_compressed(folder, trainable=True)` before training."
            )


def _grids(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the entries of quantized layers by name, without the scales of inputs, which may have been trained."""
    entries = {layer["name"]: layer for layer in layer_entries(network)}
    for layer in entries.values():
        if layer["activation_grid"] is not None:
            del layer["activation_grid"]["scale"]
    return entries


def _write_onnx(
    path: Path, network: nn.Module, dense: nn.Module, task: Task, document: Mapping[str, Any]
) -> list[LayerExecution]:
    """Write model.onnx, and return how each layer is executed; the choice of integers or floats is that of the device."""
    graph = analyze(dense, tuple(tensors_of_inputs(described_inputs(document["model"]))), verify=False)
    device = None if document["device"] is None else parse_device(document["device"], f"The device in {POLICY}")
    in_float = layers_in_float(device, shapes_of(network, described_inputs(document["model"])))
    split = "calibration" if task.samples("calibration") else "validation"
    images = first_inputs(task, split, RANGE_IMAGES)[0]
    return export_onnx(network, graph, images, path, in_float)


def _score(task: Task, network: nn.Module, split: str) -> dict[str, Any]:
    found = task.evaluate(network, split)
    return {"score": found.score, "images": found.samples}

"""network.json of a run: layers, coupled groups and shapes of its dense model, so that readers need neither model nor torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from os.path import isfile
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from secateur.cost_models.core import LayerShape, NetworkGeometry
from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.envs.model_graph.plan import ChannelGroup, FrozenChannels, ModelGraph
from secateur.search.run.folder import read_json
from secateur.search.schema import SCHEMA

NETWORK = "network.json"

_OF_GROUP = ("name", "units", "producers", "consumers")
_VECTORS = ("group_units", "in_fixed", "out_fixed", "other_per_unit", "buffer_fixed", "step_layer")
_MATRICES = ("in_per_unit", "out_per_unit", "buffer_per_unit", "live")


def write_network(run: Path, graph: ModelGraph) -> None:
    """Write what cost models and policies need to know about the dense model; weights and operators are not stored."""
    geometry = graph.geometry
    document = {
        "schema": SCHEMA,
        "layers": [asdict(layer) for layer in geometry.layers],
        "groups": [
            {name: getattr(group, name) for name in ("name", "units", "producers", "consumers")} for group in graph.groups
        ],
        "frozen": [asdict(frozen) for frozen in graph.frozen],
        "geometry": {
            **{name: getattr(geometry, name).tolist() for name in _VECTORS},
            **{name: _entries(getattr(geometry, name)) for name in _MATRICES},
            "other_fixed": geometry.other_fixed,
            "fixed_macs": geometry.fixed_macs,
            "macs_per_unit": None if geometry.macs_per_unit is None else geometry.macs_per_unit.tolist(),
            "buffer_readers": geometry.buffer_readers,
            "uncounted": geometry.uncounted,
        },
    }
    replace_file(run / NETWORK, json.dumps(document) + "\n")


def read_network(run: Path) -> ModelGraph | None:
    """Return the structure of a run's dense model, without tensor slices and operators; None: an earlier version made the run.

    Raises:
        InputError: if the file is damaged.
    """
    path = run / NETWORK
    if not isfile(path):
        return None
    document = read_json(path, "a run")
    try:
        layers = TypeAdapter(tuple[LayerShape, ...]).validate_python(document["layers"])
        groups = tuple(
            ChannelGroup(group["name"], group["units"], (), tuple(group["producers"]), tuple(group["consumers"]))
            for group in document["groups"]
        )
        frozen = TypeAdapter(tuple[FrozenChannels, ...]).validate_python(document["frozen"])
        names = tuple(group.name for group in groups)
        return ModelGraph(_geometry(document["geometry"], layers, names), groups, frozen, (), 0.0)
    except (LookupError, TypeError, ValueError, ValidationError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _geometry(values: Mapping[str, Any], layers: tuple[LayerShape, ...], group_names: tuple[str, ...]) -> NetworkGeometry:
    vectors = {name: np.array(values[name]) for name in _VECTORS}
    matrices = {name: _matrix(values[name]) for name in _MATRICES}
    if len(vectors["group_units"]) != len(group_names) or len(vectors["out_fixed"]) != len(layers):
        raise ValueError("its arrays do not have one entry per group and layer")
    return NetworkGeometry(
        layers=layers,
        group_names=group_names,
        **vectors,
        **{**matrices, "live": matrices["live"].astype(bool)},
        other_fixed=values["other_fixed"],
        fixed_macs=values["fixed_macs"],
        macs_per_unit=None if values["macs_per_unit"] is None else np.array(values["macs_per_unit"]),
        buffer_readers=tuple(tuple(readers) for readers in values["buffer_readers"]),
        uncounted=tuple(values["uncounted"]),
    )


def _entries(matrix: np.ndarray) -> dict[str, Any]:
    """Return a matrix as its shape and its entries other than zero: [row, column, value]."""
    rows, columns = np.nonzero(matrix)
    values = matrix[rows, columns].astype(float)
    entries = zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
    return {"shape": list(matrix.shape), "entries": [list(entry) for entry in entries]}


def _matrix(document: Mapping[str, Any]) -> np.ndarray:
    matrix = np.zeros(document["shape"])
    for row, column, value in document["entries"]:
        matrix[row, column] = value
    return matrix

"""The files of an export: their names, their checksums, and what policy.json says."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

import onnx

from secateur.cost_models.reading import parse_json, read_text
from secateur.envs.core import InputError
from secateur.search.documents import PolicyDocument, check_document
from secateur.search.run.folder import read_json

POLICY, WEIGHTS, ONNX, PT2, README = "policy.json", "model.safetensors", "model.onnx", "model.pt2", "README.md"
INPUT, LOGITS, OUTPUT = "input", "logits", "output"
"""Names in an ONNX file: of the input, of class scores (N, classes), of another output."""

CODES, SCALE, LEVELS = ".weight.codes", ".weight.scale", ".weight.levels"
"""Endings of the tensors in model.safetensors that stand for a quantized weight."""


_FILE_NAME = re.compile(r"model(\.\w+)+")


def read_export(folder: str | Path) -> dict[str, Any]:
    """Return the content of an export's policy.json.

    Raises:
        InputError: if the folder is no export, or the file is damaged.
    """
    document = read_json(Path(folder) / POLICY, "an export")
    check_document(document, PolicyDocument, Path(folder) / POLICY)
    return document


def check_files(folder: Path, document: Mapping[str, Any]) -> None:
    """Raise InputError if a file of an export is missing or was changed since it was written."""
    written = parse_json(read_text(folder / POLICY), str(folder / POLICY))  # `document` may be upgraded to the present schema
    if written.get("policy_sha256") != policy_checksum(written):
        raise InputError(f"{folder / POLICY} is not the file that was exported: it was changed. Export it again.")
    for name, checksum in document["files"].items():
        if not _FILE_NAME.fullmatch(name):
            raise InputError(
                f"{folder / POLICY} is damaged: `files` names {name!r}, which is no file of an export. Export it again."
            )
        check_file(folder / name, checksum)
    _check_plain_onnx(folder, document["files"])


def _check_plain_onnx(folder: Path, files: Collection[str]) -> None:
    """Raise InputError if model.onnx is damaged, or reads weights from a file that is not of this export."""
    path = folder / ONNX
    if not isfile(path):  # `check_files` has named it, if it is a file of the export
        return
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf and onnx raise many kinds of errors
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}. Export it again.") from None
    for tensor in _tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and (entry.value not in files or not _FILE_NAME.fullmatch(entry.value)):
                raise InputError(
                    f"{path} reads the weight `{tensor.name}` from {entry.value!r}, which is no file of this export."
                )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the stored tensors of a graph, and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def policy_checksum(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of policy.json without its entry `policy_sha256`."""
    text = json.dumps({key: value for key, value in document.items() if key != "policy_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_file(path: Path, checksum: str) -> None:
    """Raise InputError unless the file exists and has this SHA-256."""
    if not isfile(path):
        raise InputError(f"{path.parent} is not an export: it has no {path.name}.")
    if file_checksum(path) != checksum:
        raise InputError(f"{path} is not the file that was exported: it is truncated or was changed. Export it again.")


def file_checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_names(count: int) -> list[str]:
    """Return the names of so many inputs in an ONNX file."""
    return [INPUT] if count == 1 else [f"{INPUT}{index}" for index in range(count)]

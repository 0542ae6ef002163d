"""The files of an export: their names, their checksums, and what policy.json says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.envs.core import InputError
from secateur.search.run.folder import read_json

POLICY, WEIGHTS, ONNX, PT2, README = "policy.json", "model.safetensors", "model.onnx", "model.pt2", "README.md"
INPUT, LOGITS, OUTPUT = "input", "logits", "output"
"""Names in an ONNX file: of the input, of class scores (N, classes), of another output."""

CODES, SCALE, LEVELS = ".weight.codes", ".weight.scale", ".weight.levels"
"""Endings of the tensors in model.safetensors that stand for a quantized weight."""


def read_export(folder: str | Path) -> dict[str, Any]:
    """Return the content of an export's policy.json.

    Raises:
        InputError: if the folder is no export, or the file is damaged.
    """
    return read_json(Path(folder) / POLICY, "an export")


def check_files(folder: Path, document: Mapping[str, Any]) -> None:
    """Raise InputError if a file of an export is missing or was changed since it was written."""
    written = json.loads((folder / POLICY).read_text(encoding="utf-8"))  # `document` may be upgraded to the present schema
    if written.get("policy_sha256") != policy_checksum(written):
        raise InputError(f"{folder / POLICY} is not the file that was exported: it was changed. Export it again.")
    for name, checksum in document["files"].items():
        check_file(folder / name, checksum)


def policy_checksum(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of policy.json without its entry `policy_sha256`."""
    text = json.dumps({key: value for key, value in document.items() if key != "policy_sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_file(path: Path, checksum: str) -> None:
    """Raise InputError unless the file exists and has this SHA-256."""
    if not path.is_file():
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

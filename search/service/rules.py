"""What a configuration from the network may name: no code and no files of this machine but those that the server allows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.cost_models.core import InputError
from secateur.envs.tasks.data import DATASETS
from secateur.envs.tasks.imports import current_name
from secateur.envs.tasks.named_functions import FUNCTIONS
from secateur.search.config import SearchConfig, parse_config
from secateur.search.service.store import Store

DIGEST = "sha256:"
"""Start of the name of an uploaded file."""

OWN = ("secateur:", "torchvision:")
"""Starts of the names of factories that every server allows."""


@dataclass(frozen=True)
class Rules:
    """What the server allows besides the built-in networks and data.

    Attributes:
        store: has the uploaded files.
        modules: names of modules whose functions configurations may name.
        data: {name: folder}; a configuration gives the name as `data.root`.
        address: of the Ray cluster; None: every search starts a local one.
    """

    store: Store
    modules: tuple[str, ...] = ()
    data: Mapping[str, Path] = field(default_factory=dict)
    address: str | None = None

    def accept(self, values: Any) -> SearchConfig:
        """Return the configuration that a request describes, with the paths of this machine.

        Args:
            values: sections of keys and values.
        Raises:
            InputError: for anything in it that cannot be used or is not allowed, one line each.
        """
        if not isinstance(values, Mapping) or not all(isinstance(part, Mapping) for part in _sections(values)):
            raise InputError("A configuration is an object with the sections `model`, `data` and `budgets`, and others.")
        values = copy.deepcopy(dict(values))
        problems = [problem for check in (self._model, self._data, self._device, self._task) if (problem := check(values))]
        if problems:
            raise InputError("\n".join(problems))
        search = values.setdefault("search", {})
        search.pop("address", None)
        if self.address is not None:
            search["address"] = self.address
        values.pop("output", None)
        return parse_config(values, "the configuration")

    def _model(self, values: dict[str, Any]) -> str | None:
        model = values.get("model", {})
        factory, weights = str(model.get("factory", "")), model.get("weights")
        if not factory.startswith(OWN) and not self._allowed(factory):
            return (
                f"`model.factory: {factory}` is not allowed: the server allows networks of secateur and torchvision"
                f"{self._others()}. Its operator can allow a module with --allow."
            )
        if weights in (None, "trained"):
            return None
        path = self.store.file(str(weights).removeprefix(DIGEST)) if str(weights).startswith(DIGEST) else None
        if path is None:
            return f"`model.weights` must be `trained`, or {DIGEST}... of a file uploaded to /v1/models (got {weights!r})."
        model["weights"] = str(path)
        return None

    def _data(self, values: dict[str, Any]) -> str | None:
        data = values.get("data", {})
        name, root = current_name(str(data.get("name", ""))), data.get("root")
        if ":" in name and not self._allowed(name):
            return f"`data.name: {name}` is not allowed: known are {', '.join(DATASETS)}{self._others()}."
        if root is None:
            return None
        if root not in self.data:
            return f"`data.root: {root}` is not known to the server. Known: {', '.join(self.data) or 'none'}."
        data["root"] = str(self.data[root])
        return None

    def _device(self, values: dict[str, Any]) -> str | None:
        device = values.get("device")
        if not isinstance(device, str) or device == "profile":
            return None
        path = self.store.file(device.removeprefix(DIGEST)) if device.startswith(DIGEST) else None
        if path is None:
            return f"`device` must be `profile`, or {DIGEST}... of a file that was uploaded to /v1/devices (got {device!r})."
        values["device"] = str(path)
        return None

    def _task(self, values: dict[str, Any]) -> str | None:
        task = values.get("task")
        names = [value for value in task.values() if isinstance(value, str) and ":" in value] if isinstance(task, Mapping) else []
        options = task.get("options") if isinstance(task, Mapping) else None
        if isinstance(options, Mapping):
            names += [value for value in options.values() if isinstance(value, str) and ":" in value]
        for name in names:
            if not self._allowed(name):
                return f"`task` names {name}, which the server does not allow{self._others()} (task {FUNCTIONS})."
        return None

    def _allowed(self, name: str) -> bool:
        module = name.partition(":")[0]
        return any(module == allowed or module.startswith(f"{allowed}.") for allowed in self.modules)

    def _others(self) -> str:
        return f" and of {', '.join(self.modules)}" if self.modules else ""


def _sections(values: Mapping[str, Any]) -> list[Any]:
    return [values.get(name, {}) for name in ("model", "data", "search", "budgets")]

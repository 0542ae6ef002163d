"""The schema of the JSON documents of runs and exports, and how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from secateur.envs.metric import TOP1, Metric

SCHEMA = 2
"""Version of manifest.json, front.json, policy.json and verify.json. Schema 1 knew one metric, top-1."""

_RENAMED = {
    "top1": "score",
    "validation_top1": "validation_score",
    "top1_drop": "metric_drop",
    "pytorch_top1": "pytorch_score",
    "runtime_top1": "runtime_score",
    "recorded_top1": "recorded_score",
}


def upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1 as one of the present schema; one of the present schema is returned as it is."""
    if document["schema"] != 1:
        return document
    config = document.get("config")  # the user's own words, which are still understood
    renamed = _rename({name: value for name, value in document.items() if name != "config"})
    return {**renamed, **({} if config is None else {"config": config}), "schema": SCHEMA, "metric": asdict(TOP1)}


def _rename(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_RENAMED.get(name, name): _rename(entry) for name, entry in value.items()}
    return [_rename(entry) for entry in value] if isinstance(value, list) else value


def metric_of(document: Mapping[str, Any]) -> Metric:
    """Return the metric of a document's scores."""
    return Metric(**document["metric"])


def search_score_of(document: Mapping[str, Any]) -> tuple[Metric, str, float]:
    """Return metric and split of the scores of front.json's points, and the dense model's; earlier versions name none."""
    found = document.get("search")
    if found is None:
        return metric_of(document), "validation", document["dense"]["score"]
    return Metric(**found["metric"]), found["split"], found["dense_score"]

"""The document of a run's front: front.json and front.csv, and what is read from them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.search.documents import FrontDocument, check_document
from secateur.search.run.folder import read_json
from secateur.search.schema import search_score_of

FRONT_JSON, FRONT_CSV = "front.json", "front.csv"


def write_front(run: Path, document: Mapping[str, Any]) -> None:
    """Replace front.json and front.csv of a run; a reader sees the old files or the new ones, never half of them."""
    replace_file(run / FRONT_JSON, json.dumps(document, indent=1) + "\n")
    replace_file(run / FRONT_CSV, front_csv(document))


def front_csv(document: Mapping[str, Any]) -> str:
    """Return one row per policy: when it was found, what it fits, validation and test scores in separate columns, its choices."""
    tested = {point["evaluation"]: point for point in document["final"]["points"]}
    on_front, metric = set(document["front"]), document["metric"]["name"]
    searched, split, _ = search_score_of(document)
    rows = [
        {
            "evaluation": point["evaluation"],
            "on_front": point["evaluation"] in on_front,
            "fits": " ".join(point["fits"]),
            f"{split}_{searched.name}": point["score"],
            f"finalist_validation_{metric}": tested.get(point["evaluation"], {}).get("validation_score", ""),
            f"test_{metric}": tested.get(point["evaluation"], {}).get("score", ""),
            **point["costs"],
            **point["choices"],
        }
        for point in document["points"]
    ]
    table = io.StringIO()
    if rows:
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return table.getvalue()


def read_front(run: str | Path) -> dict[str, Any]:
    """Return the document in a run's front.json.

    Raises:
        InputError: if the folder is no run, or the file is damaged.
    """
    document = read_json(Path(run) / FRONT_JSON, "a run")
    check_document(document, FrontDocument, Path(run) / FRONT_JSON)
    return document


def check_budget(document: Mapping[str, Any], budget: str) -> None:
    """Raise InputError unless the run has this budget."""
    if budget not in document["budgets"]:
        raise InputError(f"There is no budget `{budget}`; the run has {', '.join(document['budgets'])}.")


def only_budget(document: Mapping[str, Any], budget: str) -> dict[str, Any]:
    """Return the document with the front and the finalists of one budget; counts and hypervolume stay the whole run's.

    Raises:
        InputError: if there is no such budget.
    """
    check_budget(document, budget)
    front = document["budgets"][budget]["front"]
    tested = [point for point in document["final"]["points"] if point["budget"] == budget]
    shown = {*front, *(point["evaluation"] for point in tested)}
    return {
        **document,
        "budgets": {budget: document["budgets"][budget]},
        "front": front,
        "points": [point for point in document["points"] if point["evaluation"] in shown],
        "final": {**document["final"], "points": tested},
    }


def finalist_points(document: Mapping[str, Any], budget: str, top: int) -> list[dict[str, Any]]:
    """Return the best points of a budget, at most `top`: its finalists, or what fits it if no finalist was scored."""
    check_budget(document, budget)
    tested = [point["evaluation"] for point in document["final"]["points"] if point["budget"] == budget]
    points = {point["evaluation"]: point for point in document["points"]}
    return [points[number] for number in (tested or document["budgets"][budget]["front"])[:top]]


def winner(document: Mapping[str, Any], budget: str) -> dict[str, Any]:
    """Return the point to export for a budget: the best on validation; test scores are not used for selection.

    Raises:
        InputError: if there is no such budget, or no policy fits it.
    """
    best = finalist_points(document, budget, 1)
    tested = any(point["budget"] == budget for point in document["final"]["points"])
    check = document["budgets"][budget].get("check")  # runs of earlier versions have none
    if check and check["rejected"] and not tested:
        raise InputError(check["note"])
    if not best:
        raise InputError(
            f"Nothing in {document['evaluations']} evaluations fits budget `{budget}`. Search longer, or allow more."
        )
    return best[0]

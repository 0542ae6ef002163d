"""MLflow: one MLflow run per search, on a server or in a local store. Needs the extra `mlflow`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.cost_models.core import InputError
from secateur.search.tracking.core import ScalarTracker, SearchStart

RUN = "secateur.run"
"""Tag with the digest of the path of the run's folder; a search that goes on finds its MLflow run by it."""

LONGEST = 500
"""Characters of a parameter that are kept."""


@dataclass(frozen=True)
class MLflowConfig:
    """MLflow: scores, costs and the configuration as an MLflow run.

    Attributes:
        tracking_uri: server or store, such as http://host:5000 or sqlite:///mlflow.db; None: what MLflow itself uses, which the
            variable MLFLOW_TRACKING_URI sets.
        experiment: name of the experiment; made if it is new.
    """

    tracking_uri: str | None = None
    experiment: str = "secateur"


class MLflow(ScalarTracker):
    """Logs through `mlflow.MlflowClient`, so nothing of the user's own MLflow state in this process changes."""

    def __init__(self, config: MLflowConfig):
        self._config = config
        self._client: Any = None
        self._run = ""

    def open(self, start: SearchStart) -> None:
        """Find the MLflow run of this search, or make it.

        Raises:
            InputError: if MLflow is not installed.
        """
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise InputError("MLflow is not installed: pip install 'secateur[mlflow]'") from None
        self._client = MlflowClient(tracking_uri=self._config.tracking_uri)
        name, digest = self._config.experiment, hashlib.sha256(str(start.run.resolve()).encode()).hexdigest()
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`{RUN}` = '{digest}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=start.run.name, tags={RUN: digest}).info.run_id
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST]) for key, value in flat(start.config)]
        self._client.log_batch(self._run, params=params)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the values in one request."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, error: BaseException | None) -> None:
        """Say how the run ended."""
        ended = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._client.set_terminated(self._run, ended)


def flat(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with their places, such as ("search.agent", "greedy")."""
    for key, value in values.items():
        inner = f"{place}.{key}" if place else str(key)
        if isinstance(value, Mapping) and value:
            yield from flat(value, inner)
        else:
            yield inner, value

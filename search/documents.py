"""The schemas of the JSON documents of runs and exports: what must be there, and what names may be.

A document that was edited, or comes from somebody else, is refused with the place of the first mistake. Documents may hold more
than their schema names. Names that become names of folders are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError, model_validator

from secateur.envs.core import InputError
from secateur.envs.metric import Metric
from secateur.search.config.errors import reason_of
from secateur.search.config.plugins import check_options

Number = Annotated[StrictInt, Field(ge=0)]
Name = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]+$")]
Costs = dict[StrictStr, float]


def _check_metric(metric: dict[str, Any]) -> dict[str, Any]:
    check_options(Metric, "metric", metric)
    return metric


MetricEntry = Annotated[dict[str, Any], AfterValidator(_check_metric)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Score(_Part):
    score: float
    images: int


class _Scores(_Score):
    costs: Costs


class _Precision(_Part):
    dtype: StrictStr


class _ScoreCheck(_Part):
    policies: Number
    budget: Name
    correlation: float | None
    interval: tuple[float, float] | None
    seconds: float


class ManifestDocument(_Part):
    """manifest.json, as far as it is read again to build the problem."""

    config: dict[str, Any]
    dense: _Scores
    precision: _Precision
    score_check: _ScoreCheck | None = None


class _Policy(BaseModel):
    model_config = ConfigDict(extra="forbid")

    widths: list[Number]
    weight_bits: list[Number]
    activation_bits: list[Number]


class _Point(_Scores):
    evaluation: Number
    fits: list[Name]
    policy: _Policy
    choices: dict[StrictStr, float]


class _FinalPoint(_Scores):
    budget: Name
    evaluation: Number
    validation_score: float


class _Final(_Part):
    dense: _Scores | None
    points: list[_FinalPoint]


class _Rejected(_Part):
    evaluation: Number
    predicted_ms: float
    measured_ms: float


class _Check(_Part):
    passed: bool | None
    failures: list[StrictStr]
    export: Annotated[StrictStr, Field(pattern=r"^exports/[A-Za-z0-9_-]+$")] | None
    note: StrictStr | None
    rejected: list[_Rejected]


class _Budget(_Part):
    limits: Costs
    metric_drop: float | None
    front: list[Number]
    check: _Check | None = None


class _Searched(_Part):
    metric: MetricEntry
    split: StrictStr
    dense_score: float


class FrontDocument(_Part):
    """front.json. `search`, `device` and the checks are missing in runs of earlier versions."""

    metric: MetricEntry
    search: _Searched | None = None
    device: StrictStr | None = None
    objectives: Annotated[list[StrictStr], Field(min_length=1)]
    evaluations: Number
    dense: _Scores
    budgets: Annotated[dict[Name, _Budget], Field(min_length=1)]
    front: list[Number]
    points: list[_Point]
    final: _Final

    @model_validator(mode="after")
    def _points_are_there(self) -> FrontDocument:
        known = {point.evaluation for point in self.points}
        named = [*self.front, *(number for budget in self.budgets.values() for number in budget.front)]
        named += [point.evaluation for point in self.final.points]
        for number in named:
            if number not in known:
                raise InputError(f"`points` has no evaluation {number}, which the front names")
        priced: list[set[str]] = [set(self.dense.costs), *(set(point.costs) for point in self.points)]
        needed = {*self.objectives[1:], *(cost for budget in self.budgets.values() for cost in budget.limits)}
        if missing := sorted(needed - priced[0].intersection(*priced[1:])):
            raise InputError(f"the dense model or a point has no cost `{missing[0]}`")
        for point in self.points[1:]:
            if other := sorted(set(point.choices) ^ set(self.points[0].choices)):
                raise InputError(f"evaluation {point.evaluation} has other choices than the first point: `{other[0]}`")
        return self


class _Layer(_Part):
    name: StrictStr
    weight_bits: Number
    weight_shape: list[Number]
    activation_bits: Number
    activation_grid: dict[str, Any] | None


class _Model(_Part):
    factory: StrictStr
    args: dict[StrictStr, Any]
    input: list[Number]
    part: list[StrictStr] | None = None


class _BudgetEntry(_Part):
    name: Name
    limits: Costs
    metric_drop: float | None
    shares: Costs = {}


class _ExportScores(_Part):
    validation: _Score
    test: _Score | None
    dense_validation: _Score


class _Execution(_Part):
    name: StrictStr
    executed: StrictStr
    activation_bits: Number


def _required(value: Any) -> Any:
    """Return an entry that may be left out, but not be null."""
    if value is None:
        raise InputError("must not be null")
    return value


class PolicyDocument(_Part):
    """policy.json, as far as a model is built from it; `verify` needs what earlier versions did not write."""

    metric: MetricEntry
    model: _Model
    layers: list[_Layer]
    weights_sha256: StrictStr
    policy: _Policy | None = None
    budget: Annotated[_BudgetEntry | None, AfterValidator(_required)] = None
    costs: Costs = {}
    scores: Annotated[_ExportScores | None, AfterValidator(_required)] = None
    data_config: dict[StrictStr, Any] = {}
    device: dict[StrictStr, Any] | None = None
    execution: list[_Execution] = []
    files: dict[StrictStr, StrictStr] = {}


def check_document(document: Mapping[str, Any], schema: type[BaseModel], path: Path) -> None:
    """Raise InputError with the place of the first mistake, unless the document fits the schema; `path` is its file."""
    try:
        schema.model_validate(document)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"] if part != "[key]")
        reason = "is missing" if error["type"] == "missing" else str(reason_of(error))
        raise InputError(f"{path} is damaged: {f'`{place}`: ' if place else ''}{reason}.") from None

"""Budgets: named upper limits of costs, written as "<= 40%", "<= 250kB" or "<= 1.5ms"."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, PlainSerializer, PlainValidator, RootModel, model_validator

from secateur.cost_models.core import InputError
from secateur.cost_models.device import DEVICE_COSTS
from secateur.envs.metric import Metric, drop_name
from secateur.envs.tasks.imports import did_you_mean

DROP = "_drop"
"""End of the one name in a budget that is no cost, the largest loss of the metric: `metric_drop`, `top1_drop`, `miou_drop`, …"""
ANY_DROP = f"metric{DROP}"

_LIMIT = re.compile(r"(?:<=)?\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(%|[A-Za-z]*)")
_FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIMES = {"us": 1e-3, "ms": 1, "s": 1e3}  # in milliseconds
_ENERGIES = {"uJ": 1e-3, "mJ": 1, "J": 1e3}  # in millijoules
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNITS = {
    **{unit: ("", factor) for unit, factor in _FACTORS.items()},
    **{unit: ("bytes", factor) for unit, factor in _BYTES.items()},
    **{unit: ("ms", factor) for unit, factor in _TIMES.items()},
    **{unit: ("mj", factor) for unit, factor in _ENERGIES.items()},
}
"""{unit as the user writes it: (`Limit.unit`, factor)}."""
_MEASURES = {"bytes": "in bytes", "ms": "in time", "mj": "in joules"}


@dataclass(frozen=True)
class Limit:
    """An upper limit of one cost.

    Attributes:
        value: a fraction of the dense model's cost if `relative`, else the cost itself.
        relative: whether the limit was given in percent.
        unit: "%", "bytes", "ms", "mj", or "" for a plain number.
        text: the limit as the user wrote it.
    """

    value: float
    relative: bool
    unit: str
    text: str


def parse_limit(text: Any) -> Limit:
    """Return the limit that a text such as "<= 40%", "<= 250kB", "<= 1.5ms" or "<= 1.5 M" means; a number stands for itself.

    Raises:
        InputError: if the text is not an upper limit.
    """
    match = _LIMIT.fullmatch(str(text).strip()) if isinstance(text, str | int | float) else None
    if match is None or isinstance(text, bool):
        raise InputError(f'a limit must read like "<= 40%", "<= 250kB", "<= 1.5ms" or "<= 1.5M" (got {text!r})')
    number, written = float(match[1]), match[2]
    if written != "%" and written not in _UNITS:
        raise InputError(f"unknown unit `{written}` (got {text!r}). Known: {', '.join(['%', *filter(None, _UNITS)])}")
    if not math.isfinite(number):
        raise InputError(f"a limit must be finite (got {text!r})")
    if written == "%":
        return Limit(number / 100, True, "%", str(text))
    unit, factor = _UNITS[written]
    return Limit(number * factor, False, unit, str(text))


def split_limits(text: str) -> dict[str, str]:
    """Return {cost: limit} of a text such as "macs<=43%,weight_bytes<=20kB".

    Raises:
        InputError: if the text does not read so.
    """
    pairs = [part.partition("<=") for part in text.split(",") if part.strip()]
    if not pairs or not all(sign and name.strip() and limit.strip() for name, sign, limit in pairs):
        raise InputError(f'must read like "macs<=43%,weight_bytes<=20kB", but got {text!r}')
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise InputError(f"limits a cost twice: {text!r}")
    return {name: f"<= {limit.strip()}" for name, (_, _, limit) in zip(names, pairs, strict=True)}


def budget_override(text: str) -> str:
    """Return the override that adds the budget of a text such as "phone=macs<=43%,weight_bytes<=20kB".

    Raises:
        InputError: if the text does not read so.
    """
    name, equals, limits = text.partition("=")
    if not equals or not name.strip() or limits.startswith("=") or name.endswith("<"):
        raise InputError(f'`--budget` must read like "phone=macs<=43%,weight_bytes<=20kB", but got {text!r}.')
    try:
        return f"budgets.{name.strip()}={json.dumps(split_limits(limits))}"
    except InputError as error:
        raise InputError(f"`--budget {text}`: the limits of a budget {error}.") from None


def _check_cost_name(name: str) -> str:
    from secateur.cost_models import COST_MODELS

    known = [*COST_MODELS, *DEVICE_COSTS, ANY_DROP]
    if name not in known and not name.endswith(DROP):
        raise InputError(f"unknown cost.{did_you_mean(name, known)} Known: {', '.join(known)}")
    return name


class BudgetConfig(
    RootModel[
        dict[
            Annotated[str, AfterValidator(_check_cost_name)],
            Annotated[Limit, PlainValidator(parse_limit), PlainSerializer(lambda limit: limit.text)],
        ]
    ]
):
    """The limits of one device: {cost: limit}, and optionally the largest loss of the metric.

    The loss is called `metric_drop`, or has the metric's own name: `top1_drop`, `miou_drop`, `psnr_drop`. It is in percentage
    points for metrics in percent, otherwise in the metric's unit.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _check(self) -> BudgetConfig:
        if not self.root:
            raise InputError('a budget must limit something, for example macs: "<= 40%"')
        drops = [name for name in self.root if name.endswith(DROP)]
        if len(drops) > 1:
            raise InputError(f"a budget can limit the loss of one metric, but this one has {' and '.join(drops)}")
        for name, limit in self.root.items():
            if name in drops and limit.unit:
                raise InputError(
                    f'`{name}` is in percentage points, or in the metric\'s unit: write "<= 1.5" (got {limit.text!r})'
                )
            if name not in drops and limit.value <= 0:
                raise InputError(f"the limit of `{name}` must be above zero (got {limit.text!r})")
            if limit.unit in _MEASURES and not name.endswith(f"_{limit.unit}"):
                raise InputError(f"`{name}` is not measured {_MEASURES[limit.unit]} (got {limit.text!r})")
        return self

    @property
    def limits(self) -> dict[str, Limit]:
        """{cost: limit}."""
        return {name: limit for name, limit in self.root.items() if not name.endswith(DROP)}

    def metric_drop(self, metric: Metric) -> float | None:
        """Return the largest allowed loss of the metric in its own unit (percent as a fraction), or None.

        Raises:
            InputError: if the budget limits the loss of another metric, or more than the whole range.
        """
        name = next((name for name in self.root if name.endswith(DROP)), None)
        if name is None:
            return None
        if name not in (ANY_DROP, drop_name(metric)):
            raise InputError(f"The budget limits `{name}`, but the metric is `{metric.name}`: write `{drop_name(metric)}`.")
        value = self.root[name].value
        if metric.unit == "%" and value > 100:
            raise InputError(f'`{name}` is in percentage points: write "<= 1.5" (got {self.root[name].text!r}).')
        return value / 100 if metric.unit == "%" else value

"""Declared ranges of configuration fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest

from secateur.cost_models.core import Count, InputError, Positive, Range, check_fields


@dataclass(frozen=True)
class Base:
    share: Annotated[float, Range(least=0, most=1)] = 0.5
    free: float = math.inf

    def __post_init__(self) -> None:
        check_fields(self, "the example")


@dataclass(frozen=True)
class Example(Base):
    kind: ClassVar[str] = "example"
    count: Count = 1
    damping: Positive = 0.1
    angle: Annotated[float, Range(least=0, below=1)] = 0
    optional: Annotated[int | None, Range(least=2)] = None
    bits: Annotated[tuple[int, ...], Range(least=2, most=31)] = ()
    rates: Annotated[dict[str, float], Range(above=0)] = field(default_factory=dict)
    clip: Literal["mse", "max"] = "mse"


def test_values_at_included_ends_are_allowed():
    found = Example(share=0, count=1, damping=1e-9, angle=0.999, optional=2, bits=(2, 31), rates={"int8": 1e-9}, clip="max")
    assert (found.share, found.bits, found.optional) == (0, (2, 31), 2) and Example(share=1).share == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "`share` of the example must be in [0, 1], but got 1.5."),
        ({"share": -0.1}, "`share` of the example must be in [0, 1], but got -0.1."),
        ({"count": 0}, "`count` of the example must be at least 1, but got 0."),
        ({"damping": 0.0}, "`damping` of the example must be above 0, but got 0.0."),
        ({"damping": math.inf}, "`damping` of the example must be finite and above 0, but got inf."),
        ({"damping": math.nan}, "`damping` of the example must be finite and above 0, but got nan."),
        ({"angle": 1}, "`angle` of the example must be in [0, 1), but got 1."),
        ({"optional": 1}, "`optional` of the example must be at least 2, but got 1."),
        ({"bits": (4, 32)}, "`bits` of the example must be in [2, 31], but got 32."),
        ({"rates": {"float32": 1, "int8": 0}}, "`rates.int8` of the example must be above 0, but got 0."),
        ({"clip": "mean"}, '`clip` of the example must be "mse" or "max", but got "mean".'),
    ],
)
def test_other_values_are_rejected_with_the_rule_and_the_value(options, message):
    with pytest.raises(InputError) as error:
        Example(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("allowed", "words"),
    [(Range(), "finite"), (Range(most=3), "at most 3"), (Range(below=3), "below 3"), (Range(above=0, most=1), "in (0, 1]")],
)
def test_a_range_in_words(allowed, words):
    assert str(allowed) == words

"""Mutations of valid files, drawn by hypothesis: the same ones in every run."""

from __future__ import annotations

import copy
import traceback

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from secateur.cost_models.core import InputError

EXAMPLES = 20
ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "../../x",
    "os:system",
    "x" * 300,
    "\0",
    [],
    {},
    [[]],
    {"a": 1},
)


def example(count=EXAMPLES):
    """Draw mutations, the same ones in every run."""
    unhurried = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = (Phase.explicit, Phase.generate)  # a smaller example is not worth minutes
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=unhurried
    )


@st.composite
def changed_bytes(draw, content):
    """The content with some bytes replaced, removed, repeated or inserted."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(start + draw(st.sampled_from((0, 1, 2, 8, 100, 10**6))), len(content))
        replaced = (draw(st.binary(max_size=4)), bytes(content[start:end]) * 2, b"[" * 1200, b"9" * 5000, b"\n", b"\xff")
        content[start:end] = draw(st.sampled_from(replaced))
    return bytes(content)


@st.composite
def changed_values(draw, document):
    """A JSON document with some values replaced or removed."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        at = document
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 3)):
                at = at[key]
                continue
            if draw(st.integers(0, 3)):
                at[key] = copy.deepcopy(draw(st.sampled_from(ODD)))  # a later change must not reach ODD itself
            else:
                del at[key]
            break
    return document


def broken(read, *others):
    """Call `read`. Return "" if it succeeds or raises InputError with a sentence, or one of the `others`; else the traceback."""
    try:
        read()
    except InputError as error:
        return "" if str(error).strip() else "an error without a sentence"
    except others:
        return ""
    except Exception:
        return traceback.format_exc()
    return ""

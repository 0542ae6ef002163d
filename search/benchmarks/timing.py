"""Wall-clock seconds of calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def timed(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> tuple[float, Result]:
    """Return the seconds of a call and its result; work that a GPU was given before is not counted, that of the call is."""
    _finish()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    _finish()
    return time.perf_counter() - start, result


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], object], repeats: int, warm_up: int = 0) -> float:
    """Return the median seconds of `repeats` calls, after `warm_up` calls that are not timed."""
    for _ in range(warm_up):
        call()
    return float(np.median([timed(call)[0] for _ in range(repeats)]))

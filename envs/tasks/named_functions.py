"""The functions of a task by name: what a configuration says with "package.module:function" in place of Python objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from secateur.cost_models.core import InputError, Range, check_fields
from secateur.envs.metric import Metric
from secateur.envs.tasks.imports import import_object

FUNCTIONS = "functions"
"""Name of the task whose functions are named one by one, and of its data."""

CALLED_LATER = ("evaluate", "test", "loss", "divergence")
"""Options that name functions; the others name functions without arguments that return something, or the thing itself."""


@dataclass(frozen=True)
class FunctionsConfig:
    """A task of the user's own functions, each "package.module:function".

    Attributes:
        calibration: function without arguments that returns a loader or list of batches, or the loader itself: inputs, or tuples
            that begin with the inputs.
        evaluate: function of a model that returns one number; None: the score is the divergence from the dense model.
        test: the same for the finalists, on other data; None: `evaluate`.
        metric: what `evaluate` returns: {name, higher_is_better, unit, worst, best}, or the name of a `secateur.Metric`.
        loss: function of a model and a batch (inputs, targets) that returns the training loss; some importances need it.
        divergence: function of the dense model's outputs and another's that returns one number per sample.
        inputs: function without arguments that returns example inputs, or the inputs themselves; None: one tensor of the shape
            `model.input`.
        samples: calibration samples that are read.
    """

    calibration: str | None = None
    evaluate: str | None = None
    test: str | None = None
    metric: Any = None
    loss: str | None = None
    divergence: str | None = None
    inputs: str | None = None
    samples: Annotated[int, Range(1)] = 512

    def __post_init__(self) -> None:
        check_fields(self)
        if self.calibration is None:
            raise InputError('`calibration` is missing: name a function that returns a loader, as "package.module:function"')
        if self.evaluate is not None and self.metric is None:
            raise InputError("`evaluate` needs `metric`, for example {name: miou, higher_is_better: true}")
        if self.evaluate is None and (self.test is not None or self.metric is not None):
            raise InputError("`test` and `metric` need `evaluate`: without it, the score is the divergence from the dense model")

    @property
    def names(self) -> dict[str, str]:
        """{option: "package.module:function"} of every option that names something."""
        return {option: name for option, name in asdict(self).items() if isinstance(name, str)}


def find_functions(config: FunctionsConfig) -> dict[str, Any]:
    """Return {option: function, or what it returns}, for all options but `samples`; None where there is none.

    Raises:
        InputError: if a name leads nowhere, or to something that cannot be used.
    """
    found: dict[str, Any] = dict.fromkeys((*CALLED_LATER, "calibration", "metric", "inputs"))
    for option, name in config.names.items():
        _, found[option] = import_object(name, f"task.{option}")
        if option in CALLED_LATER and not callable(found[option]):
            raise InputError(f"`task.{option}: {name}` must be a function, but is {type(found[option]).__name__}.")
        if option not in CALLED_LATER and callable(found[option]):
            found[option] = _called(found[option], f"task.{option}: {name}")
    if isinstance(config.metric, Mapping):
        found["metric"] = Metric(**config.metric)
    elif config.metric is not None and not isinstance(found["metric"], Metric):
        kind = type(found["metric"]).__name__
        raise InputError(f"`task.metric: {config.metric}` must be a secateur.Metric, or return one, but is {kind}.")
    return found


def _called(function: Callable[[], Any], place: str) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:  # the user's function runs arbitrary code
        raise InputError(f"`{place}` failed without arguments: {type(error).__name__}: {error}") from error

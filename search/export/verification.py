"""The result of checking an export: its parts, and verify.json, which holds it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.search.run.folder import read_json
from secateur.search.schema import SCHEMA

VERIFY = "verify.json"


@dataclass(frozen=True)
class Outputs:
    """The outputs of the ONNX file beside those of the network in PyTorch, on the test images.

    Attributes:
        images: number of samples.
        max_difference, mean_difference: of the outputs, absolute, in standard deviations of each output tensor.
        agreement: share of samples, or of their pixels, with the same answer; None: the outputs are no choices.
        pytorch_score, runtime_score: the metric of both.
        recorded_score: of the network in PyTorch according to policy.json; None: not recorded.
        exact: whether both compute in float32; then the outputs are judged, else answers and score.
        allowed_loss: of the score, where it is judged.
    """

    images: int
    max_difference: float
    mean_difference: float
    agreement: float | None
    pytorch_score: float
    runtime_score: float
    recorded_score: float | None
    exact: bool
    allowed_loss: float


@dataclass(frozen=True)
class Cost:
    """A cost in policy.json, and the same cost computed from the loaded network; None: unknown for such layers."""

    name: str
    promised: float
    found: float | None


@dataclass(frozen=True)
class MeasuredLatency:
    """Milliseconds for one run: median, 10 % and 90 % quantiles of the export and of the dense float32 network.

    Attributes:
        promised: predicted by the device file of the search; None: the search had no device.
        measured_here: whether that device is this machine, runtime and number of threads.
    """

    milliseconds: float
    low: float
    high: float
    dense_milliseconds: float
    dense_low: float
    dense_high: float
    repeats: int
    promised: float | None
    measured_here: bool


@dataclass(frozen=True)
class LimitCheck:
    """A limit of the budget and the value that was found.

    Attributes:
        name: of the cost, or of the loss of the metric, such as "top1_drop".
        limit: the largest allowed value.
        found: None: it cannot be determined here.
        how: how `found` was determined.
    """

    name: str
    limit: float
    found: float | None
    how: str

    @property
    def kept(self) -> bool | None:
        """Whether the limit is kept; None: it cannot be determined here."""
        return None if self.found is None else self.found <= self.limit

    @property
    def margin(self) -> float | None:
        """The unused share of the limit; negative if the limit is broken."""
        return None if self.found is None or not self.limit else 1 - self.found / self.limit


@dataclass(frozen=True)
class Verification:
    """The result; verify.json holds it.

    Attributes:
        runtime, runtime_version, threads: what executed model.onnx.
        machine: the processor, its cores and the operating system.
        budget: name of the budget.
        files: bytes of each file.
        outputs, costs, latency, limits: see their classes.
        failures: one sentence for every broken promise.
        metric: fields of the metric.
    """

    runtime: str
    runtime_version: str
    threads: int
    machine: dict[str, str]
    budget: str
    files: dict[str, int]
    outputs: Outputs
    costs: tuple[Cost, ...]
    latency: MeasuredLatency
    limits: tuple[LimitCheck, ...]
    failures: tuple[str, ...]
    metric: dict[str, Any]
    schema: int = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether every limit and tolerance is kept."""
        return not self.failures


def write_verification(folder: Path, verification: Verification) -> None:
    """Write verify.json into the folder of an export; an existing one is replaced."""
    path = folder / VERIFY
    try:
        replace_file(path, json.dumps(asdict(verification), indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror}. Copy the export to a folder that you can write to."
        ) from None


def read_verification(folder: str | Path) -> Verification:
    """Return the content of verify.json in the folder of an export.

    Raises:
        InputError: if the export was not verified, or the file is damaged.
    """
    path = Path(folder) / VERIFY
    values = read_json(path, "a verified export")
    try:
        return TypeAdapter(Verification).validate_python(values)
    except ValidationError as errors:
        raise InputError(f"{path} is damaged: {errors.errors(include_url=False)[0]['msg']}.") from None

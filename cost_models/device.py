"""Device files: speed and energy of a device, measured or from data sheets, and their cost models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os.path import exists, isfile
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from secateur.cost_models.core import FLOAT_BITS, CostModel, InputError, Range, check_fields
from secateur.cost_models.energy import CountedEnergy, Energy
from secateur.cost_models.latency_table import LatencyTable, TableLatency
from secateur.cost_models.precision import executed_precision, precision_name
from secateur.cost_models.reading import parse_json, read_text
from secateur.cost_models.roofline import Roofline, RooflineLatency
from secateur.cost_models.traffic import Traffic

__all__ = ["DEVICE_COSTS", "SHIPPED", "Device", "executed_precision", "parse_device", "read_device", "write_device"]

SCHEMA = 1
DEVICE_COSTS = ("latency_ms", "energy_mj")
"""All costs that depend on a device."""

SHIPPED = Path(__file__).resolve().parents[1] / "configs" / "devices"
"""The analytic devices that are installed with the package."""


FloatPrecision = Literal["float32", "float16", "bfloat16"]
"""Number format of layers that are not executed in integers."""


@dataclass(frozen=True)
class Device:
    """The description of a device.

    Attributes:
        schema: version of the format.
        name: e.g. "Jetson Xavier NX, GPU, 15 W".
        kind: "measured": `table` was measured on the device; "analytic": the figures are from data sheets.
        sources: sources of the figures, with the calculations.
        machine: processor, cores and system of the measured machine; empty if analytic.
        float_precision: precision of layers that are not executed in integers.
        integer_bits: bit-widths of its integer kernels.
        table: measured latencies; None if analytic.
        roofline: peak rates; None if measured, or if only energy figures exist.
        energy: energy figures; None if there are none.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # also for the dataclasses within

    schema: int
    name: str
    kind: Literal["measured", "analytic"]
    sources: tuple[str, ...]
    float_precision: FloatPrecision
    integer_bits: Annotated[tuple[int, ...], Range(least=2, most=FLOAT_BITS - 1)] = ()
    machine: dict[str, str] = field(default_factory=dict)
    table: LatencyTable | None = None
    roofline: Roofline | None = None
    energy: Energy | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.schema != SCHEMA:
            raise InputError(f"it has schema {self.schema}; this version reads schema {SCHEMA}")
        if self.kind == "measured" and self.table is None:
            raise InputError("a measured device needs a `table`; profiling the device writes one")
        if self.kind == "analytic" and self.table is not None:
            raise InputError("an analytic device has no `table`: write `kind: measured`")
        if self.kind == "analytic" and self.roofline is None and self.energy is None:
            raise InputError("an analytic device needs a `roofline`, or `energy` figures")
        if self.table is not None and self.table.float_precision != self.float_precision:
            raise InputError(
                f"`table.float_precision` is {self.table.float_precision}, but that of the device is {self.float_precision}"
            )
        figures = {
            "roofline.macs_per_second": None if self.roofline is None else self.roofline.macs_per_second,
            "energy.mac_pj": None if self.energy is None else self.energy.mac_pj,
        }
        for place, rates in figures.items():
            missing = [name for name in self.precisions if rates is not None and name not in rates]
            if missing:
                raise InputError(f"`{place}` has no figure for {missing[0]}, in which the device executes layers")

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions in which it executes layers, e.g. ("int8", "float32")."""
        return tuple(precision_name(bits, self.float_precision) for bits in (*self.integer_bits, FLOAT_BITS))

    @property
    def label(self) -> str:
        """The source of its latencies, in a few words."""
        if self.table is None:
            return f"analytic: {self.name}"
        threads = f"{self.table.threads} thread{'s' * (self.table.threads != 1)}"
        processor = self.machine.get("processor", self.name)
        return f"measured on {processor}, {self.table.runtime} {self.table.runtime_version}, {threads}"

    def cost_models(self) -> dict[str, CostModel]:
        """Return {cost: model} of the device: `latency_ms`, `energy_mj` or both."""
        traffic = Traffic(self.float_precision, self.integer_bits)
        models: dict[str, CostModel] = {}
        if self.table is not None:
            models["latency_ms"] = TableLatency(self.table, self.integer_bits)
        elif self.roofline is not None:
            models["latency_ms"] = RooflineLatency(self.roofline, traffic)
        if self.energy is not None:
            models["energy_mj"] = CountedEnergy(self.energy, traffic)
        return models

    def document(self) -> dict[str, Any]:
        """Return the content of its file, JSON values only."""
        return json.loads(json.dumps(asdict(self)))


def read_device(path: str | Path) -> Device:
    """Return the device in a JSON file.

    Args:
        path: relative to the working directory; if there is no such file, the shipped one of that name is read.
    Raises:
        InputError: if there is no such file, or it is no device file; one sentence with the file and the place in it.
    """
    file = find_device_file(path)
    try:
        values = parse_json(read_text(file), str(path))
    except InputError as error:
        raise InputError(f"{error} Profile the device again.") from None
    return parse_device(values, str(path))


def find_device_file(path: str | Path) -> Path:
    """Return the file itself or the shipped one; see `read_device`."""
    path = Path(path).expanduser()
    shipped = {f"configs/devices/{file.name}": file for file in sorted(SHIPPED.glob("*.json"))}
    if not exists(path) and path.as_posix() in shipped:
        return shipped[path.as_posix()]
    if not isfile(path):
        missing = f"{path}: there is no such device file."
        rest = f"measures this machine; these come with the package: {', '.join(shipped)}"
        raise InputError(
            f'{missing} `secateur.profile(config, output="{path.name}")` {rest}',
            f"{missing} `secateur profile CONFIG --output {path.name}` {rest}",
        )
    return path


def parse_device(values: Any, source: str) -> Device:
    """Return the device that plain dicts describe; `source` names them in errors.

    Raises:
        InputError: one sentence.
    """
    # Imported here, because pydantic is slow to import and not needed otherwise.
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping) or "schema" not in values:
        raise InputError(f"{source} is no device file: it has no `schema`.")
    if values["schema"] != SCHEMA:
        raise InputError(f"{source} has schema {values['schema']}; this version reads schema {SCHEMA}. Profile the device again.")
    try:
        return TypeAdapter(Device).validate_python(values)
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
    place = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        reason = "unknown key"
    elif error["type"] in ("missing", "missing_argument"):
        reason = "is missing"
    elif error["type"] == "value_error":
        reason = str(error["ctx"]["error"]).rstrip(".")
    else:
        reason = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    raise InputError(f"{source}: {place}: {reason}." if place else f"{source}: {reason}.")


def write_device(device: Device, path: str | Path) -> None:
    """Write a device file; an existing one is replaced."""
    Path(path).write_text(json.dumps(device.document(), indent=1) + "\n", encoding="utf-8")

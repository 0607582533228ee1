"""What may be fitted: `Parameter`, a field of the cluster with its bounds and the reason for them.

`load_parameters` reads a YAML file of them, `default_parameters` the packaged one for scenarios with one device type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from epsim.errors import InputError, ScenarioError
from epsim.scenario.base import StrictModel
from epsim.scenario.describe import describe
from epsim.scenario.fields import ClusterField
from epsim.scenario.yaml_text import parse_yaml


class ParameterError(InputError):
    """A parameter to be fitted, or the file of them, is wrong: edit the YAML."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A field of the cluster that may lie from low to high, in SI units; log: searched by its logarithm.

    Raises ParameterError when the bounds are no range.
    """

    field: str
    low: float
    high: float
    log: bool
    reason: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ParameterError(f"{self.field}: low {self.low:g} is not below high {self.high:g}; write a range")
        if self.log and self.low <= 0:
            raise ParameterError(
                f"{self.field}: low {self.low:g} has no logarithm; write one above 0, or scale: linear"
            )

    def to_unit(self, value: float) -> float:
        """Return where a value lies from low (0) to high (1), by the parameter's scale; values outside are clipped."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def from_unit(self, at: float) -> float:
        """Return the value at a place from 0 to 1; never outside the bounds."""
        if self.log:
            value = self.low * math.exp(at * math.log(self.high / self.low))
        else:
            value = self.low + at * (self.high - self.low)
        return min(max(value, self.low), self.high)


class _Entry(StrictModel):
    field: str
    low: Any
    high: Any
    scale: Literal["linear", "log"] = "linear"
    reason: Annotated[str, Field(min_length=1)]


class _File(StrictModel):
    parameters: Annotated[list[_Entry], Field(min_length=1)]


def load_parameters(path: Path) -> tuple[Parameter, ...]:
    """Return the parameters of a YAML file; ParameterError with path, value and rule where one is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ParameterError(f"{path}: cannot be read: {error.strerror}; write the path of a parameter file") from error
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path}: not a text file in UTF-8; write a parameter file in YAML") from error
    return parse_parameters(text, str(path))


def parse_parameters(text: str, name: str) -> tuple[Parameter, ...]:
    """Return the parameters of the text of a YAML file; name: of the file, for messages."""
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise ParameterError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ParameterError(f"{name}: not a mapping; write parameters: [{{field: ..., low: ..., high: ...}}]")
    try:
        entries = _File.model_validate(raw).parameters
    except ValidationError as error:
        raise ParameterError(f"{name}: {describe(error, raw, _File)}") from error
    parameters = tuple(_parameter(f"{name}: parameters[{i}]", entry) for i, entry in enumerate(entries))
    fields = [parameter.field for parameter in parameters]
    for i, field in enumerate(fields):
        if field in fields[:i]:
            raise ParameterError(f"{name}: parameters[{i}].field: {field} is there twice; write it once")
    return parameters


def _parameter(where: str, entry: _Entry) -> Parameter:
    try:
        field = ClusterField(path=entry.field)
    except ScenarioError as error:
        raise ParameterError(f"{where}.field: {error}") from error
    bounds = {}
    for end, value in (("low", entry.low), ("high", entry.high)):
        try:
            bounds[end] = field.parse(value)
        except ValueError as error:
            raise ParameterError(f"{where}.{end}: {error}") from error
    try:
        return Parameter(field=entry.field, log=entry.scale == "log", reason=entry.reason, **bounds)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from error


def default_parameters(device_types: Sequence[str]) -> tuple[Parameter, ...]:
    """Return the host-bound parameters of the one device type of a scenario, with the packaged bounds and reasons."""
    if len(device_types) != 1:
        raise ParameterError(
            f"cluster.device_types: {', '.join(device_types)} are several; write --parameters FILE with what to fit"
        )
    text = (files("epsim") / "presets" / "parameters" / "host.yaml").read_text(encoding="utf-8")
    return parse_parameters(text.replace("<type>", device_types[0]), "presets/parameters/host.yaml")

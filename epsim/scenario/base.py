"""What every YAML model shares: `StrictModel` (no unknown fields, frozen) and fields that parse units.

Fields such as `Rate` accept text with a unit ("10 Gbit/s") and hold SI floats; a dump with mode="json" writes text
with a unit again, which gives exactly the same float. Ranges are wide, but keep sums and products finite.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from epsim import units


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown fields, silent type changes and later mutation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _parser(quantity: units.Quantity, low: float, high: float) -> BeforeValidator:
    limits = " to ".join(units.format_quantity(limit, quantity) for limit in (low, high))

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, str):
            raise ValueError(f'{value!r} is not {quantity.noun}; write e.g. "{quantity.example}"')
        number = units.parse(value, quantity)
        if not low <= number <= high:
            raise ValueError(f'"{value}" is not from {limits}; write e.g. "{quantity.example}"')
        return number

    return BeforeValidator(parse, json_schema_input_type=str)


def _writer(quantity: units.Quantity) -> PlainSerializer:
    def write(value: float) -> str:
        return units.format_quantity(value, quantity)

    return PlainSerializer(write, return_type=str, when_used="json")


Rate = Annotated[float, _parser(units.RATE, 1.0, 1e18), _writer(units.RATE)]  # bytes/s
Size = Annotated[float, _parser(units.SIZE, 1.0, 1e18), _writer(units.SIZE)]  # bytes
SizeOrZero = Annotated[float, _parser(units.SIZE, 0.0, 1e18), _writer(units.SIZE)]  # bytes
FlopRate = Annotated[float, _parser(units.FLOP_RATE, 1.0, 1e21), _writer(units.FLOP_RATE)]  # FLOP/s
Time = Annotated[float, _parser(units.TIME, 0.0, 1e6), _writer(units.TIME)]  # s
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]

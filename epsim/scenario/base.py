"""What every YAML model shares: `StrictModel` (no unknown fields, frozen) and fields that parse units.

Fields such as `Rate` accept text with a unit ("10 Gbit/s") and hold SI floats.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from epsim import units


class StrictModel(BaseModel):
    """A pydantic model that refuses unknown fields, silent type changes and later mutation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _parser(quantity: units.Quantity) -> BeforeValidator:
    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, str):
            raise ValueError(f'{value!r} is not {quantity.noun}; write e.g. "{quantity.example}"')
        return units.parse(value, quantity)

    return BeforeValidator(parse, json_schema_input_type=str)


_positive = Field(gt=0)
_non_negative = Field(ge=0)

Rate = Annotated[float, _positive, _parser(units.RATE)]  # bytes/s
Size = Annotated[float, _positive, _parser(units.SIZE)]  # bytes
FlopRate = Annotated[float, _positive, _parser(units.FLOP_RATE)]  # FLOP/s
Time = Annotated[float, _non_negative, _parser(units.TIME)]  # s
Fraction = Annotated[float, Field(gt=0, le=1, strict=False)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]

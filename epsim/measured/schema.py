"""What a file of measured runs must hold: `check_content`, field by field, then what fields say of each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from epsim.errors import InputError
from epsim.scenario.describe import describe

_LONGEST_S = 1e6
_FEWEST_SIZES = 3
Seconds = Annotated[float, Field(gt=0, le=_LONGEST_S)]
SecondsOrZero = Annotated[float, Field(ge=0, le=_LONGEST_S)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Parts = list[list[SecondsOrZero]]


class _Part(BaseModel):
    """Other fields are for people to read."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Median(_Part):
    s: Annotated[float, Field(ge=-_LONGEST_S, le=_LONGEST_S)]  # a half of a difference: noise may make it negative


class _Size(_Part):
    num_bytes: AtLeastOne = Field(alias="bytes")
    one_way: _Median
    both_ways: _Median
    send: _Median
    receive: _Median


class _Pair(_Part):
    pair: Annotated[list[Count], Field(min_length=2, max_length=2)]
    cells: Annotated[list[_Size], Field(min_length=1)]
    goodput_bytes_per_s: Positive


class _DryStep(_Part):
    sync: Seconds
    async_: Seconds = Field(alias="async")
    two_batch: Seconds


class _Raw(_Part):
    way: Literal["sleep", "spin"]
    pairs: Annotated[list[_Pair], Field(min_length=1)]
    barrier: _Median
    dry_step_s: _DryStep
    interference_s_per_byte: SecondsOrZero | None


class _Shape(_Part):
    bandwidth: Positive
    burst: Positive


class _Network(_Part):
    key: str
    raw: _Raw
    shapes: list[_Shape] | None


class _Cell(_Part):
    step_s: Annotated[list[Annotated[list[Seconds], Field(min_length=1)]], Field(min_length=1)]
    kv_s: list[SecondsOrZero]
    num_repeated: Count
    foreign_cpu_frac: list[float] = []
    sent_bytes_RR: list[list[Annotated[float, Field(ge=0)]]] = []
    parts: list[str]
    prefill_parts_s_RP: Parts
    decode_parts_s_RP: Parts | None


class _Launch(_Part):
    machine: dict[str, Any]
    cells: dict[str, _Cell]


class _Options(_Part):
    emulated: bool
    dilation: Annotated[float, Field(ge=1, le=1000)]
    shaped: bool
    num_launches: AtLeastOne
    num_runs: AtLeastOne


class _Content(_Part):
    scenario: dict[str, Any]
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]]
    options: _Options
    machine: dict[str, Any]
    networks: list[_Network]
    launches: list[_Launch]


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Raise InputError, one line with the path of the field, if measured runs cannot be what a file holds."""
    try:
        checked = _Content.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error, content, _Content, 'measured runs')}") from error
    for i, network in enumerate(checked.networks):
        for p, pair in enumerate(network.raw.pairs):
            if len({size.num_bytes for size in pair.cells}) < _FEWEST_SIZES:
                raise InputError(
                    f"{path}: networks[{i}].raw.pairs[{p}].cells: has {len(pair.cells)} sizes of messages, too "
                    "few for a line; measure the grid again"
                )
    for i, launch in enumerate(checked.launches):
        for number, cell in launch.cells.items():
            where = f"{path}: launches[{i}].cells.{number}"
            num_runs = checked.options.num_runs
            if len(cell.step_s) != num_runs or len(cell.kv_s) != num_runs:
                raise InputError(
                    f"{where}: has {len(cell.step_s)} runs in step_s and {len(cell.kv_s)} in kv_s, and "
                    f"options.num_runs is {num_runs}; measure the grid again"
                )
            lengths = {len(steps) for steps in cell.step_s}
            if len(lengths) > 1:
                raise InputError(
                    f"{where}.step_s: runs have {sorted(lengths)} steps, not all as many; measure it again"
                )
            _check_parts(cell, where)


def _check_parts(cell: _Cell, where: str) -> None:
    for name in ("prefill_parts_s_RP", "decode_parts_s_RP"):
        for r, row in enumerate(getattr(cell, name) or []):
            if len(row) != len(cell.parts):
                raise InputError(
                    f"{where}.{name}[{r}]: has {len(row)} times for {len(cell.parts)} parts; measure the grid again"
                )
    missing = {"experts", "remote", "shared"} - set(cell.parts)
    if missing:
        raise InputError(f"{where}.parts: lacks {', '.join(sorted(missing))}; measure the grid again")

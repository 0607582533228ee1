"""Measured latencies as people write them: a CSV file to `MeasuredRow`s, and which rows are compared (`Compare`).

A row is one batch size of one scenario: `batch_size`, `ttft_s` and `tpot_s` in seconds (means over the requests), and
in every other column the path of a scenario field as `--set` takes it. `note` is for people.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.errors import InputError, ScenarioError
from epsim.scenario import split_override
from epsim.scenario.yaml_text import parse_yaml

METRICS = ("ttft_s", "tpot_s")
_OWN_COLUMNS = ("batch_size", *METRICS, "note")
Floats = npt.NDArray[np.float64]


class MeasuredError(InputError):
    """The table of measurements, or what is asked of it, is wrong: edit the CSV or the option."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """Measured means of one batch size. settings: (path, value) of scenario fields, in the order of the columns."""

    settings: tuple[tuple[str, Any], ...]
    batch_size: int
    ttft_s: float | None
    tpot_s: float | None

    def get(self, column: str) -> Any:
        """Return the row's value in a column, None where it leaves the scenario as it is."""
        return self.batch_size if column == "batch_size" else dict(self.settings).get(column)

    @property
    def label(self) -> str:
        """The row in words, for tables."""
        return ", ".join([*(str(value) for _, value in self.settings), f"batch {self.batch_size}"])


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Which rows stand beside which: every row beside its equal whose `column` has the baseline's value."""

    column: str
    value: Any


def read_measured(path: Path) -> tuple[MeasuredRow, ...]:
    """Return the rows of a CSV file; MeasuredError with row and column where one is wrong."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = [(reader.line_num, cells) for reader in [csv.reader(file, strict=True)] for cells in reader]
    except OSError as error:
        raise MeasuredError(f"{path}: cannot be read: {error.strerror}; write the path of a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise MeasuredError(f"{path}: not a CSV file in UTF-8 ({error}); write one with a line of names") from error
    lines = [(number, cells) for number, cells in lines if any(cell.strip() for cell in cells)]
    if len(lines) < 2:
        raise MeasuredError(f"{path}: holds no measurements; write a line of names and a line per measurement")
    names = _names(path, [cell.strip() for cell in lines[0][1]])
    rows = tuple(_row(f"{path}, line {number}", names, cells) for number, cells in lines[1:])
    _refuse_twins(path, rows, [number for number, _ in lines[1:]])
    return rows


def _names(path: Path, names: list[str]) -> list[str]:
    for name in names:
        if not name:
            raise MeasuredError(f"{path}, line 1: a column has no name; write batch_size, or a field's path")
        if names.count(name) > 1:
            raise MeasuredError(f'{path}, line 1: the column "{name}" is there twice; write it once')
    if "workload.batch_sizes" in names:
        raise MeasuredError(
            f"{path}, line 1: workload.batch_sizes cannot be a column; write batch_size, one for each row"
        )
    if "batch_size" not in names:
        raise MeasuredError(f"{path}, line 1: the column batch_size is missing; write it")
    if not set(names) & set(METRICS):
        raise MeasuredError(f"{path}, line 1: neither ttft_s nor tpot_s is there; write one of them, in seconds")
    return names


def _row(where: str, names: Sequence[str], cells: Sequence[str]) -> MeasuredRow:
    if len(cells) != len(names):
        raise MeasuredError(
            f"{where}: {len(cells)} cells under {len(names)} names; write one for each, or leave it empty"
        )
    texts = dict(zip(names, (cell.strip() for cell in cells), strict=True))
    batch_size = texts["batch_size"]
    if not (batch_size.isascii() and batch_size.isdecimal() and 0 < int(batch_size) < 2**31):
        raise MeasuredError(f'{where}, column batch_size: "{batch_size}" is not a whole number above 0; write e.g. 8')
    settings = tuple(
        (name, _value(f"{where}, column {name}", text))
        for name, text in texts.items()
        if name not in _OWN_COLUMNS and text
    )
    ttft_s, tpot_s = (_seconds(f"{where}, column {name}", texts.get(name, "")) for name in METRICS)
    if ttft_s is None and tpot_s is None:
        raise MeasuredError(f"{where}: holds neither TTFT nor TPOT; write one of them, or leave the line out")
    return MeasuredRow(settings=settings, batch_size=int(batch_size), ttft_s=ttft_s, tpot_s=tpot_s)


def _value(where: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise MeasuredError(f'{where}: "{text}" is not YAML ({error}); write it as with --set') from error


def _seconds(where: str, text: str) -> float | None:
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise MeasuredError(f'{where}: "{text}" is not a number of seconds above 0; write e.g. 1.25, or leave it empty')
    return seconds


def _refuse_twins(path: Path, rows: Sequence[MeasuredRow], lines: Sequence[int]) -> None:
    for i, row in enumerate(rows):
        for j in range(i):
            if (rows[j].settings, rows[j].batch_size) == (row.settings, row.batch_size):
                raise MeasuredError(
                    f"{path}, line {lines[i]}: the same settings and batch size as line {lines[j]}; write the mean once"
                )


def measured_matrix(rows: Iterable[MeasuredRow]) -> Floats:
    """Return the measured seconds, float64 [rows, 2]: TTFT, TPOT; NaN where not measured."""
    return np.array([[getattr(row, name) for name in METRICS] for row in rows], dtype=np.float64)


def parse_compare(text: str, rows: Sequence[MeasuredRow]) -> Compare:
    """Return the comparison of `--compare column=value`; MeasuredError where no row can be compared."""
    column, values = split_condition(text, "--compare", rows)
    if len(values) > 1:
        raise MeasuredError(f'--compare "{text}": {len(values)} values; write the one that all others stand beside')
    compare = Compare(column=column, value=values[0])
    if not len(pairs_of(rows, compare)):
        raise MeasuredError(
            f'--compare "{text}": no row has an equal with that value; known are {_known(column, rows)}'
        )
    return compare


def split_condition(text: str, option: str, rows: Sequence[MeasuredRow]) -> tuple[str, list[Any]]:
    """Return column and values of `column=value,value`; MeasuredError for a column or value that no row has."""
    try:
        column, _ = split_override(text)
        values = parse_yaml(f"[{text.partition('=')[2]}]")
    except (ScenarioError, ValueError) as error:
        raise MeasuredError(f'{option} "{text}": write column=value, e.g. batch_size=2,4') from error
    columns = ["batch_size", *dict.fromkeys(path for row in rows for path, _ in row.settings)]
    if column not in columns:
        raise MeasuredError(f'{option} "{text}": not a column of the measurements; write one of {", ".join(columns)}')
    for value in values:
        if all(row.get(column) != value for row in rows):
            raise MeasuredError(f'{option} "{text}": no row has {value}; known are {_known(column, rows)}')
    if not values:
        raise MeasuredError(f'{option} "{text}": no value; known are {_known(column, rows)}')
    return column, values


def _known(column: str, rows: Sequence[MeasuredRow]) -> str:
    return ", ".join(dict.fromkeys(str(row.get(column)) for row in rows))


def pairs_of(rows: Sequence[MeasuredRow], compare: Compare | None) -> npt.NDArray[np.int64]:
    """Return the indices of each compared row and its baseline row, int64 [pairs, 2].

    The baseline row has the same batch size and settings but for the compared column and those that follow from it:
    columns that have one single value for each of the compared one's (a placement that goes with a method).
    """
    if compare is None:
        return np.zeros((0, 2), dtype=np.int64)
    columns = list(dict.fromkeys(path for row in rows for path, _ in row.settings))
    free = ["batch_size", *(c for c in columns if c != compare.column and not _follows(c, compare.column, rows))]
    free = [c for c in free if c != compare.column]
    keys = [[row.get(column) for column in free] for row in rows]
    is_baseline = [row.get(compare.column) == compare.value for row in rows]
    pairs = [
        (i, j)
        for i in range(len(rows))
        if not is_baseline[i]
        for j in [next((j for j in range(len(rows)) if is_baseline[j] and keys[j] == keys[i]), None)]
        if j is not None
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _follows(column: str, leader: str, rows: Sequence[MeasuredRow]) -> bool:
    first: list[tuple[Any, Any]] = []
    for row in rows:
        known = next((value for key, value in first if key == row.get(leader)), _follows)
        if known is _follows:
            first.append((row.get(leader), row.get(column)))
        elif known != row.get(column):
            return False
    return True

"""Opening files safely and taking values out of them, with one line on what is wrong: text, JSON, nested numbers.

`where` is always the file and the place in it, as messages begin: "a.json: physical_to_logical_map".
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsim import json_file
from epsim.errors import FormatError
from epsim.scenario.describe import show

Ints = NDArray[np.int64]


def read_bytes(path: Path, noun: str) -> bytes:
    """Return the content of a file; `noun` is what it should be."""
    try:
        return json_file.read_regular(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}; write the path of {noun}") from error


def read_text(path: Path, noun: str) -> str:
    """Return the content of a text file in UTF-8, without its byte-order mark if it has one."""
    try:
        return json_file.decode_text(read_bytes(path, noun))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not a text file in UTF-8; write the path of {noun}") from error


def parse_json(text: str, where: str, noun: str) -> Any:
    """Return parsed JSON, in which no key is twice and no number NaN or infinite."""
    try:
        return json_file.parse_json(text)
    except json_file.JsonContentError as error:
        raise FormatError(f"{where}: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{where}: is nested too deeply; write {noun}") from error
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number cannot be read"
        place = f" (line {error.lineno}: {reason})" if isinstance(error, json.JSONDecodeError) else f" ({reason})"
        raise FormatError(f"{where}: is not JSON{place}; write {noun}") from error


def read_json(path: Path, noun: str) -> Any:
    """Return the content of a JSON file."""
    return parse_json(read_text(path, noun), str(path), noun)


def mapping(value: object, where: str, noun: str) -> dict[str, Any]:
    """Return a value that must be a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {show(value)} is not {noun}; write one")
    return value


def field(holder: dict[str, Any], key: str, where: str) -> Any:
    """Return what a mapping holds under a key that must be there."""
    if key not in holder:
        raise FormatError(f"{where}: {key} is missing; write it")
    return holder[key]


def only_keys(holder: dict[Any, Any], known: Sequence[str], where: str) -> None:
    """Raise FormatError for a key that the other system does not take."""
    if unknown := [key for key in holder if key not in known]:
        raise FormatError(f"{where}: {show(unknown[0])} is not a key of it; leave only {', '.join(known)}")


def whole(value: object, where: str, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return a value that must be a whole number in a range."""
    if type(value) is not int or not low <= value <= high:
        raise FormatError(f"{where}: {show(value)} is not a whole number from {low} to {high}; write one")
    return value


def ints(value: object, axes: Sequence[str], where: str) -> Ints:
    """Return int64 of nested lists, a NumPy array, or numbers in a tensor; `axes` are the nouns of its axes.

    Raises FormatError where a row is ragged, or a value is not a whole number.
    """
    if isinstance(value, np.ndarray):
        array = value
        if array.ndim != len(axes):
            raise FormatError(f"{where}: has {array.ndim} axes, not {len(axes)}; write [{']['.join(axes)}]")
        if array.dtype.kind not in "iu":
            raise FormatError(f"{where}: holds {array.dtype}, not whole numbers; write int32")
        if array.size and int(array.max()) >= 2**62:
            raise FormatError(f"{where}: {array.max()} is too large; write smaller numbers")
        return array.astype(np.int64)
    shape: list[int] = []
    _walk(value, axes, 0, shape, where)
    return np.array(value, dtype=np.int64).reshape(shape or [0] * len(axes))


def _walk(value: object, axes: Sequence[str], depth: int, shape: list[int], where: str) -> None:
    """Check one level of nested lists; the first row at each depth says how long the others must be."""
    if not isinstance(value, list):
        raise FormatError(f"{where}: {show(value)} is not a list of a number per {axes[depth]}; write one")
    if not value:
        raise FormatError(f"{where}: is empty; write a number per {axes[depth]}")
    if len(shape) == depth:
        shape.append(len(value))
    if len(value) != shape[depth]:
        raise FormatError(
            f"{where}: has {len(value)} entries, others {shape[depth]}; write a number per {axes[depth]} in each"
        )
    if depth + 1 < len(axes):
        for i, row in enumerate(value):
            _walk(row, axes, depth + 1, shape, f"{where}[{i}]")
        return
    for i, number in enumerate(value):
        if type(number) is not int or abs(number) >= 2**62:
            raise FormatError(f"{where}[{i}]: {show(number)} is not a whole number; write one")


def in_range(array: NDArray[Any], low: int, high: int, where: str, rule: str) -> None:
    """Raise FormatError naming the first entry that is not from `low` to `high`; `rule` says what they are."""
    wrong = (array < low) | (array > high)
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise FormatError(f"{where}{_brackets(place)}: {array[tuple(place)]} is not from {low} to {high}; {rule}")


def _brackets(place: Sequence[int] | NDArray[np.int64]) -> str:
    return "".join(f"[{int(i)}]" for i in place)

"""Quantities as people write them ("10 Gbit/s", "64 GB", "5 us") to SI floats and back.

Prefixes are decimal (1 GB = 1e9 bytes); binary sizes are written out (GiB). Inside epsim everything is SI: seconds,
bytes, bytes per second, FLOP per second. `Quantity` names the kinds; `parse` and `format_quantity` are the two ways.
"""

import math
import re
from dataclasses import dataclass

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}


def _scaled(*suffixes: tuple[str, float], binary: bool = False) -> dict[str, float]:
    prefixes = {**_DECIMAL, **(_BINARY if binary else {})}
    return {prefix + suffix: scale * unit for suffix, unit in suffixes for prefix, scale in prefixes.items()}


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A kind of quantity: the unit names it accepts, each with its factor to SI, and an example for messages.

    written: the units that `format_quantity` chooses from, the SI unit first.
    """

    noun: str
    example: str
    factors: dict[str, float]
    written: tuple[str, ...]


TIME = Quantity(
    noun="a time",
    example="5 us",
    factors={"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0},
    written=("s", "ms", "us", "ns"),
)
SIZE = Quantity(
    noun="a size",
    example="64 GB",
    factors=_scaled(("B", 1.0), binary=True),
    written=("B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB"),
)
RATE = Quantity(
    noun="a rate",
    example="10 Gbit/s",
    factors=_scaled(("B/s", 1.0), ("bit/s", 0.125), ("bps", 0.125), binary=True),
    written=("B/s", "kB/s", "MB/s", "GB/s", "TB/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"),
)
FLOP_RATE = Quantity(
    noun="a FLOP rate",
    example="42.5 TFLOP/s",
    factors=_scaled(("FLOP/s", 1.0), ("FLOPS", 1.0), ("flops", 1.0)),
    written=("FLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"),
)

_NUMBER_AND_UNIT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S*)\s*")


def parse(text: str, quantity: Quantity) -> float:
    """Return `text` in SI units.

    Raises ValueError with a message that names the text and an example when it is not a finite quantity of that
    kind. A unit is required: a bare number says nothing about bits or bytes.

    >>> parse("10 Gbit/s", RATE)
    1250000000.0
    >>> parse("50 us", TIME)
    5e-05
    >>> parse("10 GB", RATE)
    Traceback (most recent call last):
    ValueError: "10 GB" is not a rate; write e.g. "10 Gbit/s"
    """
    match = _NUMBER_AND_UNIT.fullmatch(text)
    factor = quantity.factors.get(match[2]) if match else None
    if match is None or factor is None:
        raise ValueError(f'"{text}" is not {quantity.noun}; write e.g. "{quantity.example}"')
    # Division by the whole inverse keeps 470 ns == 4.7e-07; multiplying by 1e-9 would not.
    value = float(match[1]) * factor if factor >= 1 else float(match[1]) / round(1 / factor)
    if not math.isfinite(value):
        raise ValueError(f'"{text}" is too large; write e.g. "{quantity.example}"')
    return value


def format_quantity(value: float, quantity: Quantity) -> str:
    """Return an SI value as text that `parse` turns back into exactly this value.

    >>> format_quantity(1.25e9, RATE)
    '10 Gbit/s'
    >>> format_quantity(5e-05, TIME)
    '50 us'
    """
    texts = [
        f"{number} {unit}"
        for unit in quantity.written
        for number in (f"{value / quantity.factors[unit]:.12g}", repr(value / quantity.factors[unit]))
        if "inf" not in number and parse(f"{number} {unit}", quantity) == value
    ]
    return min(texts, key=_awkwardness)


def _awkwardness(text: str) -> tuple[bool, bool, int]:
    """People like numbers from 1 to 1000, without exponent, short."""
    number = text.split()[0]
    return not 1 <= abs(float(number)) < 1000, "e" in number, len(number)


_TIME_STEPS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_SIZE_STEPS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def _format(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    scale, unit = next(((s, u) for s, u in steps if abs(value) >= s), steps[-1])
    return f"{value / scale:.4g} {unit}" if value else f"0 {dict(steps)[1.0]}"


def format_time(seconds: float) -> str:
    """Return seconds as text with a fitting unit.

    >>> format_time(0.01234)
    '12.34 ms'
    """
    return _format(seconds, _TIME_STEPS)


def format_size(num_bytes: float) -> str:
    """Return bytes as text with a fitting decimal unit.

    >>> format_size(6.9e9)
    '6.9 GB'
    """
    return _format(num_bytes, _SIZE_STEPS)

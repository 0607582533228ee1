"""Quantities: text to SI floats and back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epsim import units
from epsim.units import FLOP_RATE, RATE, SIZE, TIME, Quantity, format_quantity, format_size, format_time, parse

QUANTITIES = {"time": TIME, "size": SIZE, "rate": RATE, "FLOP rate": FLOP_RATE}


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("5 us", TIME, 5e-6),
        ("5us", TIME, 5e-6),
        (" 5 µs ", TIME, 5e-6),
        ("470 ns", TIME, 4.7e-7),
        ("2 min", TIME, 120.0),
        (".5 ms", TIME, 5e-4),
        ("1e3 s", TIME, 1000.0),
        ("0 s", TIME, 0.0),
        ("64 GB", SIZE, 64e9),  # decimal: 64 * 10^9
        ("64 GiB", SIZE, 64 * 2.0**30),
        ("64 KiB", SIZE, 65536.0),
        ("1 kB", SIZE, 1000.0),
        ("10 Gbit/s", RATE, 1.25e9),  # 10^10 / 8
        ("9.41 Gbit/s", RATE, 1.17625e9),
        ("800 Mbps", RATE, 1e8),
        ("1 bit/s", RATE, 0.125),
        ("204.8 GB/s", RATE, 204.8e9),
        ("42.5 TFLOP/s", FLOP_RATE, 42.5e12),
        ("42.5 TFLOPS", FLOP_RATE, 42.5e12),
    ],
)
def test_parse(text: str, quantity: Quantity, value: float) -> None:
    assert parse(text, quantity) == value


@pytest.mark.parametrize(
    "text", ["10 GB", "10", "Gbit/s", "", "10 gbit/s", "ten Gbit/s", "1,5 Gbit/s", "nan B/s", "1 2 B/s"]
)
def test_what_is_not_a_rate(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a rate; write e\.g\."):
        parse(text, RATE)


def test_too_large() -> None:
    with pytest.raises(ValueError, match='"1e308 TB/s" is too large'):
        parse("1e308 TB/s", RATE)


@pytest.mark.parametrize("name", QUANTITIES)
@given(st.floats(min_value=1e-9, max_value=1e24))
def test_text_gives_exactly_the_same_value(name: str, value: float) -> None:
    assert parse(format_quantity(value, QUANTITIES[name]), QUANTITIES[name]) == value


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (0.0, TIME, "0 s"),
        (4.7e-7, TIME, "470 ns"),
        (1.17625e9, RATE, "9.41 Gbit/s"),
        (25e9, RATE, "25 GB/s"),
        (3.35e12, RATE, "3.35 TB/s"),
        (65536.0, SIZE, "64 KiB"),
        (64e9, SIZE, "64 GB"),
        (989.5e12, FLOP_RATE, "989.5 TFLOP/s"),
    ],
)
def test_text_is_what_people_write(value: float, quantity: Quantity, text: str) -> None:
    assert format_quantity(value, quantity) == text


@pytest.mark.parametrize("quantity", QUANTITIES.values(), ids=QUANTITIES)
def test_examples_and_written_units_can_be_parsed(quantity: Quantity) -> None:
    assert parse(quantity.example, quantity) > 0
    assert set(quantity.written) <= set(quantity.factors)
    assert quantity.factors[quantity.written[0]] == 1


def test_for_people() -> None:
    assert [format_time(x) for x in (0.0, 1.5, 0.01234, 5e-6, 2e-9, 1e-12)] == [
        "0 s", "1.5 s", "12.34 ms", "5 µs", "2 ns", "0.001 ns",
    ]  # fmt: skip
    assert [format_size(x) for x in (0.0, 6.9e9, 1.0, 1e12)] == ["0 B", "6.9 GB", "1 B", "1 TB"]
    assert format_time(-0.5) == "-500 ms"
    assert math.isfinite(units.parse("1 s", TIME))

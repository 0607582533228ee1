"""Clocks for the parts of a pass: `HostClock` on the CPU, `CudaClock` on a GPU; `clock_of` chooses."""

import time
from typing import Protocol

import torch

from epsim.measure.device_plan import Cell

Laps = list[tuple[Cell, float]]


class Clock(Protocol):
    """Laps between marks; the time before `start` or between `lap` and `start` counts for nobody."""

    def start(self) -> None:
        """Begin a part."""

    def lap(self, cell: Cell) -> None:
        """End a part: a sample of a cell."""

    def read(self) -> Laps:
        """Return cells and seconds of the parts since the last reading."""


class HostClock:
    """The time of the host, on which the CPU computes."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._laps: Laps = []

    def start(self) -> None:
        self._start_s = time.perf_counter()

    def lap(self, cell: Cell) -> None:
        self._laps.append((cell, time.perf_counter() - self._start_s))

    def read(self) -> Laps:
        laps, self._laps = self._laps, []
        return laps


class CudaClock:
    """Events on the current stream: from the end of the work before a part to the end of its own."""

    def __init__(self) -> None:
        self._start = self._event()
        self._laps: list[tuple[Cell, torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._start = self._event()
        self._start.record()

    def lap(self, cell: Cell) -> None:
        end = self._event()
        end.record()
        self._laps.append((cell, self._start, end))

    def read(self) -> Laps:
        torch.cuda.synchronize()
        laps, self._laps = self._laps, []
        return [(cell, start.elapsed_time(end) / 1e3) for cell, start, end in laps]

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()

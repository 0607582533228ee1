"""All passes of a device's measurement, in one process or in several at once: `measure_cells`.

The settings are gone through ROUNDS times, so that what disturbs the machine for a while does not meet all samples of a
cell. Several processes do so together, each setting with as many passes as the slowest one has time for.
"""

import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from math import ceil
from threading import BrokenBarrierError
from time import perf_counter
from typing import Any

import torch

from epsim.errors import CapacityError, EpsimError
from epsim.measure.device_pass import Bench
from epsim.measure.device_plan import Cell, Setting
from epsim.measure.ranges import Ranges
from epsim.measure.wire import Wire
from epsim.model import ModelCard

ROUNDS = 3
MIN_REPEATS = 5
SETTING_S = 2.0  # what a setting may take, once each cell has MIN_REPEATS
Samples = dict[Cell, list[float]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What each process does. dtype: as torch names it. repeats: samples of a cell and process."""

    card: ModelCard
    ranges: Ranges
    settings: Sequence[Setting]
    device: str
    dtype: str
    wire: Wire
    num_processes: int
    num_threads: int
    repeats: int

    @property
    def num_advances(self) -> int:
        """How often `advance` is called."""
        return ROUNDS * len(self.settings)


def measure_cells(job: Job, advance: Callable[[], None] = lambda: None) -> Samples:
    """Return seconds of every cell, of all processes together.

    advance: is called `job.num_advances` times if there is one process.
    Raises CapacityError if the device's memory does not suffice.
    """
    num_processes = job.num_processes
    if num_processes == 1:
        threads = torch.get_num_threads()
        try:
            return _run(job, lambda own_s: own_s, advance)
        finally:
            torch.set_num_threads(threads)
    context = multiprocessing.get_context("spawn")
    shared = context.Barrier(num_processes), context.Array("d", num_processes), context.Value("i", 0)
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_join, initargs=shared) as pool:
        futures = [pool.submit(_run_together, job) for _ in range(num_processes)]
        try:
            found = _results(futures)
        except BrokenProcessPool as error:
            raise CapacityError("a process ended early, perhaps for want of memory; measure fewer processes") from error
    return {cell: [seconds for samples in found for seconds in samples[cell]] for cell in found[0]}


def _results(futures: Sequence[Any]) -> list[Samples]:
    """Return what all found; if one failed, raise its error rather than that of those who waited for it."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
    return [future.result() for future in futures]


_SHARED: dict[str, Any] = {}


def _join(barrier: Any, times: Any, counter: Any) -> None:
    with counter.get_lock():
        _SHARED.update(barrier=barrier, times=times, rank=counter.value)
        counter.value += 1


def _run_together(job: Job) -> Samples:
    try:
        return _run(job, _slowest, lambda: None)
    except BaseException:
        _SHARED["barrier"].abort()
        raise


def _slowest(own_s: float) -> float:
    """Wait for the others; return the longest time of all."""
    barrier, times = _SHARED["barrier"], _SHARED["times"]
    barrier.wait()  # until everyone has read the last ones
    times[_SHARED["rank"]] = own_s
    barrier.wait()
    return float(max(times))


def _run(job: Job, slowest: Callable[[float], float], advance: Callable[[], None]) -> Samples:
    torch.set_num_threads(job.num_threads)
    samples: Samples = {cell: [] for setting in job.settings for cell in setting.cells}
    try:
        bench = Bench(
            job.card,
            job.ranges,
            device=torch.device(job.device),
            dtype=getattr(torch, job.dtype),
            wire=job.wire,
            meet=(lambda: None) if job.num_processes == 1 else _SHARED["barrier"].wait,
        )
        gc.disable()
        num_passes = [_time_for(setting, bench, slowest, job.repeats) for setting in job.settings]
        for part in range(ROUNDS):
            for setting, passes in zip(job.settings, num_passes, strict=True):
                slowest(0.0)
                bench.run(setting, 0)  # warms up
                share = ceil(passes / ROUNDS)
                for number in range(part * share, (part + 1) * share):
                    for cell, seconds in bench.run(setting, number):
                        samples[cell].append(seconds)
                advance()
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"memory of {job.device} does not suffice; write e.g. --set model.num_layers=4") from error
    except RuntimeError as error:
        if isinstance(error, EpsimError) or "allocate memory" not in str(error):
            raise
        raise CapacityError("memory does not suffice; write e.g. --set model.num_layers=4") from error
    finally:
        gc.enable()
    return samples


def _time_for(setting: Setting, bench: Bench, slowest: Callable[[float], float], repeats: int) -> int:
    """Return how many passes a setting gets: for all repeats if there is time, in any case for MIN_REPEATS."""
    slowest(0.0)
    bench.run(setting, 0)  # allocates
    start_s = perf_counter()
    bench.run(setting, 1)
    pass_s = slowest(perf_counter() - start_s)
    wanted = setting.num_passes(repeats, bench.num_layers)
    least = setting.num_passes(min(repeats, MIN_REPEATS), bench.num_layers)
    return max(least, min(wanted, int(SETTING_S / max(pass_s, 1e-9))))

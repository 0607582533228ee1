"""`epsim measure device`: the profile of a device for a model. `prepare` says what to do, `measure_device` does it."""

import os
import platform
from collections.abc import Callable
from datetime import date
from typing import Any

import numpy as np
import torch

from epsim.cost.profile import AXES, DeviceProfile, OpTable, shapes_of, wire_name
from epsim.errors import InputError
from epsim.measure.device_plan import grids, plan_cells
from epsim.measure.device_run import Job, Samples, measure_cells
from epsim.measure.machine import cpu_name
from epsim.measure.ranges import Ranges
from epsim.measure.wire import Wire
from epsim.model import ModelCard
from epsim.run import model_and_cluster
from epsim.scenario.spec import ScenarioSpec


def wire_of(spec: ScenarioSpec) -> Wire:
    """Return how a scenario's vectors travel; with dedup a vector has its share of the top k, at least 1 pair."""
    model, cluster = model_and_cluster(spec)
    transmission = spec.transmission
    return Wire(
        dispatch_dtype=transmission.dispatch_dtype,
        combine_dtype=transmission.combine_dtype,
        pairs_per_vector=1 if transmission.dedup == "none" else max(1, model.topk // cluster.num_devices),
    )


def prepare(
    card: ModelCard,
    ranges: Ranges,
    *,
    wire: Wire,
    device: str = "cpu",
    num_processes: int = 1,
    num_threads: int | None = None,
    repeats: int = 20,
) -> Job:
    """Return the measurement of a model's parts, in float32 on the CPU, in bfloat16 on CUDA.

    num_threads: of each process, by default its share of the cores. repeats: samples of a cell and process.
    Raises InputError for a device that is not there.
    """
    where = device_named(device)
    on_host = where.type == "cpu"
    dtype = torch.float32 if on_host else torch.bfloat16
    hidden_bytes = card.hidden_size * dtype.itemsize
    found = grids(card, ranges, on_host=on_host, hidden_bytes=hidden_bytes)
    tokens_per_image = 1 if card.vision is None else card.vision.tokens_per_image
    return Job(
        card=card,
        ranges=ranges,
        settings=plan_cells(found, topk=card.topk, hidden_bytes=hidden_bytes, tokens_per_image=tokens_per_image),
        device=str(where),
        dtype=str(dtype).removeprefix("torch."),
        wire=wire,
        num_processes=num_processes,
        num_threads=max(1, (os.cpu_count() or 1) // num_processes) if num_threads is None else num_threads,
        repeats=repeats,
    )


def measure_device(job: Job, advance: Callable[[], None] = lambda: None) -> DeviceProfile:
    """Return the measured times; advance: is called `job.num_advances` times.

    Raises CapacityError if the device's memory does not suffice.
    """
    samples = measure_cells(job, advance)
    cpu = cpu_name()
    return DeviceProfile(
        model=job.card.name,
        shapes=shapes_of(job.card),
        dtype=job.dtype,
        wire=wire_name(job.wire.dispatch_dtype, job.wire.combine_dtype),
        device=cpu if job.device == "cpu" else torch.cuda.get_device_name(job.device),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {cpu}",
        versions={"torch": torch.__version__, "python": platform.python_version()},
        date=date.today().isoformat(),
        num_processes=job.num_processes,
        num_threads=job.num_threads,
        ops={op: _table(op, samples) for op in AXES if any(cell.op == op for cell in samples)},
    )


def summary(profile: DeviceProfile) -> dict[str, Any]:
    """Return, as plain values, what a profile covers and how steady its times are.

    Spread is the distance of the quartiles over the median; `worst` is the cell where it is largest.
    """
    rows = []
    for name, op in profile.ops.items():
        worst = int(np.argmax(op.spread_C))
        rows.append(
            {
                "op": name,
                "cells": len(op.at_CA),
                "from": dict(zip(op.axes, op.at_CA.min(axis=0).tolist(), strict=True)),
                "to": dict(zip(op.axes, op.at_CA.max(axis=0).tolist(), strict=True)),
                "median_s": [float(op.median_s_C.min()), float(op.median_s_C.max())],
                "repeats": int(op.repeats_C.min()),
                "spread": float(np.median(op.spread_C)),
                "worst": {
                    "at": dict(zip(op.axes, op.at_CA[worst].tolist(), strict=True)),
                    "median_s": float(op.median_s_C[worst]),
                    "spread": float(op.spread_C[worst]),
                },
            }
        )
    words = f"{profile.model} in {profile.dtype} on {profile.device}, vectors sent in {profile.wire}; "
    words += f"{profile.num_processes} at once, "
    return {"title": words + f"{profile.num_threads} threads each, torch {profile.versions['torch']}", "ops": rows}


def _table(op: str, samples: Samples) -> OpTable:
    cells = sorted(((cell.at, seconds) for cell, seconds in samples.items() if cell.op == op), key=lambda pair: pair[0])
    times: dict[str, Any] = {"min_s_C": 0, "p25_s_C": 25, "median_s_C": 50, "p75_s_C": 75, "max_s_C": 100}
    return OpTable(
        axes=AXES[op],
        at_CA=np.array([at for at, _ in cells], dtype=np.float64),
        repeats_C=np.array([len(seconds) for _, seconds in cells]),
        **{name: np.array([np.percentile(s, percent) for _, s in cells]) for name, percent in times.items()},
    )


def device_named(name: str) -> torch.device:
    """Return the device that an option names; InputError if it is not to be had."""
    if name not in ("cpu", "cuda"):
        raise InputError(f'--device: "{name}" is not known; write cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device; write --device cpu")
    return torch.device(name)

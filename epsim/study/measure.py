"""The figures of one training run and the trace of its model, as plain values: `measure`.

Shares are fractions; docs/metrics.md and docs/trace-stats.md define what is measured.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsim.errors import InputError
from epsim.study.times import simulated_times
from epsim.trace.file import TraceFile
from epsim.trace_stats import Spread, trace_stats

NUM_DEVICES = 2
PLACEMENTS = ("contiguous", "modality_bins")
PHASES = ("prefill", "decode", "all")


def measure(run: Path, trace: Path, scenario: Path, *, stage: str) -> dict[str, Any]:
    """Return what came out of a run.

    run: its folder. trace: of its model on held-out prompts. scenario: whose times are simulated. stage: the one that
    accuracy is that of. Under "placements" stands what crosses between two devices with homes by modality.
    """
    stats = {
        name: trace_stats(TraceFile.open(trace), Spread(num_devices=NUM_DEVICES, placement=name)) for name in PLACEMENTS
    }
    any_stats = stats[PLACEMENTS[0]]  # specialisation does not depend on placement
    return {
        **training_results(run, stage),
        **_specialisation(any_stats),
        "placements": {name: _placement(own) for name, own in stats.items()},
        "times": simulated_times(scenario, trace),
        "trace": {name: any_stats["trace"][name] for name in ("num_requests", "num_tokens", "num_experts", "topk")},
    }


def training_results(run: Path, stage: str) -> dict[str, Any]:
    """Return what `results.json` of a run says of its training. Raises InputError if that cannot be read, or lacks it.

    seconds: of the stages that were not taken from another run. accuracy: after `stage`, with its standard error and
    number of prompts, with (`image`) and without one (`text`).
    """
    path = run / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        stages = results["stages"]
        return {
            "seconds": sum(own["seconds"] for own in stages.values() if "taken_from" not in own),
            "ran_on": results["ran_on"],
            "num_parameters": results["num_parameters"],
            "accuracy": {kind: dict(stages[stage][kind]) for kind in ("image", "text")},
        }
    except KeyError as error:
        raise InputError(f"{path}: has no {error}, as a run with stage {stage} has; train the run anew") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read; train the run anew") from error


def _specialisation(stats: Mapping[str, Any]) -> dict[str, Any]:
    layers: Sequence[Mapping[str, Any]] = stats["layers"]
    names = ("msi", "mrd_distance_nats", "mrd_distance_smoothed_nats", "num_one_sided_experts")
    return {
        "layer_ids": stats["trace"]["layer_ids"],
        "idle_experts_frac": stats["overall"]["num_idle_experts"] / (len(layers) * stats["trace"]["num_experts"]),
        **{name: stats["overall"][name] for name in names},
        **{f"{name}_by_layer": [layer[name] for layer in layers] for name in names},
    }


def _placement(stats: Mapping[str, Any]) -> dict[str, Any]:
    loads = {phase: [layer["device_load"][phase] for layer in stats["layers"]] for phase in PHASES}
    balancedness = stats["overall"]["device_balancedness"]
    return {
        "transfer_ratio": stats["transfer_ratio"],
        "prefill_devices": stats["parameters"]["prefill_devices"],
        "decode_devices": stats["parameters"]["decode_devices"],
        "device_share": {phase: _shares(load_LR) for phase, load_LR in loads.items()},
        "device_balancedness": {
            phase: None if forms is None else forms["ratio_of_sums"] for phase, forms in balancedness.items()
        },
    }


def _shares(load_LR: Sequence[Sequence[int]]) -> list[float] | None:
    """Return the share of each device in the pairs of all layers, None without any."""
    load_R = [sum(column) for column in zip(*load_LR, strict=True)]
    total = sum(load_R)
    return [load / total for load in load_R] if total else None

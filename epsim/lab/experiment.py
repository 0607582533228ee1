"""Policies compared on requests that they were not fitted to: `compare_policies`, plain values for JSON and tables."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from epsim import __version__
from epsim.errors import InputError
from epsim.lab.interval import LEVEL, Estimate
from epsim.lab.question import Chosen, Question
from epsim.lab.split import Split, split_requests
from epsim.lab.trial import Sample, Trial, run_trial
from epsim.trace import RequestTable

Advance = Callable[[], None]
MOST_SEEDS = 1000
METRICS = ("ttft_s", "tpot_s")  # of a batch size
ALSO: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {  # beside the mean over splits, which says less
    "time_to_place_s": ("median", median),
    "replica_memory_bytes": ("max", max),
}


@dataclass(frozen=True, kw_only=True)
class Design:
    """How often requests are split, and how. The seeds of the splits are 0, 1, .."""

    num_seeds: int = 5
    fit_share: float = 0.5

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise InputError(f"--seeds: {self.num_seeds} is below 1; write 1 or more")
        if self.num_seeds > MOST_SEEDS:
            raise InputError(f"--seeds: {self.num_seeds} is above {MOST_SEEDS}; write {MOST_SEEDS} or less")


@dataclass
class _Runs:
    """Trials of the policies that apply, by label; left_out: why others do not."""

    trials: dict[str, list[Trial]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def check_design(question: Question, design: Design) -> Split:
    """Return the first split, whose sizes are those of all; InputError where it holds out too few for the batches."""
    split = split_requests(question.trace.requests, design.fit_share, 0)
    held_out, largest = len(split.held_out_ids), max(question.spec.workload.batch_sizes)
    if held_out < largest:
        raise InputError(
            f"workload.batch_sizes: {largest} needs as many held-out requests, {question.trace.name} has {held_out} "
            f"of {len(question.trace.requests)}; use smaller batches, or a longer trace"
        )
    return split


def count_steps(question: Question, chosen: Chosen, design: Design) -> int:
    """Return how many steps `compare_policies` will simulate, for a progress bar."""
    total = 0
    for seed in range(design.num_seeds):
        split = split_requests(question.trace.requests, design.fit_share, seed)
        places = question.trace.requests.find(split.held_out_ids)
        total += _steps(question, question.trace.requests, places)
    return total * len(chosen.choices)


def _steps(question: Question, requests: RequestTable, places: Any) -> int:
    decode_Q = requests.num_decode_tokens_Q[places]
    return sum(question.num_steps(size, decode_Q) for size in question.spec.workload.batch_sizes)


def compare_policies(
    question: Question, chosen: Chosen, design: Design, advance: Advance = lambda: None
) -> dict[str, Any]:
    """Return what each policy gives on held-out requests, over the splits, and the differences to the baseline.

    advance: is called after each simulated step. Raises InputError where a policy does not apply that is not optional,
    or is the baseline that was named.
    """
    ratio = check_design(question, design).test_to_fit
    runs = _run(question, chosen, design, advance)
    if not runs.trials:
        raise InputError(f"--policy: none applies; {next(iter(runs.left_out.values()))}")
    reference = chosen.baseline if chosen.baseline in runs.trials else next(iter(runs.trials))
    specs = {choice.label: choice.spec.placement for choice in chosen.choices}
    return {
        **header(question, design),
        "baseline": reference,
        "policies": [
            {
                "policy": label,
                "placement": specs[label].model_dump(mode="json"),
                **_summary(trials, runs.trials[reference], ratio),
            }
            for label, trials in runs.trials.items()
        ],
        "left_out": [{"policy": label, "reason": why} for label, why in runs.left_out.items()],
    }


def _run(question: Question, chosen: Chosen, design: Design, advance: Advance) -> _Runs:
    runs = _Runs(left_out=dict(chosen.left_out))
    for seed in range(design.num_seeds):
        sample = Sample.of(question, split_requests(question.trace.requests, design.fit_share, seed))
        for choice in chosen.choices:
            if choice.label in runs.left_out:
                continue
            try:
                trial = run_trial(question, choice, sample, advance, with_bounds=seed == 0)
            except InputError as error:
                runs.left_out[choice.label] = chosen.unless_left_out(choice.label, error)
                runs.trials.pop(choice.label, None)
                continue
            runs.trials.setdefault(choice.label, []).append(trial)
    return runs


def header(question: Question, design: Design) -> dict[str, Any]:
    """Return what a comparison is of: its trace with the SHA-256 of its file, scenario, devices, splits and batches."""
    split = check_design(question, design)
    num_held_out = len(split.held_out_ids)
    found = about(question)
    return {
        **found,
        "trace": {**found["trace"], "sha256": _sha256(Path(question.raw["trace"]["path"]))},
        "design": {
            "num_seeds": design.num_seeds,
            "fit_share": design.fit_share,
            "num_fit": len(split.fit_ids),
            "num_held_out": num_held_out,
            "interval_level": LEVEL if design.num_seeds > 1 else None,
        },
        "batches": [
            {"batch_size": size, "num_batches": question.num_batches(size, num_held_out)}
            for size in question.spec.workload.batch_sizes
        ],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def about(question: Question) -> dict[str, Any]:
    """Return the trace, the scenario and the devices of a question."""
    meta = question.trace.meta
    return {
        "epsim_version": __version__,
        "trace": {
            "name": question.trace.name,
            "kind": meta.kind,
            "description": meta.words,
            "num_requests": len(question.trace.requests),
            "num_tokens": question.trace.num_tokens,
        },
        "scenario": question.spec.model_dump(mode="json", by_alias=True, exclude={"placement"}),
        "devices": [device.name for device in question.cluster.devices],
        "node_of_device": [int(node) for node in question.cluster.node_of_device_R],
    }


def _summary(trials: Sequence[Trial], base: Sequence[Trial], ratio: float) -> dict[str, Any]:
    """Return means with intervals and differences to the baseline; bounds and who sends what to whom, first split."""
    metrics = {
        name: _compared([t.values[name] for t in trials], [t.values[name] for t in base], ratio)
        for name in trials[0].values
    }
    for name, (word, of) in ALSO.items():
        if (found := metrics[name]) is not None:
            found[word] = of(found["values"])
    return {
        "metrics": metrics,
        "batch_sizes": [
            {
                "batch_size": size,
                **{
                    name: _compared([t.times[size][name] for t in trials], [t.times[size][name] for t in base], ratio)
                    for name in METRICS
                },
            }
            for size in trials[0].times
        ],
        "bounds": trials[0].bounds,
        "sent_bytes": trials[0].sent_bytes_RR.tolist(),
    }  # fmt: skip


def _compared(values: Sequence[float | None], base: Sequence[float | None], ratio: float) -> dict[str, Any] | None:
    """Return an estimate with the differences to the baseline, split by split; None where a split has no value."""
    own, reference = [v for v in values if v is not None], [v for v in base if v is not None]
    if len(own) < len(values):
        return None
    found: dict[str, Any] = Estimate.of(own, ratio).as_dict()
    if len(reference) == len(own):
        difference = Estimate.of([a - b for a, b in zip(own, reference, strict=True)], ratio)
        found["difference"] = {**difference.as_dict(), "contains_zero": difference.contains_zero}
        if all(reference):
            change = Estimate.of([100 * (a / b - 1) for a, b in zip(own, reference, strict=True)], ratio)
            found["change_percent"] = {**change.as_dict(), "contains_zero": change.contains_zero}
    return found

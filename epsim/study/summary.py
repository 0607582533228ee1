"""Means over seeds with their standard errors: `Estimate`, `Summary` of a study's plain values."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Run = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; its standard error is s / sqrt(n), None of one seed."""

    mean: float
    standard_error: float | None
    num_seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return the estimate from a value for each seed."""
        n = len(values)
        return cls(mean=fmean(values), standard_error=stdev(values) / math.sqrt(n) if n > 1 else None, num_seeds=n)

    def text(self, digits: int, scale: float = 1.0, sign: str = "") -> str:
        """Return "0.61 ± 0.02"; sign "+": with a sign in any case."""
        error = "" if self.standard_error is None else f" ± {scale * self.standard_error:.{digits}f}"
        return f"{scale * self.mean:{sign}.{digits}f}{error}"


def written(estimate: Estimate | None, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """Return the text of an estimate, a dash for none."""
    return "-" if estimate is None else estimate.text(digits, scale, sign)


class Summary:
    """The runs of a study by method and seed."""

    def __init__(self, study: Mapping[str, Any]) -> None:
        self.study = study
        self.baseline: str = study["baseline"]["method"]
        self._runs: dict[str, dict[int, Run]] = {}
        for run in study["runs"]:
            self._runs.setdefault(run["method"], {})[run["seed"]] = run

    @property
    def methods(self) -> list[str]:
        """Methods with at least one run, in the study's order."""
        return [method for method in self.study["methods"] if method in self._runs]

    def runs(self, method: str) -> list[Run]:
        """Return the runs of a method, by seed."""
        return [run for _, run in sorted(self._runs.get(method, {}).items())]

    def over_seeds(self, method: str, value: Callable[[Run], float | None]) -> Estimate | None:
        """Return the mean of a value over the seeds that have it, None if there is none."""
        values = [found for run in self.runs(method) if (found := value(run)) is not None]
        return Estimate.of(values) if values else None

    def against_baseline(
        self, method: str, value: Callable[[Run], float | None], reference: Callable[[Run], float | None] | None = None
    ) -> Estimate | None:
        """Return the relative change, fraction, against soft routing of the same seed; the mean over seeds.

        reference: the value of the baseline's run; None: the same.
        """
        changes = []
        for seed, run in sorted(self._runs.get(method, {}).items()):
            base = self._runs.get(self.baseline, {}).get(seed)
            old, new = base and (reference or value)(base), value(run)
            if old and new is not None:
                changes.append(new / old - 1)
        return Estimate.of(changes) if changes else None

    def layers(self, method: str, name: str) -> list[Estimate | None]:
        """Return a value of each layer, `NAME_by_layer`, over seeds."""
        rows = [run[f"{name}_by_layer"] for run in self.runs(method)]
        columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
        return [Estimate.of(column) if column else None for column in columns]


def msi(run: Run) -> float | None:
    """Return the MSI over all layers."""
    found: float | None = run["msi"]
    return found


def ratio(placement: str, way: str, column: str) -> Callable[[Run], float | None]:
    """Return what reads a transfer ratio of a run; way: `without_dedup` or `with_dedup`; column: as in metrics."""

    def read(run: Run) -> float | None:
        found: float | None = run["placements"][placement]["transfer_ratio"][way][column]
        return found

    return read


def time(setting: str, batch_size: int, metric: str) -> Callable[[Run], float | None]:
    """Return what reads `ttft_s` or `tpot_s` of a run."""

    def read(run: Run) -> float | None:
        for row in run["times"]:
            if (row["setting"], row["batch_size"]) == (setting, batch_size):
                found: float | None = row[metric]
                return found
        return None

    return read

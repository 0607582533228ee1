"""What the project wants of its predictions, beside what they reach: `Target`, `target_report`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit for one figure. at: where the figure is in the results; unit: "%" or "points"."""

    group: str
    text: str
    at: tuple[str, ...]
    limit: float
    unit: str


def _study(title: str, key: str, limits: tuple[float | None, ...]) -> tuple[Target, ...]:
    """Return the targets of a study: TTFT, TPOT (%), speed-ups of TTFT and TPOT (points); None for no target."""
    figures = (
        ("TTFT, mean error", "ttft_percent", "%"),
        ("TPOT, mean error", "tpot_percent", "%"),
        ("TTFT speed-up, mean error", "speedup_ttft_points", "points"),
        ("TPOT speed-up, mean error", "speedup_tpot_points", "points"),
    )
    return tuple(
        Target(group=title, text=text, at=(key, "errors", name), limit=limit, unit=unit)
        for (text, name, unit), limit in zip(figures, limits, strict=True)
        if limit is not None
    )


TARGETS = (
    *_study("S11, in sample", "in_sample", (9, 5, 2.5, 1.5)),
    Target(
        group="S11, in sample",
        text="TTFT, mean error, without SQA-IMG batch 1",
        at=("in_sample", "without_outlier", "ttft_percent"),
        limit=6,
        unit="%",
    ),
    *_study("S11, batches 2, 4, 16 from 1, 8, 32", "batches", (10, 8, 2.5, 1.5)),
    *_study("S11, SMoES from the baseline", "smoes", (12, 8, None, None)),
    Target(group="S12, a + b * batch", text="largest error", at=("s12", "max_error_percent"), limit=3, unit="%"),
    Target(
        group="S12, a + b * batch",
        text="mean saving, error",
        at=("s12", "saving_error_points"),
        limit=3,
        unit="points",
    ),
)


def target_report(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every target with the figure that is reached.

    results: `s11.studies` and `s12` of the report.
    """
    figures: dict[str, Any] = {study["key"]: study for study in results["s11"]["studies"]} | {"s12": results["s12"]}
    found = []
    for target in TARGETS:
        figure: Any = figures
        for step in target.at:
            figure = figure[step]
        found.append(
            {
                "group": target.group,
                "text": target.text,
                "unit": target.unit,
                "target": target.limit,
                "figure": figure,
                "met": bool(figure <= target.limit),
                "missed_by": max(0.0, figure - target.limit),
            }
        )
    return found

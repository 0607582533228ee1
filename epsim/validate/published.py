"""The published figures that predictions are held to: `load_published` reads tables S11 and S12 of SMoES.

Table S10 is in `epsim.trace.published`, which draws traces from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.scenario.yaml_text import parse_yaml

Floats = npt.NDArray[np.float64]
PUBLISHED_NAME = "smoes.yaml"
S11_METHODS = ("baseline", "attention-soft")
S12_METHODS = ("baseline", "smoes")


@dataclass(frozen=True, kw_only=True)
class PublishedTimes:
    """Times by method, s, [batch sizes], and the paper's own column of their differences, percent."""

    by_method: Mapping[str, Floats]
    printed_change_percent: Floats

    def change_percent(self) -> Floats:
        """Return 100 * (method / baseline - 1) from the values, [batch sizes]."""
        baseline, other = self.by_method.values()
        change: Floats = 100 * (other / baseline - 1)
        return change


@dataclass(frozen=True, kw_only=True)
class Published:
    """Tables S11 and S12 of SMoES.

    Attributes:
        s11: by benchmark and metric (`ttft_s`, `tpot_s`): baseline and attention-soft.
        s12: baseline and SMoES.
        s12_mean_change_percent: as printed.
        mismatches: where the paper's figures do not follow from each other, in words.
    """

    citation: str
    batch_sizes: tuple[int, ...]
    s11: Mapping[tuple[str, str], PublishedTimes]
    s12: PublishedTimes
    s12_mean_change_percent: float
    mismatches: tuple[str, ...]


def load_published() -> Published:
    """Return the packaged tables."""
    content = parse_yaml(data_text(PUBLISHED_NAME))
    return Published(
        citation=content["citation"],
        batch_sizes=tuple(content["batch_sizes"]),
        s11={
            (benchmark, metric): _times(content["table_s11"][benchmark][metric], S11_METHODS)
            for benchmark in content["table_s11"]
            for metric in ("ttft_s", "tpot_s")
        },
        s12=_times(content["table_s12"], S12_METHODS),
        s12_mean_change_percent=content["table_s12"]["printed_mean_change_percent"],
        mismatches=tuple(content["mismatches"]),
    )


def data_text(name: str) -> str:
    """Return the text of a packaged data file."""
    return (files("epsim.validate") / "data" / name).read_text(encoding="utf-8")


def data_path(name: str) -> Path:
    """Return the path of a packaged data file; epsim is installed unpacked."""
    with as_file(files("epsim.validate") / "data" / name) as path:
        return path


def _times(table: Mapping[str, Any], methods: Sequence[str]) -> PublishedTimes:
    return PublishedTimes(
        by_method={method: np.array(table[method], dtype=np.float64) for method in methods},
        printed_change_percent=np.array(table["printed_change_percent"], dtype=np.float64),
    )

"""The published figures that predictions are held to: `load_published` reads table S12 of SMoES.

Table S10 is in `epsim.trace.published`, which draws traces from it, table S11 in `data/s11.csv`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epsim.scenario.yaml_text import parse_yaml

Floats = npt.NDArray[np.float64]
PUBLISHED_NAME = "smoes.yaml"
S12_METHODS = ("baseline", "smoes")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What SMoES publishes besides tables S10 and S11.

    Attributes:
        batch_sizes: of table S12.
        s12: times by method, s, [batch sizes]: baseline and SMoES.
        s12_mean_change_percent: as printed.
        mismatches: where the paper's figures do not follow from each other, in words.
    """

    citation: str
    batch_sizes: tuple[int, ...]
    s12: Mapping[str, Floats]
    s12_mean_change_percent: float
    mismatches: tuple[str, ...]


def load_published() -> Published:
    """Return the packaged figures."""
    content = parse_yaml(data_text(PUBLISHED_NAME))
    table = content["table_s12"]
    return Published(
        citation=content["citation"],
        batch_sizes=tuple(content["batch_sizes"]),
        s12={method: np.array(table[method], dtype=np.float64) for method in S12_METHODS},
        s12_mean_change_percent=table["printed_mean_change_percent"],
        mismatches=tuple(content["mismatches"]),
    )


def data_text(name: str) -> str:
    """Return the text of a packaged data file."""
    return (files("epsim.validate") / "data" / name).read_text(encoding="utf-8")


def data_path(name: str) -> Path:
    """Return the path of a packaged data file; epsim is installed unpacked."""
    with as_file(files("epsim.validate") / "data" / name) as path:
        return path

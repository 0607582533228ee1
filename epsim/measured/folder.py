"""A folder of measured runs, `MeasuredRuns`: what was run, on what, with which micro-benchmarks, and every time.

One file, `measured.json`, rewritten whole after every launch, so that a broken session loses one launch at most.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from epsim import __version__
from epsim.atomic import whole_file
from epsim.cluster import build_cluster
from epsim.errors import EpsimError, InputError
from epsim.measured.grid import Cell, cells_of, network_key
from epsim.measured.network_profile import NetworkProfile
from epsim.measured.schema import check_content

FILE = "measured.json"
DEVICE_FILE = "device.json"  # beside it, for real runs: what epsim measure device wrote
DISTURBED_FRAC = 0.1  # more of the machine than that used by others: a run is repeated
_FORMAT = 1
_KEYS = ("scenario", "axes", "options", "machine", "networks", "launches")
Floats = npt.NDArray[np.float64]


@dataclass(kw_only=True)
class MeasuredRuns:
    """scenario: as given, a mapping. axes: values by path. options: how it was run (`emulated`, `dilation`, ...).

    networks: the profile of each different network of the cells. launches: of each launch of the processes, by number
    of cell: step_s [runs][steps], kv_s [runs], and what else was seen.
    """

    scenario: dict[str, Any]
    axes: dict[str, list[Any]]
    options: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    networks: list[dict[str, Any]] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    path: Path = Path(FILE)
    _profiles: dict[str, NetworkProfile] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what a folder holds; InputError, in one line, if it is no such folder."""
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read: {error.strerror}; name a folder that epsim measure run wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON; name a folder that epsim measure run wrote") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or any(k not in content for k in _KEYS):
            raise InputError(
                f"{path}: not measured runs in format {_FORMAT}; name a folder that epsim measure run wrote"
            )
        check_content(content, path)
        runs = cls(**{key: content[key] for key in _KEYS}, path=path)
        runs._check_grid()
        return runs

    def _check_grid(self) -> None:
        """Raise InputError unless launches have the cells of the grid, and networks its links and ranks."""
        try:
            cells = self.cells
        except EpsimError as error:
            raise InputError(f"{self.path}: {error}") from error
        numbers = {str(number) for number in range(len(cells))}
        for i, launch in enumerate(self.launches):
            if set(launch["cells"]) != numbers:
                raise InputError(
                    f"{self.path}: launches[{i}].cells: are {_listed(launch['cells'])}, and the grid's are "
                    f"{_listed(numbers)}; measure it again into another folder"
                )
        for i, network in enumerate(self.networks):
            where, cluster = f"{self.path}: networks[{i}]", cells[0].spec.cluster
            shapes = network["shapes"]
            if shapes is not None and len(shapes) != len(cluster.links):
                raise InputError(
                    f"{where}.shapes: has {len(shapes)}, cluster.links {len(cluster.links)}; measure again"
                )
            num_ranks = build_cluster(cluster.model_dump()).num_devices
            for pair in network["raw"]["pairs"]:
                if max(pair["pair"]) >= num_ranks or len(set(pair["pair"])) < 2:
                    raise InputError(
                        f"{where}.raw.pairs: {pair['pair']} is no pair of {num_ranks} ranks; measure again"
                    )

    def write(self, folder: Path) -> None:
        """Write the folder's file, whole."""
        content = {"format": _FORMAT, "epsim": __version__, **{key: getattr(self, key) for key in _KEYS}}
        with whole_file(folder / FILE) as part:
            part.write_text(_one_line_each(content), encoding="utf-8")

    @property
    def cells(self) -> list[Cell]:
        """The cells, in order."""
        return cells_of(self.scenario, self.axes, self.options["dilation"])

    def network_of(self, cell: Cell) -> NetworkProfile:
        """Return the profile of the network that a cell ran on."""
        key = network_key(cell.spec)
        for network in self.networks:
            if network["key"] == key:
                fresh = NetworkProfile(raw=network["raw"], shapes=network["shapes"])
                return self._profiles.setdefault(key, fresh)
        raise InputError(f"{self.path}: lacks the micro-benchmarks of a network; measure it with epsim measure run")

    def runs_of(self, number: int) -> "CellRuns":
        """Return all runs of the cell with this number."""
        launches = [launch["cells"][str(number)] for launch in self.launches]
        return CellRuns(
            step_s=[np.array(launch["step_s"]) for launch in launches],
            kv_s=[np.array(launch["kv_s"]) for launch in launches],
            num_repeated=sum(launch["num_repeated"] for launch in launches),
            num_disturbed=sum(
                frac > DISTURBED_FRAC for launch in launches for frac in launch.get("foreign_cpu_frac", ())
            ),
        )


@dataclass(frozen=True, kw_only=True)
class CellRuns:
    """Runs of a cell by launch: step_s [runs, steps] and kv_s [runs] of each, s.

    num_repeated: disturbed by other work, and run again. num_disturbed: kept although they were, in the end.
    """

    step_s: list[Floats]
    kv_s: list[Floats]
    num_repeated: int
    num_disturbed: int = 0


def _listed(numbers: Iterable[str]) -> str:
    """Return the numbers of cells as text, the middle of many left out."""
    ordered = sorted(numbers, key=lambda number: (len(number), number))
    return ", ".join(ordered) if len(ordered) <= 8 else f"{', '.join(ordered[:3])}, ..., {ordered[-1]} ({len(ordered)})"


def _one_line_each(content: Mapping[str, Any]) -> str:
    """Return JSON with a line for every key, network and cell of a launch, so that differences can be read."""
    lines = []
    for key, value in content.items():
        if key in ("networks", "launches"):
            entries = ",\n  ".join(json.dumps(entry, separators=(",", ":")) for entry in value)
            lines.append(f' "{key}": [\n  {entries}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"

"""What is measured: the `Cell`s of a grid, each a scenario with one batch size, from a scenario and axes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epsim.compare import Axes, with_settings
from epsim.measured.dilation import dilated
from epsim.scenario import ScenarioSpec

BATCH_SIZE = "batch_size"  # among the settings of a cell, beside the paths of the axes


@dataclass(frozen=True, kw_only=True)
class Cell:
    """settings: a value for each axis, and the batch size. spec: the scenario, dilated, with that batch size alone."""

    settings: Mapping[str, Any]
    spec: ScenarioSpec

    @property
    def label(self) -> str:
        """The settings in one line, as people read them: last parts of paths."""
        return ", ".join(f"{path.rsplit('.', 1)[-1]} {_short(value)}" for path, value in self.settings.items())


def _short(value: Any) -> str:
    """Return a value as text; of a section, such as a trace, what tells it from others."""
    if isinstance(value, Mapping):
        return str(next((value[key] for key in ("method", "kind", "policy", "mode") if key in value), value))
    return str(value)


def cells_of(raw: dict[str, Any], axes: Axes, dilation: float) -> list[Cell]:
    """Return the cells of a grid, the last axis fastest, batch sizes within."""
    cells = []
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        spec = dilated(with_settings(raw, settings), dilation)
        for size in spec.workload.batch_sizes:
            workload = spec.workload.model_copy(update={"batch_sizes": [size], "num_batches": 1})
            alone = spec.model_copy(update={"workload": workload})
            cells.append(Cell(settings={**settings, BATCH_SIZE: size}, spec=alone))
    return cells


def network_key(spec: ScenarioSpec) -> str:
    """Return what two scenarios share if they run on the same network: who is joined to whom, and how fast."""
    cluster = spec.cluster
    links = [(link.source, link.target, f"{link.bandwidth:.9g}", dict(link.each)) for link in cluster.links]
    vertices = [(vertex.name, dict(vertex.each)) for vertex in (*cluster.devices, *cluster.nics, *cluster.switches)]
    return repr((vertices, links))

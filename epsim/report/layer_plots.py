"""One measure by MoE layer, a line per method with its standard error: `by_layer_figure`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from epsim.report.figure import figure_style, png

# Paul Tol's "muted", which colour-blind readers can tell apart; after seven methods the line changes.
COLOURS = ("#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee", "#aa4499", "#999933")
STYLES = ("-", "--", ":")
MARKERS = "osD^vP*Xh<>dp8"


@dataclass(frozen=True, kw_only=True)
class LayerLine:
    """A method. values, errors: of each layer, None where there is no value, or no standard error of it."""

    label: str
    values: Sequence[float | None]
    errors: Sequence[float | None]


def by_layer_figure(
    lines: Sequence[LayerLine], layer_ids: Sequence[int], *, title: str, label: str, top: float | None = None
) -> bytes:
    """Return the PNG. label: of the vertical axis, which begins at 0; top: where it ends, None: by the values."""
    with figure_style():
        return png(_figure(lines, layer_ids, title, label, top))


def _figure(lines: Sequence[LayerLine], layer_ids: Sequence[int], title: str, label: str, top: float | None) -> Any:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for at, line in enumerate(lines):
        shift = 0.06 * (at - (len(lines) - 1) / 2) / max(len(lines) / 4, 1)  # bars of equal values stay apart
        ax.errorbar(
            np.array(layer_ids) + shift,
            np.array(line.values, dtype=np.float64),
            yerr=np.nan_to_num(np.array(line.errors, dtype=np.float64)),
            color=COLOURS[at % len(COLOURS)],
            linestyle=STYLES[at // len(COLOURS) % len(STYLES)],
            marker=MARKERS[at % len(MARKERS)],
            markersize=4.5,
            linewidth=1.2,
            capsize=2,
            label=line.label,
        )
    ax.set_ylim(0, top)
    ax.set_xticks(list(layer_ids))
    ax.set_xlabel("MoE layer (id in the model)")
    ax.set_ylabel(label)
    figure.legend(loc="outside right center", fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return figure

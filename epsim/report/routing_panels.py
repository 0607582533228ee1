"""What figures of routing share: `panels`, `shown_layers`, `footer`, and one colour for each modality.

The colours (Okabe and Ito's orange and blue) differ for colour-blind readers and in grey.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from epsim.report.origin import origin_line

MODALITY_COLOURS = {"vision": "#e69f00", "text": "#0072b2"}
NOTHING_COLOUR = "#999999"
_CHARACTERS_PER_INCH = 15  # of the footer's 8 points
COLUMNS = 4


def panels(number: int, *, sharey: bool) -> tuple[Any, list[Any]]:
    """Return a figure and `number` axes in it, in rows of up to four; those of one row and column line up."""
    import matplotlib.pyplot as plt

    columns = min(number, COLUMNS)
    rows = math.ceil(number / columns)
    size = (max(8.0, 3.1 * columns), 1.5 + 1.8 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=sharey, squeeze=False, layout="constrained")
    for ax in axes.flat[number:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:number])


def chosen_layers(layers: Sequence[Any], most: int) -> list[Any]:
    """Return all layers, or `most` of them, evenly spaced, with the first and the last."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]


def shown_layers(stats: Mapping[str, Any], most: int) -> tuple[list[Any], str]:
    """Return at most `most` of the layers, and what a title says if these are not all."""
    layers, number = chosen_layers(stats["layers"], most), len(stats["layers"])
    return layers, f" ({len(layers)} of {number} MoE layers)" if len(layers) < number else ""


def label_layer_rows(ax: Any, layers: Sequence[Mapping[str, Any]], most: int) -> None:
    """Label the rows of a map, one per layer, with the layers' ids: at most `most` of them."""
    rows = chosen_layers(range(len(layers)), most)
    ax.set_yticks(rows, [str(layers[at]["layer_id"]) for at in rows])


def modality_colour_map() -> Any:
    """Return the colours from vision over white to text; values that are NaN are grey."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = MODALITY_COLOURS["vision"], "#f7f7f7", MODALITY_COLOURS["text"]
    return LinearSegmentedColormap.from_list("modality", list(ends)).with_extremes(bad=NOTHING_COLOUR)


def footer(figure: Any, stats: Mapping[str, Any], label: str = "") -> None:
    """Write below everything the label of a horizontal axis that all panels share, the trace, and its origin."""
    trace = stats["trace"]
    width = int(figure.get_figwidth() * _CHARACTERS_PER_INCH)
    lines = textwrap.wrap(f"{trace['name']}. {origin_line(trace)}", width)
    figure.supxlabel("\n".join([label, *lines] if label else lines), fontsize=8)

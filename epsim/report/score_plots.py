"""Modality fusion: soft modality scores by layer and modality, and token by token in one request: `score_figure`.

As SMoES figures 8 and S10 to S12.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from epsim.report.routing_panels import (
    COLUMNS,
    MODALITY_COLOURS,
    footer,
    label_layer_rows,
    modality_colour_map,
    shown_layers,
)

MOST_PANELS = 12

Stats = Mapping[str, Any]


def score_figure(stats: Stats, estimator: str, sample: Stats | None) -> Any:
    """Return the figure of one estimator: histograms of layers above, the map of the sample request below."""
    import matplotlib.pyplot as plt

    layers, some = shown_layers(stats, MOST_PANELS)
    columns = min(len(layers), COLUMNS)
    rows = math.ceil(len(layers) / columns)
    heights = [1.6] * rows + ([0.2, 2.6] if sample else [])
    figure = plt.figure(figsize=(max(8.0, 3.1 * columns), 1.6 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    axes = _histograms(figure, grid, layers, columns, estimator)
    shown = axes[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper right", ncols=2)
    if sample:
        _sample_map(figure, (grid[rows, :], grid[rows + 1, :]), stats, estimator, sample)
    figure.suptitle(f"Soft modality scores by estimator {estimator}{some}", fontsize=11, x=0.01, ha="left")
    footer(figure, stats)
    return figure


def _histograms(figure: Any, grid: Any, layers: Sequence[Stats], columns: int, estimator: str) -> list[Any]:
    axes: list[Any] = []
    for at, layer in enumerate(layers):
        ax = figure.add_subplot(grid[at // columns, at % columns], sharey=axes[0] if axes else None)
        axes.append(ax)
        _histogram(ax, layer["modality_scores"][estimator]["histogram"])
        ax.set_title(f"layer {layer['layer_id']}", fontsize=9)
        ax.tick_params(labelleft=at % columns == 0)
        if at % columns == 0:
            ax.set_ylabel("tokens of the\nmodality, %")
        if at + columns >= len(layers):
            ax.set_xlabel("score (0 vision, 1 text)")
    axes[0].set_ylim(bottom=0)
    return axes


def _histogram(ax: Any, histogram: Mapping[str, Sequence[int]]) -> None:
    """Share of each modality's tokens in each bin of the score."""
    for modality, counts in histogram.items():
        if total := sum(counts):
            share, edges = 100 * np.array(counts) / total, np.linspace(0, 1, len(counts) + 1)
            colour = MODALITY_COLOURS[modality]
            ax.stairs(share, edges, fill=True, color=colour, alpha=0.35)
            ax.stairs(share, edges, color=colour, linewidth=1.2, label=f"{modality} tokens")
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])


def _sample_map(figure: Any, places: tuple[Any, Any], stats: Stats, estimator: str, sample: Stats) -> None:
    """Token by layer, the score as a colour; above it a strip with the tokens' hard modality."""
    scores_LT = np.array(sample["scores"][estimator]).T
    hard_1T = np.where(np.array(sample["is_vision"]), 0.0, 1.0)[None, :]
    strip = figure.add_subplot(places[0])
    ax = figure.add_subplot(places[1], sharex=strip)
    num_layers, num_tokens = scores_LT.shape
    colours: dict[str, Any] = {"cmap": modality_colour_map(), "vmin": 0, "vmax": 1, "aspect": "auto"}
    strip.imshow(hard_1T, extent=(-0.5, num_tokens - 0.5, 0, 1), interpolation="nearest", **colours)
    extent = (-0.5, num_tokens - 0.5, num_layers - 0.5, -0.5)
    image = ax.imshow(scores_LT, extent=extent, **colours)
    strip.set_yticks([0.5], ["given"])
    strip.tick_params(labelbottom=False, length=0)
    strip.set_title(f"prompt of request {sample['request_id']}: score of each token in each layer", fontsize=9)
    label_layer_rows(ax, stats["layers"], 8)
    ax.set_ylabel("MoE layer")
    ax.set_xlabel("position in the prompt")
    ax.xaxis.get_major_locator().set_params(integer=True)
    bar = figure.colorbar(image, ax=ax, label="score")
    bar.set_ticks([0, 0.5, 1], labels=["0 vision", "0.5", "1 text"])

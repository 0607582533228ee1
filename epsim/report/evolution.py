"""How experts came to specialise in the course of training, a line per expert: `evolution_figure`.

As SMoES figures 7 and S5 to S9. Shapes: W rows of a training's log, L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.report.figure import figure_style, png
from epsim.report.routing_panels import COLUMNS, MODALITY_COLOURS, NOTHING_COLOUR, chosen_layers

NEITHER = 0.2  # up to this score an expert counts as of neither modality


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """One training.

    Attributes:
        title: of its row of panels.
        step_W: training steps.
        score_WLE: specialisation score of every expert, -1 vision to 1 text, NaN where it was never picked.
        layer_ids: of the L layers in the model.
    """

    title: str
    step_W: npt.NDArray[np.int64]
    score_WLE: npt.NDArray[np.floating[Any]]
    layer_ids: Sequence[int]


def evolution_figure(trainings: Sequence[Evolution]) -> bytes:
    """Return the PNG: a row per training, a panel per layer, at most four layers. All have the same layers."""
    with figure_style():
        return png(_figure(trainings))


def _figure(trainings: Sequence[Evolution]) -> Any:
    import matplotlib.pyplot as plt

    layers = chosen_layers(range(trainings[0].score_WLE.shape[1]), COLUMNS)
    size = (max(8.0, 3.1 * len(layers)), 1.2 + 2.3 * len(trainings))
    figure, axes = plt.subplots(
        len(trainings), len(layers), figsize=size, sharex="row", sharey=True, squeeze=False, layout="constrained"
    )
    for row, training in zip(axes, trainings, strict=True):
        for ax, layer in zip(row, layers, strict=True):
            _experts(ax, training, layer)
        row[0].set_ylabel(f"{training.title}\nspecialisation score")
    for ax in axes[-1]:
        ax.set_xlabel("training step")
    _legend(figure)
    figure.suptitle("Every expert in the course of training", fontsize=11, x=0.01, ha="left")
    return figure


def _experts(ax: Any, training: Evolution, layer: int) -> None:
    for score_W in training.score_WLE[:, layer].T:
        ax.plot(training.step_W, score_W, color=expert_colour(score_W), linewidth=0.7, alpha=0.75)
    ax.set_ylim(-1.05, 1.05)
    ax.set_yticks([-1, 0, 1], ["-1 vision", "0", "1 text"])
    ax.set_title(f"layer {training.layer_ids[layer]}", fontsize=9)


def expert_colour(score_W: npt.NDArray[np.floating[Any]]) -> str:
    """Return the colour of the modality that an expert ends with; grey for neither, or if it was never picked."""
    known = score_W[~np.isnan(score_W)]
    if not known.size or abs(known[-1]) <= NEITHER:
        return NOTHING_COLOUR
    return MODALITY_COLOURS["text" if known[-1] > 0 else "vision"]


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    named = [*MODALITY_COLOURS.items(), (f"neither (up to ±{NEITHER:g})", NOTHING_COLOUR)]
    lines = [Line2D([], [], color=colour, label=f"ends with {name}") for name, colour in named]
    figure.legend(handles=lines, loc="outside upper right", ncols=len(lines), fontsize=8)

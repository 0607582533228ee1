"""Balancedness and step time over the steps of a replay, as a PNG: `replay_figure`."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from epsim.report.figure import figure_style, png
from epsim.report.origin import origin_line
from epsim.units import format_time

Values = Mapping[str, Any]
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito
_BASELINE_COLOUR = "#777777"
_LABELS = (
    "balancedness of a step\n(sum of means / sum of maxima)",
    "step time without moves",
    "waiting for weights",
)
_CAPTION_CHARACTERS = 130
_DASHES = {"baseline": (0, (1, 1)), "fixed": (0, (4, 2)), "online": "-"}


def replay_figure(found: Values) -> bytes:
    """Return three panels over all steps: balancedness, step time, and how long a step waits for weights.

    Grey lines mark when placements are refitted. Raises InputError without matplotlib.
    """
    policies = list(dict.fromkeys(row["policy"] for row in found["rows"] if row["placement"] != "baseline"))
    design = found["design"]
    with figure_style(**{"text.parse_math": False}):
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(3, 1, figsize=(9.5, 8), sharex=True, layout="constrained")
        for row in found["rows"]:
            colour = _BASELINE_COLOUR
            if row["placement"] != "baseline":
                colour = _COLOURS[policies.index(row["policy"]) % len(_COLOURS)]
            _draw_steps(axes, row, colour)
            _draw_moves(axes[2], row, colour, policies)
        for ax, label in zip(axes, _LABELS, strict=True):
            ax.set_ylabel(label)
            for before in range(design["every"], design["num_steps"], design["every"]):
                ax.axvline(before - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes[0].set_ylim(top=1.02)
        axes[1].set_yscale("log")
        for ax in axes[1:]:
            ax.yaxis.set_major_formatter(lambda seconds, _: format_time(seconds))
            ax.yaxis.set_minor_formatter(lambda seconds, _: format_time(seconds))
            ax.tick_params(which="both", labelsize=7)
        axes[2].set_ylim(bottom=0)
        origin = f"{found['trace']['name']}. {origin_line(found['trace'])}"
        axes[2].set_xlabel(
            f"step; {design['num_batches']} batches of {design['batch_size']}, each a prefill and its decode steps; "
            f"grey: refitted\n{textwrap.fill(origin, _CAPTION_CHARACTERS)}",
            fontsize=8,
        )
        axes[0].set_title(
            f"Refitted every {design['every']} steps to the last {design['window']}", loc="left", fontsize=11
        )
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=8)
        return png(figure)


def _draw_steps(axes: Any, row: Values, colour: str) -> None:
    values, kind = row["steps"], row["placement"]
    for ax, name in zip(axes[:2], ("balancedness_ratio_of_sums", "step_s"), strict=True):
        ax.plot(
            range(len(values[name])), values[name], color=colour, linestyle=_DASHES[kind], linewidth=1.3,
            drawstyle="steps-mid", label=f"{row['policy']}, {kind}",
        )  # fmt: skip


def _draw_moves(ax: Any, row: Values, colour: str, policies: Sequence[str]) -> None:
    """Draw a bar for each rebalance, those of different policies side by side."""
    if row["rebalances"]:
        width = 0.8 / len(policies)
        at = -0.5 + width * (0.5 + policies.index(row["policy"]))
        steps = [move["before_step"] + at for move in row["rebalances"]]
        ax.bar(steps, [move["moving_s"] for move in row["rebalances"]], width=width, color=colour)

"""The figure of docs/exchange.md, predicted against published times of held-out rows: `draw_exchange_figure`."""

from collections.abc import Mapping
from typing import Any

from epsim.report.figure import figure_style, png

FIGURE_NAME = "exchange.png"
_PANELS = (
    ("DeepEP low latency, fitted to one node", ("low-latency",)),
    ("the same, network fitted to two nodes", ("low-latency-network",)),
    ("DeepEP normal (transmit)", ("normal",)),
    ("NCCL, H100 and A100", ("nccl-h100", "nccl-a100")),
)
_COLOURS = ("#4477aa", "#cc6633", "#228855", "#aa3377")


def draw_exchange_figure(report: Mapping[str, Any]) -> bytes:
    """Return the PNG file; raises InputError where matplotlib is not installed."""
    with figure_style():
        import matplotlib.pyplot as plt
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure, axes = plt.subplots(1, len(_PANELS), figsize=(12, 3.3), layout="constrained")
        for ax, (title, studies) in zip(axes, _PANELS, strict=True):
            own = [cell for cell in report["cells"] if cell["study"] in studies and not cell["fitted"]]
            groups = dict.fromkeys(_group(cell) for cell in own)
            for colour, group in zip(_COLOURS, groups, strict=False):
                points = [(cell["published_us"], cell["predicted_us"]) for cell in own if _group(cell) == group]
                ax.plot(*zip(*points, strict=True), "o", markersize=2.5, color=colour, label=group, alpha=0.6)
            times = [cell["published_us"] for cell in own] or [1.0]
            ends = [0.8 * min(times), 1.2 * max(times)]
            ax.plot(ends, ends, color="black", linewidth=0.8)
            for factor in (0.85, 1.15):
                ax.plot(ends, [factor * end for end in ends], color="black", linewidth=0.5, linestyle=":")
            ax.set(xscale="log", yscale="log", xlabel="published, us", ylabel="predicted, us", xlim=ends)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_minor_formatter(NullFormatter())
                axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if ends[1] < 50 * ends[0] else (1.0,)))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.set_title(title, fontsize=9)
            ax.legend(loc="upper left", fontsize=7)
        return png(figure)


def _group(cell: Mapping[str, Any]) -> str:
    """Return what a point is coloured by: the operation for NCCL, else the number of nodes."""
    return cell["kind"] if cell["message_bytes"] else f"{cell['gpus'] // 8} nodes"

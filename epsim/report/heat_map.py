"""Who sends how much to whom: `pair_maps` for the terminal, `heat_map` as a PNG; a map per policy, on one scale.

Colours are those of matplotlib's cividis, which colour-blind readers see as others do. Letters: R devices (sender, then
receiver).
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.control import strip_control_codes
from rich.text import Text

from epsim.report.figure import figure_style, png
from epsim.report.origin import origin_line
from epsim.units import format_size

CIVIDIS = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip
COLUMNS = 4
_WIDEST_WITH_NUMBERS = 8  # devices
_MOST_TICKS = 16
_TITLE_CHARACTERS = 30  # of a line over a map
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_NOTHING_COLOUR = "#d9d9d9"

Values = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def pair_maps(found: Values) -> RenderableType:
    """Return a map of each policy of a comparison for the terminal.

    Up to 8 devices cells are numbers; with more, tenths of the largest cell of all maps, 0 to 9, and blank for nothing.
    """
    maps = _maps(found)
    largest, scale, unit = _scale(maps)
    has_numbers = len(found["devices"]) <= _WIDEST_WITH_NUMBERS
    cells = unit if has_numbers else f"tenths of {largest / scale:.3g} {unit}, the most in any map; blank: nothing"
    title = Text(f"\n{_title(found)}; a row sends, a column receives; {cells}", style="bold")
    return Group(
        title,
        Text("; ".join(f"{r} {strip_control_codes(name)}" for r, name in enumerate(found["devices"])), style="dim"),
        *(_pair_map(name, bytes_RR, largest, scale if has_numbers else None) for name, bytes_RR in maps.items()),
    )


def _pair_map(name: str, bytes_RR: Floats, largest: float, scale: float | None) -> Text:
    """Return a policy's map; scale: bytes of the unit, None for tenths."""
    width = 3 if scale is None else 8
    text = Text(f"\n{strip_control_codes(name)}\n")
    text.append("      " + "".join(f"{r:>{width}}" for r in range(len(bytes_RR))) + "\n", style="dim")
    for sender, row_R in enumerate(bytes_RR):
        text.append(f"{sender:>5} ", style="dim")
        for receiver, size in enumerate(row_R):
            if sender == receiver:
                text.append(f"{'-':>{width}}", style="dim")
                continue
            step = min(9, int(10 * size / largest)) if largest else 0
            digits = f"{step if size else ' '}" if scale is None else f"{size / scale:.2f}"
            text.append(f"{digits:>{width}}", style=f"{'#ffffff' if step < 5 else '#000000'} on {CIVIDIS[step]}")
        text.append("\n")
    return text


def heat_map(found: Values) -> bytes:
    """Return the maps of all policies of a comparison as one PNG. Raises InputError where matplotlib is missing."""
    maps = _maps(found)
    largest, scale, unit = _scale(maps)
    columns = min(len(maps), COLUMNS)
    rows, side = math.ceil(len(maps) / columns), 2.6 if len(found["devices"]) <= _WIDEST_WITH_NUMBERS else 3.4
    with figure_style(**{"text.parse_math": False, "axes.spines.top": True, "axes.spines.right": True}):
        import matplotlib.pyplot as plt

        size = (max(5.5, side * columns + 1.2), (side + 0.5) * rows + 1.3)
        figure, axes = plt.subplots(
            rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for at in range(len(maps), rows * columns):
            axes.flat[at].set_visible(False)
            axes.flat[at - columns].tick_params(labelbottom=True)
        for ax, (name, bytes_RR) in zip(axes.flat, maps.items(), strict=False):
            image = _draw(ax, bytes_RR / scale, largest / scale, found)
            label = "\n".join(textwrap.wrap(name, _TITLE_CHARACTERS, break_on_hyphens=False))
            ax.set_title(f"{label}\n{format_size(float(bytes_RR.sum()))} in all", fontsize=9)
        figure.colorbar(
            image, ax=axes, label=f"{unit} from a sender to a receiver", shrink=min(1.0, 2.4 / (side * rows) + 0.4)
        )
        figure.suptitle(_wrapped(_title(found), size[0], 11), fontsize=11, x=0.01, ha="left")
        figure.supylabel("sender", fontsize=9)
        source = f"{found['trace']['name']}. {origin_line(found['trace'])}"
        figure.supxlabel(f"receiver\n{_wrapped(source, size[0], 8)}", fontsize=8)
        return png(figure)


def _wrapped(text: str, width_inches: float, font_points: float) -> str:
    """Return the text in lines that fit a width; a character takes 0.55 of its height, 72 points are an inch."""
    return textwrap.fill(text, int(width_inches * 72 / (0.55 * font_points)))


def _draw(ax: Any, values_RR: Floats, largest: float, found: Values) -> Any:
    """Draw one map: grey where a device would send to itself, a line between nodes, numbers where there is room."""
    num_devices, names = len(values_RR), found["devices"]
    shown = np.ma.masked_where(np.eye(num_devices, dtype=bool), values_RR)
    ax.set_facecolor(_NOTHING_COLOUR)
    image = ax.imshow(shown, cmap="cividis", vmin=0, vmax=largest or 1.0, interpolation="nearest")
    step = math.ceil(num_devices / _MOST_TICKS)
    ticks = list(range(0, num_devices, step))
    ax.set_xticks(ticks, [names[r] for r in ticks], rotation=90 if num_devices > 2 else 0, fontsize=7)
    ax.set_yticks(ticks, [names[r] for r in ticks], fontsize=7)
    nodes = found["node_of_device"]
    if 1 < len(set(nodes)) < num_devices:
        for r in range(1, num_devices):
            if nodes[r] != nodes[r - 1]:
                ax.axhline(r - 0.5, color="white", linewidth=1.2)
                ax.axvline(r - 0.5, color="white", linewidth=1.2)
    if num_devices <= _WIDEST_WITH_NUMBERS:
        for sender in range(num_devices):
            for receiver in range(num_devices):
                if sender != receiver:
                    value = values_RR[sender, receiver]
                    words = f"{value:.0f}" if value >= 10 or not value else f"{value:.1f}"
                    colour = "white" if value < 0.45 * largest else "black"  # equal contrast at that grey
                    size = 9 if num_devices <= 4 else 7
                    ax.text(receiver, sender, words, ha="center", va="center", color=colour, fontsize=size)
    return image


def _title(found: Values) -> str:
    return f"Sent by the {found['design']['num_held_out']} held-out requests of the first split, dispatch and combine"


def _maps(found: Values) -> dict[str, Floats]:
    return {policy["policy"]: np.array(policy["sent_bytes"], dtype=np.float64) for policy in found["policies"]}


def _scale(maps: Mapping[str, Floats]) -> tuple[float, float, str]:
    """Return the largest cell of all maps in bytes, and a unit that fits it: its bytes and its name."""
    largest = max(float(bytes_RR.max()) for bytes_RR in maps.values())
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if largest >= scale), (1.0, "B"))
    return largest, scale, unit

"""Figures of what `epsim.trace_stats.trace_stats` returns, PNG files by name: `draw_routing`; `left_out`: which not.

Experts by modality, their scores, and the measures by layer; `epsim.report.score_plots` draws modality scores. Every
figure has a footer with the trace and its origin. matplotlib is loaded only when something is drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from epsim.report.figure import figure_style, png
from epsim.report.routing_panels import (
    MODALITY_COLOURS,
    footer,
    label_layer_rows,
    modality_colour_map,
    panels,
    shown_layers,
)
from epsim.report.score_plots import score_figure
from epsim.report.trace_stats import missing_modality

MOST_PANELS = 16
_MSI_COLOUR, _JSD_COLOUR, _MRD_COLOUR = "#000000", "#009e73", "#cc79a7"

Stats = Mapping[str, Any]


def draw_routing(stats: Stats, sample: Stats | None = None) -> dict[str, bytes]:
    """Return the PNG files by name: always the distribution, the others where the trace has what they show.

    sample: scores of one request (`epsim.trace_stats.sample_request`). Raises InputError where matplotlib is missing.
    """
    drawn = {"routing-distribution.png": _distribution}
    if stats["trace"]["has_both_modalities"]:
        drawn |= {"specialization-by-layer.png": _measures, "expert-specialization.png": _experts}
    with figure_style(**{"text.parse_math": False}):
        files = {name: png(draw(stats)) for name, draw in drawn.items()}
        for name in stats["trace"]["estimators"]:
            files[f"modality-scores-{quote(name, safe='')}.png"] = png(score_figure(stats, name, sample))
    return files


def left_out(stats: Stats) -> list[str]:
    """Return a line for each kind of figure that the trace has nothing for."""
    trace = stats["trace"]
    lines = []
    if not trace["has_both_modalities"]:
        lines.append(f"no figures of specialisation: the trace has no {missing_modality(trace)} tokens")
    if not trace["estimators"]:
        lines.append("no figures of modality scores: the trace has none")
    return lines


def _distribution(stats: Stats) -> Any:
    """Routed pairs of each expert, vision below text, experts by text bias, as SMoES figures 6 and S2 to S4."""
    layers, some = shown_layers(stats, MOST_PANELS)
    has_both, num_bins = stats["trace"]["has_both_modalities"], stats["parameters"]["num_bins"]
    figure, axes = panels(len(layers), sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        _stacked(ax, layer, num_bins, by_bias=has_both)
        msi = f", MSI {layer['msi']:.2f}" if has_both else ""
        ax.set_title(f"layer {layer['layer_id']}{msi}", fontsize=9)
    order = "sorted by text bias in each layer" if has_both else "by expert id"
    figure.suptitle(f"Routed pairs of each expert, by modality of the token{some}", fontsize=11, x=0.01, ha="left")
    figure.supylabel("routed (token, expert) pairs", fontsize=9)
    size = stats["trace"]["num_experts"] // num_bins
    idle = "; a gap is an expert without tokens" if any(_idle(layer) for layer in layers) else ""
    label = f"experts {order}, a column each, in {num_bins} bins of {size}{idle}"
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    footer(figure, stats, label)
    return figure


def _idle(layer: Stats) -> bool:
    return bool((np.sum(list(layer["expert_load"].values()), axis=0) == 0).any())


def _stacked(ax: Any, layer: Stats, num_bins: int, *, by_bias: bool) -> None:
    load = {kind: np.array(values) for kind, values in layer["expert_load"].items()}
    order = layer["experts_by_text_bias"] if by_bias else slice(None)
    vision, text = load["prefill_vision"][order], (load["prefill_text"] + load["decode_text"])[order]
    edges = np.arange(len(vision) + 1)
    if vision.any():
        ax.stairs(vision, edges, fill=True, color=MODALITY_COLOURS["vision"], label="vision tokens")
    if text.any():
        ax.stairs(vision + text, edges, baseline=vision, fill=True, color=MODALITY_COLOURS["text"], label="text tokens")
    size = len(vision) // num_bins
    for bound in range(size, len(vision), size):
        ax.axvline(bound, color="#888888", linewidth=0.5, linestyle=":")
    ax.set_xticks([size * (b + 0.5) for b in range(num_bins)], [str(b + 1) for b in range(num_bins)])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(0, len(vision))


def _measures(stats: Stats) -> Any:
    """MSI and Jensen-Shannon divergence by layer; below them the MRD distance, if there are gate weights."""
    import matplotlib.pyplot as plt

    has_weights = stats["trace"]["has_gate_weights"]
    figure, axes = plt.subplots(
        1 + has_weights, 1, figsize=(8, 6.5 if has_weights else 4), sharex=True, squeeze=False, layout="constrained"
    )
    layers, upper = stats["layers"], axes[0][0]
    ids = [layer["layer_id"] for layer in layers]
    for name, label, colour, style in (
        ("msi", "MSI (SMoES eq. 19)", _MSI_COLOUR, "-o"),
        ("jensen_shannon_bits", "Jensen-Shannon divergence of expert loads, bits", _JSD_COLOUR, "--s"),
    ):
        upper.plot(ids, [layer[name] for layer in layers], style, color=colour, markersize=4, label=label)
    upper.set_ylim(-0.02, 1.02)
    upper.set_ylabel("0: no specialisation, 1: complete")
    if has_weights:
        _distance(axes[1][0], ids, layers, stats["parameters"]["kl_smoothing"])
    for ax in axes.flat:
        ax.legend(fontsize=8)
    _whole_ids(axes[-1][0], ids)
    figure.suptitle("Specialisation by modality in each MoE layer", fontsize=11)
    footer(figure, stats, "MoE layer (id in the model)")
    return figure


def _distance(ax: Any, ids: Sequence[int], layers: Sequence[Stats], epsilon: float) -> None:
    exact = [layer["mrd_distance_nats"] for layer in layers]
    smoothed = [layer["mrd_distance_smoothed_nats"] for layer in layers]
    infinite = [at for at, layer in enumerate(layers) if exact[at] is None and layer["num_one_sided_experts"]]
    whole: dict[str, Any] = {"markersize": 5, "clip_on": False}  # markers at the upper edge
    if len(infinite) < len(layers):
        label = "MRD distance (SMAR eq. 10)"
        ax.plot(ids, np.array(exact, dtype=np.float64), "o", color=_MRD_COLOUR, label=label, **whole)
    label = f"MRD distance (SMAR eq. 10) with {epsilon:g} added to every expert's share"
    ax.plot(ids, smoothed, "--", color="#555555", linewidth=1, label=label)
    if infinite:
        label = "infinite without it: some expert has one modality alone"
        at_height = [smoothed[at] for at in infinite]
        at_ids = [ids[at] for at in infinite]
        ax.plot(at_ids, at_height, "^", color="#555555", markerfacecolor="white", label=label, **whole)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("symmetric KL divergence, nats")


def _experts(stats: Stats) -> Any:
    """A row per layer, a cell per expert, by specialization score: how many experts lean how far."""
    import matplotlib.pyplot as plt

    scores_LE = np.sort(
        np.array([layer["specialization_score"] for layer in stats["layers"]], dtype=np.float64), axis=1
    )
    num_layers, num_experts = scores_LE.shape
    figure, ax = plt.subplots(figsize=(9, 2.2 + 0.16 * max(num_layers, 8)), layout="constrained")
    image = ax.imshow(
        scores_LE, cmap=modality_colour_map(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0.5, num_experts + 0.5, num_layers - 0.5, -0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=ax, label="specialisation score")
    bar.set_ticks([-1, -0.5, 0, 0.5, 1], labels=["-1 vision only", "-0.5", "0 both alike", "0.5", "1 text only"])
    label_layer_rows(ax, stats["layers"], 24)
    ax.set_ylabel("MoE layer (id in the model)")
    idle = "; grey: never chosen" if np.isnan(scores_LE).any() else ""
    figure.suptitle("Specialisation of the experts of each MoE layer", fontsize=11)
    footer(figure, stats, f"experts of the layer, from the most vision-leaning to the most text-leaning{idle}")
    return figure


def _whole_ids(ax: Any, ids: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    ax.set_xlim(min(ids) - 0.5, max(ids) + 0.5)

"""Tables of what `epsim.trace_stats.trace_stats` returns: `trace_stats_tables`, at most 100 columns wide."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.control import strip_control_codes
from rich.table import Table
from rich.text import Text

from epsim.report.origin import origin_line
from epsim.report.table import new_table

WIDTH = 100
_KINDS = {
    "prefill_vision": "prefill V",
    "prefill_text": "prefill T",
    "prefill": "prefill V+T",
    "decode_text": "decode T",
    "all": "all",
}
_RATIOS = {"prefill_vision": "prefill V", "prefill_text": "prefill T", "prefill_all": "prefill V+T"}
_RATIOS |= {"decode_text": "decode T"}
_ESTIMATORS_PER_TABLE = 3

Stats = Mapping[str, Any]


def trace_stats_tables(stats: Stats) -> RenderableType:
    """Return the tables: by layer, scores by layer, evenness of load, transfer ratios; and notes on what they mean."""
    return Group(
        _title(stats),
        _layer_table(stats),
        *_score_tables(stats),
        _load_table(stats),
        _ratio_table(stats),
        Text("\n" + "\n".join(_wrapped(note) for note in notes(stats))),
    )


def notes(stats: Stats) -> Iterator[str]:
    """Yield what a reader of the figures must know, one sentence or two each."""
    trace, parameters, overall = stats["trace"], stats["parameters"], stats["overall"]
    has_both = trace["has_both_modalities"]
    if not has_both:
        yield f"The trace has no {missing_modality(trace)} tokens: what compares vision and text is not defined (-)."
    yield from _fitted_notes(parameters, has_both)
    if not trace["has_gate_weights"]:
        yield "The trace has no gate weights: no MRD distance."
    if overall["num_one_sided_experts"]:
        yield (
            "MRD distance inf: experts used by one modality alone are "
            f"{overall['num_one_sided_experts']} over all layers. Smoothed: with {parameters['kl_smoothing']:g} added "
            "to every expert's share."
        )
    if trace["num_weightless_visits"]:
        yield f"Not in the MRD: {trace['num_weightless_visits']} (token, layer) visits whose gate weights are all 0."
    if overall["num_idle_experts"]:
        in_msi = "; in the MSI they count as 0" if has_both else ""
        yield f"Experts that no token chose: {overall['num_idle_experts']} over all layers{in_msi}."


def _fitted_notes(parameters: Stats, has_both: bool) -> Iterator[str]:
    if parameters["placement_fitted_to_this_trace"]:
        name = parameters["placement"]
        yield (
            f"In sample: placement {name} is fitted to this very trace; expect more to cross elsewhere."
            if has_both or name != "modality_bins"
            else "With one modality, placement modality_bins has nothing to go by but which experts were never chosen."
        )
    if parameters["homes_fitted_to_this_trace"] and parameters["num_devices"] > 1:
        yield (
            "In sample: homes by_modality are chosen by the expert loads of this very trace."
            if has_both
            else "With one modality, homes by_modality are the devices in their order."
        )


def _title(stats: Stats) -> Text:
    trace, parameters = stats["trace"], stats["parameters"]
    tokens = trace["num_tokens"]
    kinds = f"prefill vision {tokens['prefill_vision']}, prefill text {tokens['prefill_text']}"
    text = Text(_wrapped(origin_line(trace)) + "\n", style="yellow")
    text.append(_wrapped(trace["name"]) + "\n", style="not yellow bold")
    shape = f"{len(trace['layer_ids'])} MoE layers x top-{trace['topk']} of {trace['num_experts']} experts"
    text.append(f"{shape}, {trace['num_requests']} requests\n", style="not yellow")
    text.append(f"tokens: {kinds}, decode text {tokens['decode_text']}\n", style="not yellow")
    devices = f"{parameters['num_devices']} devices, placement {parameters['placement']}, homes {parameters['homes']}"
    homes = f"prefill on {_some(parameters['prefill_devices'])}, decode on {_some(parameters['decode_devices'])}"
    text.append(_wrapped(f"{devices}: {homes}"), style="not yellow")
    return text


def _layer_table(stats: Stats) -> Table:
    titles = ("layer", "MSI", "JSD, bits", "MRD dist., nats", "smoothed", "even: experts", "devices", "remote: P", "D")
    table = new_table(
        "\nBy MoE layer (even: load, mean / maximum; remote: % of routed pairs, prefill and decode)", *titles
    )
    for layer in stats["layers"]:
        remote = layer["remote_pairs_frac"]
        table.add_row(
            str(layer["layer_id"]),
            *_measures(layer),
            *(_share(layer[name]["all"]) for name in ("expert_balancedness", "device_balancedness")),
            *(_percent(remote[phase]) for phase in ("prefill", "decode")),
        )
    table.add_section()
    overall, pairs = stats["overall"], stats["transfer_ratio"]["without_dedup"]
    table.add_row(
        "all",
        *_measures(overall),
        *(_even(overall[name]["all"]) for name in ("expert_balancedness", "device_balancedness")),
        *(_percent(pairs[name]) for name in ("prefill_all", "decode_text")),
        style="bold",
    )
    return table


def _measures(values: Stats) -> tuple[str, str, str, str]:
    exact, one_sided = values["mrd_distance_nats"], values["num_one_sided_experts"]
    return (
        _share(values["msi"]),
        _share(values["jensen_shannon_bits"]),
        "inf" if exact is None and one_sided else _share(exact),
        _share(values["mrd_distance_smoothed_nats"]),
    )


def _score_tables(stats: Stats) -> Iterator[Table]:
    """Mean scores, a few estimators to a table, and the correlations of pairs of them."""
    names = stats["trace"]["estimators"]
    for first in range(0, len(names), _ESTIMATORS_PER_TABLE):
        yield _score_table(stats, names[first : first + _ESTIMATORS_PER_TABLE])
    if pairs := stats["overall"]["score_correlation"]:
        table = new_table("\nCorrelation of scores, all layers", "estimators", "Pearson")
        for pair, value in pairs.items():
            table.add_row(Text(strip_control_codes(pair)), _share(value))
        yield table


def _score_table(stats: Stats, names: Sequence[str]) -> Table:
    heads = [f"{strip_control_codes(name)} {kind}" for name in names for kind in ("vision", "text")]
    table = new_table("\nMean modality score (0 vision, 1 text) of vision and of text tokens", "layer", *heads)
    for layer in stats["layers"]:
        means = [layer["modality_scores"][name]["mean"][kind] for name in names for kind in ("vision", "text")]
        table.add_row(str(layer["layer_id"]), *map(_share, means))
    table.add_section()
    overall = stats["overall"]["mean_modality_score"]
    table.add_row("mean", *(_share(overall[name][kind]) for name in names for kind in ("vision", "text")), style="bold")
    return table


def _load_table(stats: Stats) -> Table:
    table = new_table("\nEvenness of load over the whole trace (mean / maximum; 1 is even)", "of", *_KINDS.values())
    overall = stats["overall"]
    experts, devices = overall["expert_balancedness"], overall["device_balancedness"]
    table.add_row("experts", *(_even(experts[kind]) for kind in _KINDS))
    known = {"prefill": devices["prefill"], "decode_text": devices["decode"], "all": devices["all"]}
    table.add_row("devices", *(_even(known.get(kind)) for kind in _KINDS))
    return table


def _ratio_table(stats: Stats) -> Table:
    title = "\nCross-device transfer ratio, % (as SMoES table S10)"
    table = new_table(title, "", *_RATIOS.values())
    for way, name in (("without_dedup", "pairs, without dedup"), ("with_dedup", "tokens, with dedup")):
        table.add_row(name, *(_percent(stats["transfer_ratio"][way][column]) for column in _RATIOS))
    return table


def missing_modality(trace: Stats) -> str:
    """Return which modality a trace without both has no tokens of."""
    return "text" if trace["num_tokens"]["prefill_vision"] else "vision"


def _some(devices: Sequence[int]) -> str:
    return ", ".join(map(str, devices)) if len(devices) <= 8 else f"{devices[0]} to {devices[-1]} ({len(devices)})"


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(strip_control_codes(text), WIDTH, break_on_hyphens=False))


def _even(forms: Stats | None) -> str:
    return "-" if forms is None else _share(forms["ratio_of_sums"])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

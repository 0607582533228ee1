"""Tables for the terminal, made with rich from the plain results of a run: `simulation_tables`, `comparison_tables`."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.control import strip_control_codes
from rich.table import Table
from rich.text import Text

from epsim.report.origin import origin_line, origin_words
from epsim.report.table import new_table
from epsim.units import format_size, format_time

_PART_NAMES = {"dense_ffn": "dense FFN"}
_RATIO_COLUMNS = {
    "prefill_vision": "prefill V",
    "prefill_text": "prefill T",
    "prefill_all": "prefill V+T",
    "decode_text": "decode T",
}
_BUSIEST_LINKS = 4


def simulation_tables(results: dict[str, Any]) -> RenderableType:
    """Return all tables of one scenario."""
    sizes = results["batch_sizes"]
    return Group(
        _title(results),
        _latency_table(sizes, results["scenario"]["workload"]["slo"]),
        _ratio_table(sizes),
        *(_parts_table(sizes, phase) for phase in ("prefill", "decode") if any(size[phase] for size in sizes)),
        _network_table(sizes),
        _memory_table(sizes),
    )


def _title(results: dict[str, Any]) -> Text:
    scenario, trace, homes = results["scenario"], results["trace"], results["homes"]
    transmission, placement = scenario["transmission"], scenario["placement"]
    text = Text(strip_control_codes(scenario["name"]), style="bold")
    num_chunks = transmission["num_chunks"] if transmission["mode"] == "async" else 1
    chunks = f" in {num_chunks} chunks" if num_chunks > 1 else ""
    spread = ""
    if scenario["parallelism"]["kind"] not in ("tp", "dp"):  # there experts are nowhere in particular
        spread = f"; placement {placement['policy']}, {transmission['mode']}{chunks}, dedup {transmission['dedup']}"
    text.append(
        f"\n{scenario['model']['name']} on {scenario['cluster']['name']}; {results['parallelism']}{spread}, "
        f"fidelity {scenario['simulation']['fidelity']}\n"
        f"homes: prefill on {_some(homes['prefill'])}, decode on {_some(homes['decode'])}\n",
        style="not bold",
    )
    text.append(origin_line(trace), style="yellow not bold")
    return text


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:3])}, .. ({len(names)} devices)"


def _latency_table(sizes: list[dict[str, Any]], slo: dict[str, Any]) -> Table:
    """TPOT holds the wait for KV caches after the prefill; goodput is there where limits are."""
    has_limits = any(slo.values())
    columns = [
        "batch",
        "TTFT",
        "KV wait",
        "TPOT",
        "end to end",
        "output tokens/s",
        *(["goodput/s"] if has_limits else []),
    ]
    table = new_table("\nLatency and throughput (means over requests)", *columns, "balancedness, prefill", "decode")
    for size in sizes:
        cells = [
            format_time(size["ttft_s"]["mean"]),
            format_time(size["kv_exposed_s"]),
            format_time(size["tpot_s"]["mean"]) if size["tpot_s"] else "-",
            format_time(size["e2e_s"]["mean"]),
            f"{size['output_tokens_per_s']:.4g}",
            *([f"{size['goodput_rps']:.4g}"] if has_limits else []),
        ]
        table.add_row(str(size["batch_size"]), *cells, *(_balancedness(size[phase]) for phase in ("prefill", "decode")))
    return table


def _balancedness(phase: dict[str, Any] | None) -> str:
    return f"{phase['balancedness']['ratio_of_sums']:.2f}" if phase and phase["balancedness"] else "-"


def _ratio_table(sizes: list[dict[str, Any]]) -> Table:
    table = new_table(
        "\nTransfer ratios in % (V vision, T text): remote (token, expert) pairs, no dedup | remote tokens, dedup",
        "batch", *_RATIO_COLUMNS.values(), *(f"| {name}" for name in _RATIO_COLUMNS.values()),
    )  # fmt: skip
    for size in sizes:
        shares = [
            size["transfer_ratio"][way][name] for way in ("without_dedup", "with_dedup") for name in _RATIO_COLUMNS
        ]
        table.add_row(str(size["batch_size"]), *("-" if share is None else f"{100 * share:.1f}" for share in shares))
    return table


def _parts_table(sizes: list[dict[str, Any]], phase: str) -> Table:
    present = [size for size in sizes if size[phase]]
    names = [name for name in present[0][phase]["parts_s"] if any(size[phase]["parts_s"][name] for size in present)]
    staged = any(size[phase]["staging_s"] for size in present)
    unit = "the prefill" if phase == "prefill" else "a decode step"
    title = f"\nWhere {unit} goes (mean over devices; dispatch and combine are what is not hidden)"
    headings = [_PART_NAMES.get(name, name) for name in names]
    table = new_table(title, "batch", "step", *headings, *(["host staging busy"] if staged else []))
    for size in present:
        cells = [f"{format_time(size[phase]['parts_s'][name])}" for name in names]
        if staged:
            cells.append(format_time(size[phase]["staging_s"]))
        table.add_row(str(size["batch_size"]), format_time(size[phase]["step_s"]), *cells)
    return table


def _network_table(sizes: list[dict[str, Any]]) -> Table:
    table = new_table(
        "\nBusiest links (share of time held, bytes per step)",
        "batch",
        "phase",
        "link",
        "held",
        "bytes",
    )
    for size in sizes:
        for phase in ("prefill", "decode"):
            if not size[phase]:
                continue
            links = sorted(size[phase]["links"].items(), key=lambda item: (-item[1]["busy_frac"], item[0]))
            for row, (name, link) in enumerate(links[:_BUSIEST_LINKS]):
                if link["bytes_per_step"]:
                    table.add_row(
                        str(size["batch_size"]) if row == 0 else "",
                        phase if row == 0 else "",
                        name,
                        f"{100 * link['busy_frac']:.1f} %",
                        format_size(link["bytes_per_step"]),
                    )
    return table


def _memory_table(sizes: list[dict[str, Any]]) -> Table:
    table = new_table(
        "\nMemory of the fullest device",
        "batch",
        "device",
        "experts",
        "other weights",
        "KV cache",
        "buffers",
        "total",
        "usable",
    )
    for size in sizes:
        name, account = max(size["memory_bytes"].items(), key=lambda item: item[1]["total"] - item[1]["usable"])
        items = ("experts", "other_weights", "kv_cache", "buffers", "total", "usable")
        table.add_row(str(size["batch_size"]), name, *(format_size(account[item]) for item in items))
    return table


_COMPARED = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "end to end", "output_tokens_per_s": "tokens/s"}


_RESOURCES = {
    "prefill_sent_bytes_per_step": "a prefill",
    "decode_sent_bytes_per_step": "a decode step",
    "sent_bytes_per_output_token": "an output token",
    "fullest_device_memory_bytes": "memory of the fullest device",
    "all_devices_memory_bytes": "of all devices",
}


def comparison_tables(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> RenderableType:
    """Return tables of times and of bytes per batch size; rows as `epsim.compare.compare` makes them, best first."""
    headings = [heading for name in _COMPARED.values() for heading in (name, "change")]
    origins = sorted({row["trace_origin"] for row in rows})
    tables: list[RenderableType] = [Text("; ".join(map(origin_words, origins)), style="yellow")]
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        times = new_table(f"\nBatch {batch_size}", *_short(axes), *headings)
        sizes = new_table(
            f"\nBatch {batch_size}: bytes sent between devices in .., memory", *_short(axes), *_RESOURCES.values()
        )
        for row in rows:
            if row["batch_size"] == batch_size:
                chosen, style = [str(row[axis]) for axis in axes], "bold" if row["is_baseline"] else ""
                cells = [cell for name in _COMPARED for cell in (_value(row, name), _change(row, name))]
                times.add_row(*chosen, *cells, style=style)
                values = [row[name] for name in _RESOURCES]
                sizes.add_row(*chosen, *("-" if v is None else format_size(v) for v in values), style=style)
        tables += [times, sizes]
    return Group(*tables)


def _short(axes: Sequence[str]) -> list[str]:
    """The last name of each path where no other path ends in it, else the path."""
    last = [axis.rpartition(".")[2] for axis in axes]
    return [name if last.count(name) == 1 else axis for name, axis in zip(last, axes, strict=True)]


def _value(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return "-"
    return f"{value:.4g}" if name == "output_tokens_per_s" else format_time(value)


def _change(row: dict[str, Any], name: str) -> str:
    change = row[f"{name}_change_percent"]
    return "baseline" if row["is_baseline"] else "-" if change is None else f"{change:+.1f} %"


def trace_table(summary: dict[str, Any]) -> RenderableType:
    """Return what `epsim trace info` prints."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary.items():
        table.add_row(Text(name, style="bold"), str(value))
    return table

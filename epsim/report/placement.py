"""Tables of `epsim place` for people: `placement_tables`, from the plain values of a comparison of policies."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.control import strip_control_codes
from rich.table import Table
from rich.text import Text

from epsim.report.origin import origin_line
from epsim.report.table import new_table, number
from epsim.units import format_size, format_time

Values = Mapping[str, Any]
LATENCIES = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
UNDECIDED = "~"  # marks a difference whose interval contains 0


def placement_tables(found: Values) -> RenderableType:
    """Return all tables of a comparison (`epsim.lab.experiment.compare_policies`)."""
    return Group(
        _title(found),
        _bytes_table(found),
        _migration_table(found),
        *(_times_table(found, at) for at in range(len(found["batches"]))),
        _balance_table(found),
        _bound_table(found),
        *[_clock_line(policy) for policy in found["policies"] if "clock_fit_s" in policy["bounds"]],
        *[Text(f"{one['policy']}: left out: {strip_control_codes(one['reason'])}") for one in found["left_out"]],
    )


def interval_words(found: Values) -> str:
    """Return how intervals are made, or that one split has none."""
    design = found["design"]
    if design["interval_level"] is None:
        return "one split: no intervals, and no telling whether a difference is one"
    return (
        f"means over {design['num_seeds']} splits with {100 * design['interval_level']:g} % intervals (corrected for "
        f"overlapping splits); {UNDECIDED}: the interval of the difference contains 0"
    )


def _title(found: Values) -> Text:
    scenario, design = found["scenario"], found["design"]
    text = Text(strip_control_codes(scenario["name"]), style="bold")
    transmission = scenario["transmission"]
    text.append(
        f"\n{scenario['model']['name']} on {scenario['cluster']['name']}, {len(found['devices'])} devices; "
        f"{transmission['mode']}, dedup {transmission['dedup']}, homes {scenario['homes']['policy']}\n"
        f"fitted to {design['num_fit']} requests, judged on {design['num_held_out']} others; {interval_words(found)}\n",
        style="not bold",
    )
    text.append(origin_line(found["trace"]), style="yellow not bold")
    return text


def _table(title: str, found: Values, columns: Sequence[str], row: Any) -> Table:
    table = new_table(f"\n{title}", "policy", *columns)
    for policy in found["policies"]:
        is_baseline = policy["policy"] == found["baseline"]
        name = strip_control_codes(policy["policy"])
        table.add_row(name, *row(policy, is_baseline), style="bold" if is_baseline else "")
    return table


def _bytes_table(found: Values) -> Table:
    has_nodes = found["policies"][0]["metrics"]["remote_nodes_per_token"] is not None
    columns = ["remote bytes", "change", "remote devices", "change", *(["remote nodes", "change"] if has_nodes else [])]

    def row(policy: Values, is_baseline: bool) -> list[str]:
        metrics = policy["metrics"]
        cells = [
            format_size(metrics["remote_bytes_per_token"]["mean"]),
            change(metrics["remote_bytes_per_token"], is_baseline),
        ]
        for name in ("remote_devices_per_token", *(["remote_nodes_per_token"] if has_nodes else [])):
            cells += [f"{metrics[name]['mean']:.3f}", change(metrics[name], is_baseline)]
        return cells

    title = "Held out: per token of all held-out requests, dispatch and combine; devices and nodes per layer"
    return _table(title, found, columns, row)


def _migration_table(found: Values) -> Table:
    names = ("migrate_vector_bytes_per_token", "migrate_bytes_per_token")

    def row(policy: Values, is_baseline: bool) -> list[str]:
        values = [policy["metrics"][name] for name in names]
        return [cell for value in values for cell in (format_size(value["mean"]), change(value, is_baseline))]

    title = "Held out: per token, if tokens stayed where their first expert was (token migration; not simulated)"
    return _table(title, found, ["vectors", "change", "with keys and values", "change"], row)


def _times_table(found: Values, at: int) -> Table:
    batches = found["batches"][at]
    title = f"Held out: batch {batches['batch_size']}, {batches['num_batches']} simulated (means over requests)"

    def row(policy: Values, is_baseline: bool) -> list[str]:
        size = policy["batch_sizes"][at]
        return [cell for name in LATENCIES for cell in (_time(size[name]), change(size[name], is_baseline))]

    return _table(title, found, [cell for name in LATENCIES.values() for cell in (name, "change")], row)


def _balance_table(found: Values) -> Table:
    forms = ("balancedness_ratio_of_sums", "balancedness_mean_of_ratios")
    columns = [
        "sum of means / sum of maxima",
        "difference",
        "mean of ratios",
        "difference",
        "replicas",
        "time to place",
    ]

    def row(policy: Values, is_baseline: bool) -> list[str]:
        metrics = policy["metrics"]
        cells = [
            cell for name in forms for cell in (f"{metrics[name]['mean']:.3f}", _difference(metrics[name], is_baseline))
        ]
        replicas = metrics["replica_memory_bytes"]["max"]
        seconds = metrics["time_to_place_s"]["median"]
        return [*cells, format_size(replicas) if replicas else "-", format_time(seconds)]

    title = "Held out: balancedness of pairs served; memory of replicas on the fullest device; median time to place"
    return _table(title, found, columns, row)


def _bound_table(found: Values) -> Table:
    columns = [
        "fitted to: cost", "held out: cost", "| fitted to: bound", "gap", "held out: bound", "gap",
        "| load, fitted to: gap", "held out: gap",
    ]  # fmt: skip

    def row(policy: Values, is_baseline: bool) -> list[str]:
        metrics, bounds, cells = policy["metrics"], policy["bounds"], []
        for part in ("fit", "held_out"):
            cells += [number(bounds[f"objective_bound_{part}"], 3), percent(bounds[f"objective_gap_{part}"])]
        loads = [percent(bounds[f"max_load_gap_{part}"]) for part in ("fit", "held_out")]
        return [*(number(metrics[f"objective_{part}"]["mean"], 3) for part in ("fit", "held_out")), *cells, *loads]

    title = (
        "Transfer objective per token and layer | first split: its lower bound, (cost - bound) / cost | largest load"
    )
    return _table(title, found, columns, row)


def _clock_line(policy: Values) -> Text:
    bounds = policy["bounds"]
    return Text(
        f"{policy['policy']}, first split: the closed form's time of all layers, {format_time(bounds['clock_fit_s'])}, "
        f"is at least {format_time(bounds['clock_bound_fit_s'])} (gap {percent(bounds['clock_gap_fit'])})"
    )


def change(value: Values | None, is_baseline: bool) -> str:
    """Return a change against the baseline in %, with its interval."""
    if is_baseline:
        return "baseline"
    return "-" if value is None or "change_percent" not in value else _signed(value["change_percent"], 1, " %")


def _difference(value: Values, is_baseline: bool) -> str:
    return "baseline" if is_baseline else _signed(value["difference"], 3, "")


def _signed(value: Values, digits: int, unit: str) -> str:
    mean = f"{signed(value['mean'], digits)}{unit}"
    if value["low"] is None:
        return mean
    ends = f"{signed(value['low'], digits)} .. {signed(value['high'], digits)}"
    return f"{mean} [{ends}]{UNDECIDED if value['contains_zero'] else ' '}"


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, and with + where it rounds to 0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _time(value: Values | None) -> str:
    return "-" if value is None else format_time(value["mean"])


def percent(value: float | None) -> str:
    """Return a share in %, a dash for none."""
    return "-" if value is None else f"{100 * value:.1f} %"

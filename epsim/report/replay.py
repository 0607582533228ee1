"""Tables of `epsim place --replay` for people: `replay_tables`, from the plain values of `epsim.lab.replay`."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.control import strip_control_codes
from rich.table import Table
from rich.text import Text

from epsim.report.origin import origin_line
from epsim.report.table import new_table
from epsim.units import format_size, format_time

Values = Mapping[str, Any]


def replay_tables(found: Values) -> RenderableType:
    """Return all tables of a replay."""
    return Group(
        _title(found),
        _served_table(found),
        _moves_table(found),
        *_no_rebalance(found),
        *[Text(f"{one['policy']}: left out: {strip_control_codes(one['reason'])}") for one in found["left_out"]],
    )


def _no_rebalance(found: Values) -> list[Text]:
    every, num_steps = found["design"]["every"], found["design"]["num_steps"]
    if every < num_steps:
        return []
    return [Text(f"no rebalance: --every {every} is not below the {num_steps} steps that are replayed")]


def _title(found: Values) -> Text:
    scenario, design = found["scenario"], found["design"]
    transmission = scenario["transmission"]
    text = Text(strip_control_codes(scenario["name"]), style="bold")
    text.append(
        f"\n{scenario['model']['name']} on {scenario['cluster']['name']}, {len(found['devices'])} devices; "
        f"{transmission['mode']}, dedup {transmission['dedup']}, homes {scenario['homes']['policy']}\n"
        f"fitted to the first {design['num_fit']} requests of {strip_control_codes(found['trace']['name'])}; the next "
        f"{design['num_replayed']} replayed in {design['num_batches']} batches of {design['batch_size']}, "
        f"{design['num_steps']} steps\nonline: from there refitted every {design['every']} steps to the last "
        f"{design['window']}{'' if design['match_devices'] else ', devices as the policy numbers them'}\n",
        style="not bold",
    )
    text.append(origin_line(found["trace"]), style="yellow not bold")
    return text


def _table(title: str, found: Values, columns: list[str], cells: Any, *, only: str | None = None) -> Table:
    table = new_table(f"\n{title}", "policy", *columns)
    for row in found["rows"]:
        if only in (None, row["placement"]):
            name = strip_control_codes(row["policy"])
            kind = f", {row['placement']}" if only is None else ""
            table.add_row(f"{name}{kind}", *cells(row), style="bold" if row["placement"] == "baseline" else "")
    return table


def _served_table(found: Values) -> Table:
    columns = [
        "TTFT", "TPOT", "TTFT without moves", "TPOT without moves", "remote bytes per token",
        "balancedness: sum of means / sum of maxima", "mean of ratios",
    ]  # fmt: skip

    def cells(row: Values) -> list[str]:
        names = ("ttft_s", "tpot_s", "ttft_s_without_moves", "tpot_s_without_moves")
        return [
            *(_time(row[name]) for name in names),
            format_size(row["remote_bytes_per_token"]),
            f"{row['balancedness_ratio_of_sums']:.3f}",
            f"{row['balancedness_mean_of_ratios']:.3f}",
        ]

    return _table("Replayed: means over requests; a step waits for weights on the move", found, columns, cells)


def _moves_table(found: Values) -> Table:
    columns = [
        "rebalances", "experts moved", "weights moved", "time moving", "of the run", "a step saves", "pays after",
    ]  # fmt: skip

    def cells(row: Values) -> list[str]:
        return [
            str(row["num_rebalances"]),
            str(row["moved_experts"]),
            format_size(row["moved_bytes"]) if row["moved_bytes"] else "-",
            _time(row["moving_s"]) if row["moving_s"] else "-",
            f"{100 * row['moving_share']:.1f} %",
            _saved(row["saved_s_per_step"]),
            _pays(row),
        ]

    title = "Online: weights moved; a step since the first rebalance against the fixed placement's, without moves"
    return _table(title, found, columns, cells, only="online")


def _time(value: float | None) -> str:
    return "-" if value is None else format_time(value)


def _saved(value: float | None) -> str:
    if value is None:
        return "-"
    return format_time(value) if value >= 0 else f"-{format_time(-value)}"


def _pays(row: Values) -> str:
    """Return after how many steps a rebalance has paid for itself."""
    if row["break_even_steps"] is not None:
        return f"{row['break_even_steps']:,.0f} steps"
    return "never" if row["moving_s"] else "-"

"""Tokens/s of MoE vision-language models beside dense ones: the tables and the picture of docs/dense-vs-moe.md.

Run from the repository's root: python benchmarks/dense_vs_moe.py [--docs]
With --docs the tables in the page and docs/images/dense-vs-moe.png are replaced; without, the tables are printed.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsim.batch import step_inputs
from epsim.model import ModelCard
from epsim.run import assemble, simulate
from epsim.scenario import ScenarioSpec, load_scenario

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "dense-vs-moe.md"
PICTURE = ROOT / "docs" / "images" / "dense-vs-moe.png"
BATCHES = (1, 2, 4, 8, 16, 32)
SHOWN = (1, 8, 32)  # batch sizes of the table of times
FITTED = "orin-smoes-s11"  # the Orin that is fitted to the times of SMoES table S11

Sizes = dict[int, dict[str, Any]]  # the figures of a row by batch size


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: a model in a layout, and how it is drawn (None: it is not)."""

    model: str
    layout: str
    file: str
    overrides: tuple[str, ...] = ()
    style: str | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.layout}"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A cluster and what runs on it.

    rows: the one in question first. dense: the models beside it, of equal total and of equal active parameters.
    overrides: put into every row's scenario.
    """

    key: str
    title: str
    rows: tuple[Row, ...]
    dense: tuple[str, str]
    overrides: tuple[str, ...] = ()


def replicas(file: str, models: Mapping[str, str]) -> tuple[Row, ...]:
    """Return the rows of tensor and data parallelism; models: name and colour."""
    return tuple(
        Row(model=model, layout=kind, file=file, overrides=(f"model={model}", f"parallelism.kind={kind}"), style=style)
        for model, colour in models.items()
        for kind, style in (("tp", f"{colour}s--"), ("dp", f"{colour}^:"))
    )


ORIN_ROWS = (
    Row(model="olmoe", layout="ep, SMoES", file="orin-2x-smoes", style="C0o-"),
    Row(
        model="olmoe",
        layout="ep, baseline of SMoES",
        file="orin-2x-ep",
        overrides=("homes.policy=by_modality",),
        style=None,
    ),
    Row(model="olmoe", layout="ep, tokens at home on both", file="orin-2x-ep", style="C4o-"),
    *replicas("orin-2x-replicas", {"olmoe": "C0", "llava-1.5-7b": "C3", "olmo-1b": "C2"}),
)
H100_ROWS = (
    Row(model="qwen3-moe", layout="ep", file="h100-2x8-ep", style="C0o-"),
    *replicas("h100-2x8-replicas", {"qwen3-moe": "C0", "llava-next-34b": "C3", "llama-3.2-3b": "C2"}),
)
ORIN_DENSE, H100_DENSE = ("llava-1.5-7b", "olmo-1b"), ("llava-next-34b", "llama-3.2-3b")
ORIN = Machine(key="orin", title="Two Orins over 10 GbE, data sheet", rows=ORIN_ROWS, dense=ORIN_DENSE)
ORIN_FITTED = Machine(
    key="orin-fitted",
    title="Two Orins over 10 GbE, fitted to table S11",
    rows=ORIN_ROWS,
    dense=ORIN_DENSE,
    overrides=(f"cluster.device_types.orin={FITTED}",),
)
H100 = Machine(key="h100", title="16 H100 in two nodes, data sheet", rows=H100_ROWS, dense=H100_DENSE)
MACHINES = (ORIN, ORIN_FITTED, H100)
ROUTINGS = (
    ("olmoe, SMoES", ORIN, ORIN_ROWS[0]),
    ("olmoe, baseline", ORIN, ORIN_ROWS[2]),
    ("qwen3-moe", H100, H100_ROWS[0]),
)
TABLES = ("throughput", "ratios", "times")  # of each machine
KEYS = ("weights", *(f"{machine.key}-{name}" for machine in MACHINES for name in TABLES))
DENSE_ROWS = tuple((machine, row) for machine in (ORIN, H100) for row in (machine.rows[-1], machine.rows[-3]))


def scenario(machine: Machine, row: Row, batches: Sequence[int], *overrides: str) -> ScenarioSpec:
    """Return the scenario of a row."""
    batch_sizes = f"workload.batch_sizes={list(batches)}"
    path = ROOT / "scenarios" / "dense-vs-moe" / f"{row.file}.yaml"
    return load_scenario(path, [*machine.overrides, *row.overrides, batch_sizes, *overrides])


def card_of(machine: Machine, row: Row) -> ModelCard:
    """Return the card of a row's model."""
    return ModelCard.from_mapping(scenario(machine, row, BATCHES).model.model_dump())


def run(machine: Machine, row: Row, batches: Sequence[int], *overrides: str) -> Sizes:
    """Simulate a row."""
    results = simulate(scenario(machine, row, batches, *overrides)).results
    return {size["batch_size"]: size for size in results["batch_sizes"]}


def rate(value: float) -> str:
    """Return tokens/s with three digits, or all before the point.

    >>> rate(6.414), rate(59.54), rate(8441.2)
    ('6.41', '59.5', '8441')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def duration(seconds: float) -> str:
    """Return a time with three digits.

    >>> duration(2.774), duration(0.01482), duration(0.000402)
    ('2.77 s', '14.8 ms', '0.402 ms')
    """
    return f"{rate(seconds)} s" if seconds >= 1 else f"{rate(1e3 * seconds)} ms"


def line(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def heading(name: str, cells: Sequence[str]) -> list[str]:
    return [line(name, cells), "|---" * (1 + len(cells)) + "|"]


def throughput_table(by_row: Mapping[str, Sizes]) -> list[str]:
    """Return the output tokens/s of each row by batch size."""
    lines = heading("output tokens/s at batch", [str(size) for size in next(iter(by_row.values()))])
    return lines + [
        line(name, [rate(size["output_tokens_per_s"]) for size in sizes.values()]) for name, sizes in by_row.items()
    ]


def fastest(machine: Machine, by_row: Mapping[str, Sizes], model: str) -> dict[int, float]:
    """Return the tokens/s of a model in its fastest layout by batch size."""
    rows = [by_row[row.name] for row in machine.rows if row.model == model]
    return {size: max(sizes[size]["output_tokens_per_s"] for sizes in rows) for size in rows[0]}


def ratio_table(machine: Machine, by_row: Mapping[str, Sizes]) -> list[str]:
    """Return how many times the tokens/s of dense models the MoE model has: its first row, and its fastest one."""
    first = machine.rows[0]
    ours = {
        first.name: {size: figures["output_tokens_per_s"] for size, figures in by_row[first.name].items()},
        f"{first.model}, fastest": fastest(machine, by_row, first.model),
    }
    lines = heading("times the tokens/s at batch", [str(size) for size in by_row[first.name]])
    for model in machine.dense:
        dense = fastest(machine, by_row, model)
        for name, rates in ours.items():
            cells = [f"{rates[size] / dense[size]:.2f}" for size in dense]
            lines.append(line(f"{name} / {model}, fastest", cells))
    return lines


def times_table(by_row: Mapping[str, Sizes]) -> list[str]:
    """Return TTFT and TPOT of each row at some batch sizes, and the memory of all devices at the last of them."""
    columns = [f"{metric} at {size}" for metric in ("TTFT", "TPOT") for size in SHOWN]
    lines = heading("", [*columns, f"memory of all devices at {SHOWN[-1]}"])
    for name, sizes in by_row.items():
        cells = [duration(sizes[size][metric]["mean"]) for metric in ("ttft_s", "tpot_s") for size in SHOWN]
        memory_bytes = sum(account["total"] for account in sizes[SHOWN[-1]]["memory_bytes"].values())
        lines.append(line(name, [*cells, f"{memory_bytes / 1e9:.1f} GB"]))
    return lines


def fixed_bytes(card: ModelCard) -> int:
    """Return the weights that a decode step reads once whatever its tokens choose: all but routed experts."""
    moe = len(card.moe_layer_ids) * (card.router_bytes + card.shared_expert_bytes)
    return (
        card.num_layers * card.attention_bytes + card.num_dense_layers * card.dense_ffn_bytes + moe + card.lm_head_bytes
    )


def activated_experts(spec: ScenarioSpec, batch: int) -> float:
    """Return how many experts of a layer the tokens of a decode step choose: the mean over layers and steps.

    spec: under expert parallelism, where each expert is on one device.
    """
    deployment = assemble(spec)
    ids = deployment.trace.requests.request_id_Q[:batch]
    steps = [given.traffic.device_experts_LR for given in step_inputs(deployment, ids, None) if given.step > 0]
    return float(sum(step_LR.sum() / len(step_LR) for step_LR in steps) / len(steps))


def weights_table() -> list[str]:
    """Return the experts that a decode step activates and the weights that it reads, by batch size."""
    lines = heading("weights of a decode step at batch", [str(size) for size in BATCHES])
    for name, machine, row in ROUTINGS:
        spec, card = scenario(machine, row, BATCHES), card_of(machine, row)
        experts = [activated_experts(spec, size) for size in BATCHES]
        num_bytes = [fixed_bytes(card) + len(card.moe_layer_ids) * card.expert_bytes * number for number in experts]
        lines.append(line(f"{name}: experts of {card.num_experts}", [f"{number:.1f}" for number in experts]))
        lines.append(line(f"{name}: read", [f"{size / 1e9:.2f} GB" for size in num_bytes]))
    for machine, row in DENSE_ROWS:
        num_bytes = fixed_bytes(card_of(machine, row))
        lines.append(line(f"{row.model}: read", [f"{num_bytes / 1e9:.2f} GB"] * len(BATCHES)))
    return lines


def tables_of(machine: Machine, by_row: Mapping[str, Sizes]) -> dict[str, list[str]]:
    """Return the lines of a machine's tables by the keys of their marks (see `KEYS`)."""
    tables = (throughput_table(by_row), ratio_table(machine, by_row), times_table(by_row))
    return {f"{machine.key}-{name}": lines for name, lines in zip(TABLES, tables, strict=True)}


def place_of(key: str) -> re.Pattern[str]:
    """Return what finds a table with its marks."""
    return re.compile(f"<!-- table: {key} -->\n(.*?)<!-- end -->", flags=re.DOTALL)


def check_page() -> None:
    """Exit in one line unless the page has a place for every table."""
    text = PAGE.read_text(encoding="utf-8")
    for key in KEYS:
        found = len(place_of(key).findall(text))
        if found != 1:
            raise SystemExit(f'{PAGE}: {found} tables "{key}"; write <!-- table: {key} --> and <!-- end --> once')


def write_page(tables: Mapping[str, Sequence[str]]) -> None:
    """Replace the tables between the marks of the page."""
    text = PAGE.read_text(encoding="utf-8")
    for key, lines in tables.items():
        block = f"<!-- table: {key} -->\n" + "\n".join(lines) + "\n<!-- end -->"
        text = place_of(key).sub(lambda _, b=block: b, text)
    PAGE.write_text(text, encoding="utf-8")


def draw(results: Mapping[Machine, Mapping[str, Sizes]]) -> None:
    """Draw tokens/s over the batch size, a field per machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, fields = plt.subplots(1, len(results), figsize=(5.2 * len(results), 5.6), layout="constrained")
    for field, (machine, by_row) in zip(fields, results.items(), strict=True):
        for row in machine.rows:
            if row.style is None:
                continue
            rates = [size["output_tokens_per_s"] for size in by_row[row.name].values()]
            colour, marks = row.style[:2], row.style[2:]
            field.loglog(list(by_row[row.name]), rates, marks, color=colour, label=row.name, base=10, markersize=5)
        field.set_xscale("log", base=2)
        field.set_xticks(BATCHES, [str(size) for size in BATCHES])
        field.set(title=machine.title, xlabel="batch (requests)", ylabel="output tokens/s")
        field.grid(alpha=0.3, which="both")
        field.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=8, frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="replace the tables and the picture of the page")
    docs = parser.parse_args().docs
    if docs:
        check_page()
    tables = {"weights": weights_table()}
    results: dict[Machine, dict[str, Sizes]] = {}
    for machine in MACHINES:
        results[machine] = {row.name: run(machine, row, BATCHES) for row in machine.rows}
        tables |= tables_of(machine, results[machine])
    if docs:
        write_page(tables)
        draw(results)
        return
    for key, lines in tables.items():
        print(f"{key}\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

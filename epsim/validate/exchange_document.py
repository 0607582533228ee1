"""docs/exchange.md from the plain values of the report: `write_exchange_document`.

The text holds no date, path or machine, so that the same report gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsim.atomic import write_all
from epsim.validate.exchange_figure import FIGURE_NAME, draw_exchange_figure
from epsim.validate.exchange_prose import AGAIN, CHOICES, HEADER, MODEL, READING, TABLES
from epsim.validate.markdown import table

_WITH_CELLS = ("low-latency", "v1-low-latency", "v1-low-latency-first", "v1-normal", "v1-normal-first")


def write_exchange_document(path: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write the document and its figure, images/*.png beside it, after both have been made; return the paths."""
    contents = {path.parent / "images" / FIGURE_NAME: draw_exchange_figure(report)}
    contents[path] = exchange_document(report).encode()
    write_all(contents)
    return list(contents)


def exchange_document(report: Mapping[str, Any]) -> str:
    """Return the whole text."""
    studies = report["studies"]
    sections = [
        HEADER,
        targets_table(report["targets"]),
        f"![Predicted against published times, held-out rows](images/{FIGURE_NAME})",
        MODEL,
        TABLES,
        "## Constants and errors",
        constants_table(studies),
        "*Without constants*: the specification alone, latency 0 and share 1. *With notify*: the same predictions held "
        "to transmit + notify. Bias and worst have the sign of predicted - published.",
        READING.format(nccl_floor=report["nccl_fitted_to_all"]["mean_percent"]),
        CHOICES,
        "## Held-out rows by group",
        "Mean error and bias, percent; *mostly*: what the larger part of the predicted time is.",
        *(part for study in studies for part in (f"### {study['title']} (`{study['key']}`)", groups_table(study))),
        f"## Rows\n\nAll {len(report['cells'])} rows are printed by `--cells` and `--json`. Here are those of the "
        "small tables, published / predicted in us and error; * fitted.",
        *(
            part
            for study in studies
            if study["key"] in _WITH_CELLS
            for part in (f"### Rows of `{study['key']}`", cells_table(study, report["cells"]))
        ),
        AGAIN,
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def targets_table(targets: Sequence[Mapping[str, Any]]) -> str:
    """Return target, figure, and by how much it is missed."""
    rows = [
        (
            entry["text"],
            str(entry["num_rows"]),
            f"{entry['target_percent']:g} %",
            f"{entry['figure_percent']:.2f} %",
            "met" if entry["met"] else f"missed by {entry['missed_by_points']:.2f} points",
        )
        for entry in targets
    ]
    return table(("of", "rows held out", "target, at most", "reached", ""), rows)


def constants_table(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return the constants of each study and kind with the errors of fitted and held-out rows."""
    rows = []
    for study in studies:
        for kind in study["kinds"]:
            held, notify = kind["held_out"], kind["with_notify"]
            rows.append(
                (
                    f"`{study['key']}`",
                    kind["kind"],
                    study["fitted_to"],
                    f"{kind['latency_us']:.2f} us",
                    f"{kind['share']:.3f} of {'NVLink' if kind['share_of'] == 'nvlink' else 'the network'}",
                    _counted(kind["fitted"]),
                    _counted(held),
                    _percent(held["bias_percent"], "+"),
                    _percent(held["worst_percent"], "+"),
                    _percent(kind["without_constants"]["mean_percent"]),
                    _percent(notify["mean_percent"]) if notify else "-",
                )
            )
    columns = (
        "study", "operation", "fitted to", "latency", "share", "fitted rows: error", "held-out rows: error", "bias",
        "worst", "without constants", "with notify",
    )  # fmt: skip
    return table(columns, rows)


def groups_table(study: Mapping[str, Any]) -> str:
    """Return the errors of a study's held-out rows by group and kind."""
    kinds = [kind["kind"] for kind in study["kinds"]]
    rows = []
    for group in study["groups"]:
        errors = (group["kinds"][kind] for kind in kinds)
        texts = (f"{_percent(e['mean_percent'])}, {_percent(e['bias_percent'], '+')}" for e in errors)
        rows.append((group["group"], str(group["all"]["num_rows"]), *texts))
    return table(("rows", "number", *kinds), rows)


def cells_table(study: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each shape of a study, with both operations."""
    shapes: dict[tuple[int, int, int], dict[str, str]] = {}
    for cell in cells:
        if cell["study"] == study["key"]:
            text = f"{cell['published_us']:.1f} / {cell['predicted_us']:.1f}, {cell['error_percent']:+.1f} %"
            shape = (cell["gpus"], cell["experts"], cell["tokens"])
            shapes.setdefault(shape, {})[cell["kind"]] = text + (" *" if cell["fitted"] else "")
    rows = [(*map(str, shape), *(texts[kind] for kind in ("dispatch", "combine"))) for shape, texts in shapes.items()]
    return table(("GPUs", "experts", "tokens per GPU", "dispatch", "combine"), rows)


def _counted(errors: Mapping[str, Any]) -> str:
    return f"{errors['num_rows']}: {_percent(errors['mean_percent'])}"


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1f} %"

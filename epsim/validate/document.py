"""docs/validation.md from the plain values of the report: `write_document`, and its sections one by one.

The text holds no date, path or machine, so that the same report gives the same bytes. Each section depends on its own
part of the report only, and a test holds the cheap ones to the shipped document.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsim.atomic import write_all
from epsim.report.table import number
from epsim.validate.figures import draw_figures
from epsim.validate.fitted import METRICS, influence_sentence, parameters_section
from epsim.validate.markdown import capital, table
from epsim.validate.prose import FITTED, HEADER, LIMITS, REPRODUCED, TARGETS_TEXT, UNKNOWN


def write_document(path: Path, report: Mapping[str, Any]) -> list[Path]:
    """Write the document and its figures, images/*.png beside it, after all have been made; return the paths."""
    images = path.parent / "images"
    contents = {images / name: content for name, content in draw_figures(report).items()}
    contents[path] = document(report).encode()
    write_all(contents)
    return list(contents)


def document(report: Mapping[str, Any]) -> str:
    """Return the whole text."""
    s11 = report["s11"]
    sections = [
        HEADER.format(citation=report["citation"]),
        TARGETS_TEXT,
        targets_table(report["targets"]),
        REPRODUCED,
        s10_section(report["s10"]),
        FITTED,
        errors_table(s11["studies"]),
        naive_sentence(s11["studies"]),
        influence_sentence(s11["studies"]),
        "![Predicted against published TTFT and TPOT](images/validation-s11.png)",
        "### Every cell, all rows fitted",
        cells_table(s11["cells"]),
        "### Every cell, held out",
        *(part for study in s11["held_out"] for part in (f"{capital(study['title'])}:", cells_table(study["cells"]))),
        *parameters_section(s11["parameters"], s11["cells"]),
        *images_section(s11["images"]),
        "### Where the time goes",
        *parts_section(),
        s12_section(report["s12"]),
        UNKNOWN.format(mismatches="\n".join(f"- {text}." for text in report["mismatches"])),
        LIMITS,
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def targets_table(targets: Sequence[Mapping[str, Any]]) -> str:
    """Return target, figure, and whether and by how much it is missed."""
    rows = [
        (
            entry["group"],
            entry["text"],
            f"{entry['target']:g} {entry['unit']}",
            f"{entry['figure']:.2f} {entry['unit']}",
            "met" if entry["met"] else f"missed by {entry['missed_by']:.2f} {entry['unit']}",
        )
        for entry in targets
    ]
    return table(("of", "figure", "target, at most", "reached", ""), rows)


def s10_section(s10: Mapping[str, Any]) -> str:
    """Return the errors of table S10 and its table, published and simulated."""
    rows = [
        (
            row["benchmark"],
            row["method"],
            *(f"{a:.1f} / {b:.1f}" for a, b in zip(row["published"], row["simulated"], strict=True)),
        )
        for row in s10["rows"]
    ]
    return (
        f"Over {s10['num_cells']} cells the simulated ratio is off by {s10['mean_error_points']:.2f} points in the "
        "mean "
        f"and {s10['max_error_points']:.2f} points at most; over the P_V+T columns alone, which nothing is drawn from, "
        f"by {s10['mean_mixed_error_points']:.2f} in the mean. Published / simulated, batch {s10['batch_size']}, "
        "percent; "
        "P prefill, D decode, V vision, T text tokens; pairs are (token, expert) pairs, without DeDup, tokens are with "
        "DeDup:\n\n" + table(("benchmark", "method", *s10["columns"]), rows)
    )


def errors_table(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return the mean errors of each study, with and without the outlier, beside the naive rule's."""
    names = ("ttft_percent", "tpot_percent", "speedup_ttft_points", "speedup_tpot_points")
    kinds = (
        ("errors", "simulator"),
        ("without_outlier", "simulator, without the outlier"),
        ("naive", "naive rule"),
        ("naive_without_outlier", "naive rule, without the outlier"),
    )
    rows = [
        (
            study["title"] if i == 0 else "",
            f"{study['num_train']} / {study['num_test']}" if i == 0 else "",
            kind,
            *(number(study[key][name], 2) for name in names),
        )
        for study in studies
        for i, (key, kind) in enumerate(kinds)
    ]
    columns = (
        "predicted",
        "rows fitted / predicted",
        "by",
        "TTFT, %",
        "TPOT, %",
        "TTFT speed-up, points",
        "TPOT speed-up, points",
    )
    return table(columns, rows)


def naive_sentence(studies: Sequence[Mapping[str, Any]]) -> str:
    """Return where the naive rule is at least as good as the simulator."""
    names = {
        "ttft_percent": "TTFT",
        "tpot_percent": "TPOT",
        "speedup_ttft_points": "the speed-up of TTFT",
        "speedup_tpot_points": "the speed-up of TPOT",
    }
    better = [
        f"{text} {study['title']} ({study['naive'][name]:.2f} against {study['errors'][name]:.2f})"
        for study in studies
        for name, text in names.items()
        if study["naive"][name] <= study["errors"][name]
    ]
    count = len(studies) * len(names)
    said = f"In {len(better)} of these {count} figures the naive rule is at least as good as the simulator"
    return f"{said}: {'; '.join(better)}." if better else f"{said}."


def cells_table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return published and predicted seconds and the error of each cell; the outlier is marked."""
    rows = []
    for cell in cells:
        mark = " *" if cell["outlier"] else ""
        values = [
            text
            for metric, star in zip(METRICS, (mark, ""), strict=True)
            for text in (
                f"{cell[metric]['published_s']:.3f}{star}",
                f"{cell[metric]['predicted_s']:.3f}",
                f"{cell[metric]['error_percent']:+.1f} %",
            )
        ]
        rows.append((cell["benchmark"], cell["method"], str(cell["batch_size"]), *values))
    heads = [head for metric in METRICS for head in (f"{metric.upper()} published, s", "predicted, s", "error")]
    return table(("data set", "method", "batch", *heads), rows)


def images_section(images: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the assumed number of images buys."""
    rows = [
        (
            f"{entry['images']}{' (assumed)' if entry['assumed'] else ''}",
            str(entry["prompt_tokens"]),
            *(
                number(entry[key][name], 2)
                for key, name in (
                    ("errors", "ttft_percent"),
                    ("without_outlier", "ttft_percent"),
                    ("errors", "tpot_percent"),
                    ("errors", "speedup_ttft_points"),
                    ("errors", "speedup_tpot_points"),
                )
            ),
        )
        for entry in images
    ]
    columns = (
        "images per MMMU request", "prompt tokens", "TTFT, %", "TTFT without the outlier, %", "TPOT, %",
        "TTFT speed-up, points", "TPOT speed-up, points",
    )  # fmt: skip
    said = (
        "One image in each request of either data set, in the token mix of table S10, would give MMMU 715 and SQA-IMG "
        "842 prompt tokens, yet MMMU's TTFT is the longer one at every batch size. Two images per MMMU request are "
        "assumed. The errors of three fits to all rows say what the assumption buys:"
    )
    return ["### The assumption about images", said, table(columns, rows)]


def parts_section() -> list[str]:
    """Return the figure of parts with what it shows."""
    return [
        "Predicted parts of TTFT and TPOT on the device where the tokens are at home, from the fit to all rows, with "
        "the published total. Figure S1 of the paper has such a breakdown as an image without numbers, so the parts "
        "cannot be checked, only their sum.",
        "![Parts of TTFT and TPOT by batch size](images/validation-parts.png)",
    ]


def s12_section(s12: Mapping[str, Any]) -> str:
    """Return the two lines of table S12, their errors and savings."""
    rows = [
        (row["method"], str(size), f"{known:.1f}", f"{fitted:.2f}", f"{error:+.1f} %", f"{left_out:+.1f} %")
        for row in s12["rows"]
        for size, known, fitted, error, left_out in zip(
            s12["batch_sizes"],
            row["published_s"],
            row["predicted_s"],
            row["error_percent"],
            row["left_out_error_percent"],
            strict=True,
        )
    ]
    lines = "; ".join(f"{row['method']}: {row['a_s']:.2f} s + {row['b_s']:.2f} s x batch" for row in s12["rows"])
    columns = ("method", "batch", "published, s", "line, s", "error", "error when this batch is left out")
    return (
        "## Fitted: table S12, by a line\n\n"
        "Nothing of this table is simulated: the paper names neither GPU nor network, workload or transfer ratios. "
        "Two constants per row are fitted to its six values (least squares of relative errors), four for twelve "
        f"values: {lines}. The largest error is {s12['max_error_percent']:.1f} % in sample and "
        f"{s12['max_left_out_error_percent']:.1f} % when the batch size is left out. The mean saving of the lines is "
        f"{s12['saving_percent']:.1f} % ({s12['left_out_saving_percent']:.1f} % from batches left out), the paper's "
        f"{s12['published_saving_percent']:.1f} %. So the time is a constant plus a time per request; which resource "
        "that is, the table does not say.\n\n" + table(columns, rows)
    )

"""docs/specialise.md from a study's plain values, its traces and logs: `write_document`; `document`, the text alone.

The same study gives the same bytes.
"""

import os
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from epsim.atomic import write_all
from epsim.study import claims, prose, sections
from epsim.study.figures import FUSION, PREFIX, ROUTING, draw_figures
from epsim.study.methods import METHODS
from epsim.study.plan import DEFAULTS, StudyFolder
from epsim.study.summary import Summary
from epsim.validate.published import load_published

IMAGES = "images"


def write_document(path: Path, study: Mapping[str, Any], folder: StudyFolder) -> list[Path]:
    """Write the document and its figures, images/*.png beside it, after all have been made; return the paths."""
    images = path.parent / IMAGES
    drawn = draw_figures(Summary(study), folder)
    contents = {images / name: content for name, content in drawn.items()}
    contents[path] = document(study, path, drawn).encode()
    write_all(contents)
    return list(contents)


def document(study: Mapping[str, Any], path: Path, figures: Collection[str]) -> str:
    """Return the whole text. path: of the document, for links. figures: names of those that there are."""
    summary = Summary(study)
    words = _words(study, path)
    parts = [
        prose.HEADER.format(**words),
        _setup(summary),
        *_specialisation(summary, figures, words),
        prose.ACCURACY.format(**words),
        sections.accuracy_table(summary),
        claims.accuracy_differences(summary),
        *_transfer(summary, words),
        prose.TIMES.format(**words),
        sections.times_table(summary),
        prose.TIMES_PAPER,
        sections.times_paper_table(),
        prose.LIMITS.format(**words),
        prose.AGAIN.format(**words),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _words(study: Mapping[str, Any], path: Path) -> dict[str, str]:
    folder = study["folder"]
    return {
        "citation": load_published().citation,
        "command": _command(study, path),
        "folder": folder,
        "config": study["config"],
        "scenario": study["scenario"],
        "scenario_link": Path(os.path.relpath(study["scenario"], path.parent)).as_posix(),
        "requests": str(study["num_requests"]),
        "images": IMAGES,
    }


def _command(study: Mapping[str, Any], path: Path) -> str:
    """Return the command that makes the study and the page."""
    options = ["-o", study["folder"], "--seeds", str(len(study["seeds"]))]
    if list(study["methods"]) != list(METHODS):
        options += ["--methods", ",".join(study["methods"])]
    for name in ("config", "scenario"):
        if study[name] != DEFAULTS[name]:
            options += [f"--{name}", study[name]]
    for text in study["overrides"]:
        options += ["--set", text]
    return shlex.join(["epsim", "study", "specialise", *options, "--docs", path.as_posix()])


def _specialisation(summary: Summary, figures: Collection[str], words: Mapping[str, str]) -> list[str]:
    """Return the section on specialisation with the figures that there are."""
    parts = [
        prose.MSI.format(**words),
        sections.specialisation_table(summary),
        " ".join((claims.above_soft(summary), claims.order_of_methods(summary), claims.infinite_distances(summary))),
        "### By layer and by expert",
        _figure(figures, "msi-by-layer", "MSI by layer"),
        _figure(figures, "mrd-by-layer", "MRD distance by layer, as SMAR figures 2 and 3"),
        *(
            _figure(figures, f"routing-{method}", f"Routed pairs of each expert, {method}, as SMoES figure 6")
            for method in ROUTING
        ),
    ]
    if f"{PREFIX}evolution.png" in figures:
        parts.append(prose.EVOLUTION.format(**words))
    fusion = [_figure(figures, f"fusion-{method}", f"Modality scores, {method}-soft") for method in FUSION]
    return [*parts, prose.FUSION, *fusion] if any(fusion) else parts


def _transfer(summary: Summary, words: Mapping[str, str]) -> list[str]:
    """Return the sections on what crosses between devices, and on their load."""
    return [
        prose.TRANSFER.format(**words),
        sections.transfer_table(summary),
        " ".join((claims.placement_alone(summary), claims.transfer_signs(summary))),
        prose.TRANSFER_PAPER,
        sections.transfer_paper_table(),
        prose.LOAD.format(**words),
        sections.load_table(summary),
        claims.uneven_devices(summary),
    ]


def _figure(figures: Collection[str], name: str, words: str) -> str:
    """Return the figure with its words, or nothing if there is none."""
    file = f"{PREFIX}{name}.png"
    return f"![{words}]({IMAGES}/{file})" if file in figures else ""


def _setup(summary: Summary) -> str:
    """Return what was trained, on what, and how long that took."""
    study, training = summary.study, summary.study["training"]
    runs = study["runs"]
    stages = ", ".join(f"{stage['name']} {stage['steps']}" for stage in training["stages"])
    sizes = sorted({run["num_parameters"] for run in runs})
    ran_on = sorted({_ran_on(run["ran_on"]) for run in runs})
    seconds = sum(run["seconds"] for run in runs)
    missing = len(study["seeds"]) * len(study["methods"]) - len(runs)
    lines = [
        f"Methods: {len(summary.methods)}, each from seeds {', '.join(map(str, study['seeds']))}; {study['date']}. "
        f"A model of {_millions(sizes)} parameters: {_model(training['model'])}. "
        f"Steps of the stages: {stages}; all methods of a seed share the stages before the one that specialises. "
        f"Test prompts: {training['data']['num_test']} with an image, {training['data']['num_test_text']} without; "
        f"trace: {study['num_requests']} held-out prompts. {seconds / 60:.1f} minutes of training on one thread each; "
        f"{'; '.join(ran_on)}. Every ± is a standard error over seeds."
    ]
    if missing:
        lines.append(f"**Incomplete: {missing} of {missing + len(runs)} runs are missing.**")
    return "\n\n".join(lines)


def _model(model: Mapping[str, Any]) -> str:
    if "num_layers" not in model:
        return ", ".join(f"{name} {value}" for name, value in model.items())
    return (
        f"{model['num_layers']} layers of {model['backbone']}'s architecture, hidden size {model['hidden_size']}, "
        f"{model['num_experts']} experts with an inner size of {model['expert_ffn_size']}, top-{model['topk']}"
    )


def _millions(sizes: list[int]) -> str:
    return " to ".join(dict.fromkeys(f"{size / 1e6:.2f} million" for size in (sizes[0], sizes[-1])))


def _ran_on(circumstances: Mapping[str, Any]) -> str:
    names = ("epsim", "torch", "transformers")
    versions = ", ".join(f"{name} {circumstances[name]}" for name in names)
    return f"{circumstances['device']} in {circumstances['dtype']}, {versions}"

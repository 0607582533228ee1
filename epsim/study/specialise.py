"""The whole of `epsim study specialise`: train, capture, measure, and write all figures to one file (`run_study`)."""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from epsim import __version__
from epsim.atomic import check_folder, whole_file
from epsim.errors import EpsimError, InputError
from epsim.scenario.train import TrainSpec
from epsim.study.children import run_tasks
from epsim.study.measure import measure
from epsim.study.methods import BASE, METHODS
from epsim.study.plan import NUM_REQUESTS, Study, is_complete
from epsim.study.times import BASELINE, check_scenario

EPSIM = (sys.executable, "-m", "epsim")
_LIBRARIES = ("numpy", "pyarrow")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """All figures, as they stand in `study.json`; and a line for each child process that did not end well."""

    study: dict[str, Any]
    failures: list[str]


def run_study(study: Study, scenario: Path, *, jobs: int, say: Say, program: Sequence[str] = EPSIM) -> StudyOutcome:
    """Run what is not complete yet, measure what is, and write `study.json`.

    scenario: whose times are simulated. program: words before the arguments of a child. Raises InputError before
    anything runs if files are wrong, after it if there is nothing to measure.
    """
    check_folder(study.folder.path)
    check_scenario(scenario)
    specs = {method: study.spec(0, method) for method in study.methods}
    study.check_overrides()
    stages = {method: specialised_stage(spec) for method, spec in specs.items()}
    tasks = study.tasks()
    if tasks:
        say(f"{len(tasks)} trainings and captures to run, {jobs} at once")
    failures = run_tasks(tasks, program=program, jobs=jobs, say=say)
    runs = []
    for seed, method in study.cases:
        if study.has_trace(seed, method):
            say(f"measuring seed {seed}, {method}")
            runs.append(_measured(study, scenario, seed, method, stages[method]))
    if not runs:
        raise InputError(f"{study.folder.path}: no run is complete, so there is nothing to measure")
    content = _header(study, scenario, specs[BASE], stages) | {"runs": runs, "failures": failures}
    with whole_file(study.folder.study) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return StudyOutcome(study=content, failures=failures)


def specialised_stage(spec: TrainSpec) -> str:
    """Return the last stage in which the method is in place."""
    names = [stage.name for stage in spec.stages if stage.specialize]
    if not names:
        raise InputError(f"{spec.name}: no stage has specialize: true; write it into one")
    return names[-1]


def progress(study: Study) -> str:
    """Return how much is complete."""
    trained = sum(is_complete(study.folder.run(*case)) for case in study.cases)
    traced = sum(study.has_trace(*case) for case in study.cases)
    return f"{study.folder.path} holds {trained} of {len(study.cases)} trained models and {traced} traces"


def _measured(study: Study, scenario: Path, seed: int, method: str, stage: str) -> dict[str, Any]:
    run, trace = study.folder.run(seed, method), study.folder.trace(seed, method)
    try:
        return {"seed": seed, "method": method, **measure(run, trace, scenario, stage=stage)}
    except EpsimError as error:
        raise type(error)(f"seed {seed}, {method}: {error}") from error


def _header(study: Study, scenario: Path, spec: TrainSpec, stages: dict[str, str]) -> dict[str, Any]:
    return {
        "epsim_version": __version__,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
        "date": datetime.now(UTC).date().isoformat(),
        "folder": study.folder.path.as_posix(),
        "config": study.config.as_posix(),
        "scenario": scenario.as_posix(),
        "overrides": list(study.overrides),
        "seeds": list(range(study.num_seeds)),
        "methods": {method: METHODS[method] for method in study.methods},
        "stages": stages,
        "training": spec.model_dump(mode="json", exclude={"method", "name", "seed"}),
        "num_requests": NUM_REQUESTS,
        "baseline": {"method": BASE, "setting": BASELINE},
    }

"""The whole of `epsim study placement`: all policies on all traces, under all scenarios, each case a child process.

`PlacementStudy` says which cases there are and which are not done yet, `run_placement_study` runs those.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsim.atomic import check_folder
from epsim.errors import InputError
from epsim.lab.experiment import Design, header
from epsim.lab.question import ALL, ask
from epsim.placement import POLICIES
from epsim.study.children import Task, run_tasks
from epsim.study.specialise import EPSIM

Found = dict[str, Any]
SCENARIOS = ("scenarios/digits.yaml", "scenarios/digits-2x4.yaml")
TRACES = "traces"
WITH_PARAMETERS = (
    "eplb_hierarchical,num_groups=8",
    "eplb_hierarchical,num_groups=8,redundant_experts=8",
    "eplb_global,redundant_experts=8",
)


@dataclass(frozen=True, kw_only=True)
class PlacementStudy:
    """What is compared.

    Attributes:
        folder: a file of values goes there for each scenario and trace.
        scenarios: files; the traces replace theirs.
        traces: files.
        num_seeds: of the splits of each trace, 0, 1, ...
    """

    folder: Path
    scenarios: tuple[Path, ...]
    traces: tuple[Path, ...]
    num_seeds: int

    @property
    def cases(self) -> list[tuple[Path, Path]]:
        """Every scenario with every trace."""
        return [(scenario, trace) for scenario in self.scenarios for trace in self.traces]

    def file(self, scenario: Path, trace: Path) -> Path:
        """The values of a case, as `epsim place --json` prints them."""
        return self.folder / f"{scenario.stem}-{trace.stem}.json"

    def tasks(self) -> Iterator[Task]:
        """Yield the cases whose values are not there, or are of something else. Raises InputError for wrong files."""
        for scenario, trace in self.cases:
            if self.read(scenario, trace) is None:
                words = ["place", str(trace), "--scenario", str(scenario)]
                words += [word for policy in (ALL, *WITH_PARAMETERS) for word in ("--policy", policy)]
                yield Task(
                    label=f"{scenario.stem}, {trace.stem}",
                    arguments=(*words, "--seeds", str(self.num_seeds), "--json"),
                    log=self.file(scenario, trace),
                )

    def read(self, scenario: Path, trace: Path) -> Found | None:
        """Return the values of a case; None where they are not there, not whole, or of something else.

        That is: of another version of epsim, another scenario, other bytes of the trace, other splits or policies. The
        code of epsim is not looked at.
        """
        asked = json.loads(json.dumps(header(ask(trace, scenario=scenario), Design(num_seeds=self.num_seeds))))
        try:
            found: Any = json.loads(self.file(scenario, trace).read_text(encoding="utf-8"))
            listed = {entry["policy"] for entry in (*found["policies"], *found["left_out"])}
            same = listed == {*POLICIES, *WITH_PARAMETERS} and all(found[name] == asked[name] for name in asked)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if same else None


def traces_of(folder: Path) -> tuple[Path, ...]:
    """Return the captured traces of a folder, by name; InputError where there are none."""
    found = tuple(sorted(folder.glob("*.arrow")))
    if not found:
        raise InputError(f"{folder}: has no traces (*.arrow); run in the root of epsim's repository, or use --traces")
    return found


def run_placement_study(
    study: PlacementStudy, *, jobs: int, say: Callable[[str], None], program: Sequence[str] = EPSIM
) -> tuple[dict[tuple[Path, Path], Found], list[str]]:
    """Run what is not done yet and return the values of every case that is, and a line for each that failed.

    program: words before the arguments of a child. Raises InputError before anything runs if files are wrong.
    """
    check_folder(study.folder)
    tasks = list(study.tasks())
    if tasks:
        say(f"{len(tasks)} of {len(study.cases)} comparisons to run, {jobs} at once")
    failures = run_tasks(tasks, program=program, jobs=jobs, say=say)
    found = {case: values for case in study.cases if (values := study.read(*case)) is not None}
    return found, failures


def command(study: PlacementStudy, docs: Path) -> str:
    """Return the command that makes the values and the document."""
    words = ["-o", str(study.folder), "--seeds", str(study.num_seeds)]
    if (folder := study.traces[0].parent) != Path(TRACES):
        words += ["--traces", str(folder)]
    if tuple(map(str, study.scenarios)) != SCENARIOS:
        words += [word for scenario in study.scenarios for word in ("--scenario", str(scenario))]
    return shlex.join(["epsim", "study", "placement", *words, "--docs", docs.as_posix()])

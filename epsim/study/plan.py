"""What a study must still train and capture: `Study`, its files (`StudyFolder`), and its `tasks`."""

import re
from dataclasses import dataclass
from pathlib import Path

from epsim.errors import InputError, TraceError
from epsim.scenario.load_train import load_train
from epsim.scenario.override import split_override
from epsim.scenario.train import TrainSpec
from epsim.scenario.yaml_text import parse_yaml
from epsim.study.children import Task
from epsim.study.methods import BASE
from epsim.trace.file import TraceFile

NUM_REQUESTS = 64  # of a trace
SCORES = "attention,gaussian"
DEFAULTS = {"config": "scenarios/train", "scenario": "scenarios/digits.yaml"}  # of the command's options


class StudyFolder:
    """Files of a study, by what they are for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def study(self) -> Path:
        """All figures."""
        return self.path / "study.json"

    def run(self, seed: int, method: str) -> Path:
        """The folder of a training run (docs/train.md)."""
        return self.path / f"seed-{seed}" / method

    def trace(self, seed: int, method: str) -> Path:
        """The routing trace of its model."""
        return self.path / f"seed-{seed}" / f"{method}.arrow"

    def log(self, seed: int, method: str, what: str) -> Path:
        """What a child process printed."""
        return self.path / f"seed-{seed}" / "log" / f"{method}-{what}.txt"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Methods trained from several seeds.

    Attributes:
        folder: what is trained, captured and found goes here.
        methods: names of `epsim.study.methods.METHODS`, `BASE` first.
        num_seeds: 0, 1, ...
        config: the folder of the training files.
        overrides: `path=value`, of every training.
    """

    folder: StudyFolder
    methods: tuple[str, ...]
    num_seeds: int
    config: Path
    overrides: tuple[str, ...] = ()

    def check_overrides(self) -> None:
        """Raise InputError for one that sets what a study compares: the seed, or the kind of method."""
        for text in self.overrides:
            steps = re.findall(r"[^.\[\]]+", split_override(text)[0])
            if steps[:1] == ["seed"]:
                raise InputError(f'--set "{text}": a study has seeds of its own; write how many with --seeds')
            if steps in (["method"], ["method", "kind"]):
                raise InputError(f'--set "{text}": methods are what a study compares; choose some with --methods')

    @property
    def cases(self) -> list[tuple[int, str]]:
        """Every seed with every method, in the order in which they are run."""
        return [(seed, method) for seed in range(self.num_seeds) for method in self.methods]

    def spec(self, seed: int, method: str) -> TrainSpec:
        """Return the training run of a seed and a method. Raises ScenarioError, one line."""
        return load_train(self.config / f"{method}.yaml", [*self.overrides, f"seed={seed}"])

    def tasks(self) -> list[Task]:
        """Return what is still to be run.

        Raises InputError where a run of another training file stands in the way.
        """
        return [task for seed, method in self.cases for task in self._tasks(seed, method)]

    def has_trace(self, seed: int, method: str) -> bool:
        """Return whether training and capture are complete."""
        return is_complete(self.folder.run(seed, method)) and _is_whole(self.folder.trace(seed, method))

    def _tasks(self, seed: int, method: str) -> list[Task]:
        run, trace = self.folder.run(seed, method), self.folder.trace(seed, method)
        _require_same(run, self.spec(seed, method))
        training = None if is_complete(run) else self._training(seed, method)
        if training is None and _is_whole(trace):
            return []
        capture = Task(
            label=f"seed {seed}, {method}, trace",
            arguments=_capture_words(run, trace),
            log=self.folder.log(seed, method, "trace"),
            needs=None if training is None else training.label,
            leaves=trace,
        )
        return [capture] if training is None else [training, capture]

    def _training(self, seed: int, method: str) -> Task:
        run, base = self.folder.run(seed, method), self.folder.run(seed, BASE)
        sets = [word for text in (*self.overrides, f"seed={seed}") for word in ("--set", text)]
        words = ["train", str(self.config / f"{method}.yaml"), *sets, "--threads", "1", "-o", str(run)]
        if (run / "last.pt").exists():
            words.append("--resume")
        elif method != BASE:
            words += ["--start", str(base)]
        waits = method != BASE and not is_complete(base)
        return Task(
            label=_label(seed, method),
            arguments=tuple(words),
            log=self.folder.log(seed, method, "train"),
            needs=_label(seed, BASE) if waits else None,
            leaves=self.folder.trace(seed, method),  # one that is there is of an earlier model
        )


def _capture_words(run: Path, trace: Path) -> tuple[str, ...]:
    requests = ("--builtin", "scenes", "--num-requests", str(NUM_REQUESTS))
    how = ("--scores", SCORES, "--threads", "1", "--compress")
    return ("trace", "--model", str(run / "model"), *requests, *how, "-o", str(trace))


def shortened(path: Path) -> Path:
    """Return a path inside the working directory as seen from there, so that traces and pages name no machine."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path


def is_complete(run: Path) -> bool:
    """Return whether a training run has come to its end."""
    return (run / "results.json").exists()


def _label(seed: int, method: str) -> str:
    return f"seed {seed}, {method}, training"


def _require_same(run: Path, spec: TrainSpec) -> None:
    """Raise InputError if a run that is complete, or can be gone on with, is of another training file."""
    if not is_complete(run) and not (run / "last.pt").exists():
        return
    try:
        theirs = parse_yaml((run / "train.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        theirs = None
    if theirs != spec.model_dump(mode="json"):
        raise InputError(f"{run}: holds a run of another training file; remove it, or name another folder with -o")


def _is_whole(trace: Path) -> bool:
    try:
        return len(TraceFile.open(trace).requests) == NUM_REQUESTS
    except TraceError:
        return False

"""The folder of a training run: `RunFolder`, whose files are written whole or not at all.

`train.yaml` is the run's YAML, `last.pt` what an interrupted run goes on from, `stage-NAME.pt` weights and the method's
state at the end of a stage, `model/` the trained model as a checkpoint, `results.json` what came out.
`log.csv` and `experts.npz` are those of `epsim.specialize.log`.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from epsim.atomic import check_folder, whole_file, write_errors
from epsim.errors import InputError
from epsim.scenario.load_train import train_yaml
from epsim.scenario.train import TrainSpec
from epsim.scenario.yaml_text import parse_yaml

State = dict[str, Any]
_YAML = "train.yaml"


class RunFolder:
    """Files of a run, by what they are for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def last(self) -> Path:
        """What an interrupted run goes on from."""
        return self.path / "last.pt"

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.path / "model"

    @property
    def results(self) -> Path:
        """What came out."""
        return self.path / "results.json"

    def begin(self, spec: TrainSpec) -> None:
        """Begin a new run in the folder. Raises InputError if it holds another already, or other files."""
        if not (self.path / _YAML).exists() and any(self.path.iterdir()):
            raise InputError(f"-o {self.path}: holds other files; name a new folder")
        if self.results.exists():
            raise InputError(f"-o {self.path}: holds a training run that is complete; name another folder")
        if self.last.exists():
            raise InputError(f"-o {self.path}: holds a training run; write --resume to go on with it, or name another")
        with write_errors(self.path):
            for stage in self.path.glob("stage-*.pt"):  # of a run that was killed before its first `last.pt`
                stage.unlink()
        _write_text(self.path / _YAML, train_yaml(spec))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other processes from training into it; InputError if one does already."""
        check_folder(self.path)
        with write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"-o {self.path}: another process trains into it; name another folder") from error
        else:
            yield
        finally:
            os.close(file)

    def resume(self, spec: TrainSpec) -> State:
        """Return the state to go on from. Raises InputError if there is none, or it is of another run."""
        if self.results.exists():
            raise InputError(f"--resume: the run in {self.path} is complete; name another folder with -o")
        if not self.last.exists():
            raise InputError(f"--resume: {self.path} holds no run to go on with; leave --resume out")
        state = read_state(self.last)
        ours, theirs = spec.model_dump(mode="json"), state.get("spec")
        if theirs != ours:
            raise InputError(
                f"--resume: {self.path} holds a run with another YAML{_first_difference(theirs, ours)}; go on with "
                f"{self.path / _YAML}"
            )
        return state

    def stage(self, name: str) -> Path:
        """The weights at the end of a stage."""
        return self.path / f"stage-{name}.pt"

    def save_last(self, state: State) -> None:
        """Replace what the run goes on from."""
        write_state(self.last, state)

    def save_results(self, results: State) -> None:
        """Write `results.json`, with which the run is complete, and drop what it would have gone on from."""
        _write_text(self.results, json.dumps(results, indent=2) + "\n")
        self.last.unlink(missing_ok=True)

    def replace_model(self, new: Path) -> None:
        """Put the folder `new`, beside it, in the place of the model."""
        with write_errors(self.model):
            shutil.rmtree(self.model, ignore_errors=True)
            new.replace(self.model)


def common_stages(spec: TrainSpec, other: Path) -> list[str]:
    """Return the stages, from the first on, that the run in `other` has done as `spec` asks for them.

    Model, data and seed must be the same, and so must the method from the first stage that it is in place.
    Raises InputError if there is no such stage.
    """
    theirs = _spec_of(other)
    ours = spec.model_dump(mode="json")
    common: list[str] = []
    if all(ours[key] == theirs.get(key) for key in ("seed", "model", "data")):
        for stage, their_stage in zip(ours["stages"], theirs["stages"], strict=False):
            same = stage == their_stage and (not stage["specialize"] or ours["method"] == theirs.get("method"))
            if not same or not RunFolder(other).stage(stage["name"]).exists():
                break
            common.append(stage["name"])
    if not common:
        raise InputError(
            f"--start {other}: its run has no stage in common with this one (same seed, model, data and first stage); "
            "leave --start out"
        )
    return common


def _spec_of(folder: Path) -> State:
    try:
        loaded = parse_yaml((folder / _YAML).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--start {folder}: holds no training run ({error.strerror}); write the folder of one"
        ) from error
    except ValueError as error:
        raise InputError(f"--start {folder}: train.yaml cannot be read; write the folder of another run") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("stages"), list):
        raise InputError(f"--start {folder}: train.yaml is not that of a run; write the folder of another run")
    return loaded


def _first_difference(theirs: Any, ours: Any, path: str = "") -> str:
    """Return where two runs differ first, and how; "" if that is no single value."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        items = ((f"{path}.{key}".strip("."), theirs.get(key), value) for key, value in ours.items())
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        items = ((f"{path}[{index}]", a, b) for index, (a, b) in enumerate(zip(theirs, ours, strict=True)))
    else:
        return f" ({path} is {theirs} there and {ours} here)" if path and theirs != ours else ""
    return next((found for item in items if (found := _first_difference(item[1], item[2], item[0]))), "")


def read_state(path: Path) -> State:
    """Return what `write_state` wrote; raises InputError for a damaged file."""
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; make it readable") from error
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise InputError(f"{path}: is damaged or no state of a run; start the run anew in another folder") from error
    return state


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as part, write_errors(path):
        part.write_text(text, encoding="utf-8")


def write_state(path: Path, state: State) -> None:
    """Write tensors and plain values whole or not at all."""
    with whole_file(path) as part, write_errors(path):
        try:
            torch.save(state, part)
        except RuntimeError as error:  # of torch's archive writer, when the disk is full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

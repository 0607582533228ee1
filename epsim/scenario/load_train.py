"""From a training file and `--set` overrides to a checked `TrainSpec` (`load_train`), and back to YAML (`train_yaml`).

A file may build on another, `base: FILE`: its own top-level keys replace those of that file. A path inside a file is
relative to that file, a path in an override of the command line to the working directory.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from epsim.errors import ScenarioError
from epsim.scenario.check import validated
from epsim.scenario.describe import closest, show
from epsim.scenario.override import OverrideRules, own_overrides, split_override
from epsim.scenario.train import CheckpointSpec, TrainSpec
from epsim.scenario.yaml_text import dump_yaml, read_mapping

_NOUN = "training"
_EXAMPLE = "stages[instruct].steps"
_FILES = ("data.train", "data.test")
_FOLDERS = ("model.checkpoint",)  # or a name on a hub
_HOLDERS = ("data", "model")  # sections in which paths may stand
_RULES = OverrideRules(
    example=_EXAMPLE,
    fixed={"base": "write it in a file", "overrides": "set the field itself"},
    switches=("method.kind", *_FOLDERS),
)


def load_train(path: Path, overrides: Iterable[str] = ()) -> TrainSpec:
    """Return the checked training run of a YAML file with `path=value` overrides applied.

    Raises ScenarioError with one line: the field's path, the value, the rule.
    """
    raw = _with_base(path, ())
    for text in overrides:
        target, value = split_override(text, f"{_EXAMPLE}=300")
        _set(raw, target, value)
    spec = validated(TrainSpec, raw, _NOUN)
    for name, file in (("data.train", spec.data.train), ("data.test", spec.data.test)):
        if file is not None and not Path(file).is_file():
            raise ScenarioError(f"{name}: {show(file)} is not a file; write the path of prompts with answers (JSONL)")
    return _absolute(spec)


def train_yaml(spec: TrainSpec) -> str:
    """Return a training file that says the same with its base, overrides and defaults written out.

    Paths in it are absolute, so that it says the same wherever it lies.
    """
    return dump_yaml(spec.model_dump(mode="json"))


def _absolute(spec: TrainSpec) -> TrainSpec:
    """Return the run with absolute paths."""
    files = {name: str(Path(file).resolve()) for name in ("train", "test") if (file := getattr(spec.data, name))}
    changed: dict[str, Any] = {"data": spec.data.model_copy(update=files)}
    if isinstance(spec.model, CheckpointSpec) and Path(spec.model.checkpoint).is_dir():
        changed["model"] = CheckpointSpec(checkpoint=str(Path(spec.model.checkpoint).resolve()))
    return spec.model_copy(update=changed)


def _with_base(path: Path, above: tuple[str, ...], where: str = "") -> dict[str, Any]:
    """Return the mapping of a file on top of its base's; above: the files, resolved, that led here."""
    written = read_mapping(path, _NOUN, where)
    _require_known_keys(written)
    own = own_overrides(written, f"{_EXAMPLE}: 300")
    above = (*above, os.path.realpath(path))
    raw = _base(path, written.pop("base"), above) if "base" in written else {}
    raw |= {key: _anchored(key, value, path.parent) for key, value in written.items()}
    for target, value in own.items():
        _set(raw, str(target), _anchored(target, value, path.parent), "overrides")
    return raw


def _base(path: Path, name: Any, above: tuple[str, ...]) -> dict[str, Any]:
    """Return the mapping of the file that another names as its base."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ScenarioError(f"{path}: base: {show(name)} is not a path; write that of a training file, or leave it out")
    base = path.parent / name
    if os.path.realpath(base) in above:
        raise ScenarioError(f"{path}: base: {show(name)} leads back to itself; write all fields into one of the files")
    return _with_base(base, above, f"{path}: base: ")


def _require_known_keys(written: Mapping[Any, Any]) -> None:
    """Raise ScenarioError for a misspelt key: without its base a file would seem to lack everything."""
    known = sorted([*TrainSpec.model_fields, "base", "overrides"])
    for key in written:
        if isinstance(key, str) and key not in known:
            raise ScenarioError(f"{key}: is not a known field{closest(key, known)}")


def _set(raw: dict[str, Any], target: str, value: Any, origin: str = "--set") -> None:
    """Set one field, in place; another method, and a checkpoint or drawn model instead of the other, starts afresh."""
    model = raw.get("model")
    if target in ("model.backbone", "model[backbone]") and isinstance(model, dict) and "checkpoint" in model:
        raw["model"] = {}
    _RULES.set_field(raw, target, value, origin)


def _anchored(target: object, value: Any, folder: Path) -> Any:
    """Return the value of a field with the paths that it holds, if it holds any, relative to `folder`."""
    if isinstance(value, str) and value:
        is_path = target in _FILES or (target in _FOLDERS and (folder / value).is_dir())
        return str(folder / value) if is_path else value
    if isinstance(value, Mapping) and target in _HOLDERS:
        return {key: _anchored(f"{target}.{key}", entry, folder) for key, entry in value.items()}
    return value

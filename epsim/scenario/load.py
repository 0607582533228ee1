"""From a scenario file and `--set` overrides to a checked `ScenarioSpec` (`load_scenario`).

Names of presets and files of models, clusters and device types are replaced by what they hold. A path inside a YAML
file is relative to that file, a path in an override of the command line to the working directory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from epsim.errors import ScenarioError
from epsim.scenario.describe import describe, did_you_mean, join, show
from epsim.scenario.model import ModelSpec
from epsim.scenario.spec import ScenarioSpec
from epsim.scenario.yaml_text import parse_yaml

_PRESET_FOLDERS = {"model": "models", "cluster": "clusters", "device_types": "devices"}
_SECTIONS = ("model", "cluster")
_SWITCHES = ("parallelism.kind", "placement.policy", "trace.kind")
_PATHS = ("trace.path", "placement.path")
_SYNTHETIC_KINDS = ("uniform", "zipf", "published")
_HOLDERS = ("trace", "placement", "cluster", "cluster.device_types")  # sections in which paths may stand
_DEVICE_TYPE = re.compile(r"cluster\.device_types\.[^.]+")
_STEP = r"[^.\[\]]+"
_TARGET = re.compile(rf"{_STEP}(\.{_STEP}|\[{_STEP}\])*")


def load_scenario(path: Path, overrides: Iterable[str] = ()) -> ScenarioSpec:
    """Return the checked scenario of a YAML file with `path=value` overrides applied.

    Raises ScenarioError with one line: the field's path, the value, the rule.
    """
    return check_scenario(load_raw(path, overrides))


def load_raw(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping of a scenario file with its own and the given overrides applied, not yet checked."""
    written = _read_yaml(path, "scenario")
    own = written.pop("overrides", None) or {}
    if not isinstance(own, dict):
        raise ScenarioError(
            f"overrides: {show(own)} is not a mapping of paths to values; "
            'write e.g. {"cluster.links[0].bandwidth": 25 Gbit/s}'
        )
    raw = {key: _anchored(key, value, path.parent) for key, value in written.items()}
    for target, value in own.items():
        apply_override(raw, str(target), _anchored(target, value, path.parent), origin="overrides")
    for text in overrides:
        target, value = split_override(text)
        apply_override(raw, target, value)
    return raw


def check_scenario(raw: dict[str, Any]) -> ScenarioSpec:
    """Return the spec of a raw mapping (presets may still be names), or raise ScenarioError."""
    for section in _SECTIONS:
        if isinstance(raw.get(section), str):
            raw[section] = _load_preset(section, raw[section], section)
    _load_device_types(raw.get("cluster"))
    if isinstance(raw.get("trace"), str):
        path = Path(raw["trace"])
        if path.name in _SYNTHETIC_KINDS and not path.exists():
            raise ScenarioError(f'trace: "{path.name}" is not a file; write {{kind: {path.name}}} for such a trace')
        raw["trace"] = {"kind": "file", "path": raw["trace"]}
    try:
        return ScenarioSpec.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(describe(error, raw)) from error
    except UnicodeEncodeError as error:
        raise ScenarioError("scenario: a text holds half a character (a lone surrogate); write it out") from error


def scenario_schema() -> dict[str, Any]:
    """Return the JSON schema of a scenario file, with what `load_raw` and `check_scenario` accept beside the spec."""
    schema = ScenarioSpec.model_json_schema()
    for section in (*_SECTIONS, "trace"):
        known = {"examples": preset_names(section)} if section in _PRESET_FOLDERS else {}
        schema["properties"][section] = {"anyOf": [{"type": "string", **known}, schema["properties"][section]]}
    device_types = schema["$defs"]["ClusterSpec"]["properties"]["device_types"]
    named = {"type": "string", "examples": preset_names("device_types")}
    device_types["additionalProperties"] = {"anyOf": [named, device_types["additionalProperties"]]}
    schema["properties"]["overrides"] = {"anyOf": [{"type": "object"}, {"type": "null"}]}
    return schema


def load_model(name: str, where: str = "model") -> ModelSpec:
    """Return the model behind a preset name or a path to a YAML file; `where` is what messages call it."""
    raw = _load_preset("model", name, where)
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(describe(error, raw)) from error


def preset_names(section: str) -> list[str]:
    """Return the names of the shipped presets of "model", "cluster" or "device_types"."""
    folder = files("epsim") / "presets" / _PRESET_FOLDERS[section]
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def split_override(text: str) -> tuple[str, Any]:
    """Return path and value of a `path=value` override; the value is read as YAML.

    >>> split_override("workload.batch_sizes=[1, 8]")
    ('workload.batch_sizes', [1, 8])
    """
    target, equals, value = text.partition("=")
    if not equals or not target.strip():
        raise ScenarioError(f'--set "{text}": write path=value, e.g. transmission.mode=async')
    try:
        return target.strip(), parse_yaml(value)
    except ValueError as error:
        raise ScenarioError(f'--set "{text}": the value is not YAML ({error}); write it as in a file') from error


def apply_override(raw: dict[str, Any], target: str, value: Any, origin: str = "--set") -> None:
    """Set one field of a raw scenario, in place; list entries go by index or by their `name`: `links[ethernet]`.

    Another placement policy or kind of trace or parallelism starts afresh: the old one's own fields do not outlive it.
    origin: where the override stands, for messages.
    """
    where = f'{origin} "{target}"'
    if not _TARGET.fullmatch(target):
        raise ScenarioError(f"{where}: not a path; write names as in cluster.links[0].bandwidth")
    steps = re.findall(_STEP, target)
    if steps[0] == "overrides":
        raise ScenarioError(f'{origin} "{target}": overrides cannot be set; set the field itself')
    section = raw.get(steps[0])
    if target in _SWITCHES and not (isinstance(section, dict) and section.get(steps[1]) == value):
        raw[steps[0]] = {}
    holder: Any = raw
    for depth, step in enumerate(steps[:-1]):
        key = _find(holder, steps[: depth + 1], where)
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            if depth == 0 and step in _SECTIONS:
                holder[key] = _load_preset(step, holder[key], step)
            elif depth == 2 and steps[:2] == ["cluster", "device_types"]:
                holder[key] = _load_preset("device_types", holder[key], ".".join(steps[:3]))
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
        holder = holder[key]
    holder[_find(holder, steps, where)] = value


def _find(holder: Any, steps: Sequence[str], where: str) -> Any:
    """Return the key or index that the last of the steps means in a mapping or a list."""
    step = steps[-1]
    if isinstance(holder, dict):
        return step
    if not isinstance(holder, list):
        field = join([int(key) if key.isdecimal() else key for key in steps[:-1]])
        raise ScenarioError(f"{where}: {field} is {show(holder)}, which has no fields; write {field}=...")
    if step.isdecimal() and int(step) < len(holder):
        return int(step)
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in holder]
    if step in names:
        return names.index(step)
    if not holder:
        raise ScenarioError(f"{where}: the list is empty; write all of it")
    known = ", ".join(["0" if len(holder) == 1 else f"0 to {len(holder) - 1}", *(str(n) for n in names if n)])
    raise ScenarioError(f"{where}: there is no entry {step}; write one of {known}")


def _read_yaml(path: Path, noun: str) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}; write the path of a {noun} file") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not a text file in UTF-8; write the path of a {noun} file in YAML") from error
    except ValueError as error:
        raise ScenarioError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        raise ScenarioError(f"{path}: the file is empty; write the fields of a {noun}")
    if not isinstance(content, dict):
        raise ScenarioError(f"{path}: {show(content)} is not a mapping; write the fields of a {noun}")
    return content


def _load_preset(section: str, name: str, where: str) -> dict[str, Any]:
    """Return the mapping behind a preset name or a path to a YAML file; `where` is the field that holds the name."""
    if name.endswith((".yaml", ".yml")):
        content = _read_yaml(Path(name), section)
        return {key: _anchored(f"{section}.{key}", value, Path(name).parent) for key, value in content.items()}
    known = preset_names(section)
    if name not in known:
        meant = did_you_mean(name, known)
        raise ScenarioError(
            f'{where}: "{name}" is not a preset; write one of {", ".join(known)}, or a path that ends in .yaml'
            + (f"; {meant}" if meant else "")
        )
    text = (files("epsim") / "presets" / _PRESET_FOLDERS[section] / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = parse_yaml(text)
    return preset


def _load_device_types(cluster: Any) -> None:
    """Replace the device types of a cluster that are names by what these hold, in place."""
    types = cluster.get("device_types") if isinstance(cluster, dict) else None
    if isinstance(types, dict):
        for name in [name for name, value in types.items() if isinstance(value, str)]:
            types[name] = _load_preset("device_types", types[name], f"cluster.device_types.{name}")


def _anchored(target: object, value: Any, folder: Path) -> Any:
    """Return the value of a field with the paths that it holds, if it holds any, relative to `folder`."""
    if isinstance(value, str):
        is_file = (target in _SECTIONS or _DEVICE_TYPE.fullmatch(str(target))) and value.endswith((".yaml", ".yml"))
        return str(folder / value) if is_file or target in ("trace", *_PATHS) else value
    if isinstance(value, Mapping) and target in _HOLDERS:
        return {key: _anchored(f"{target}.{key}", entry, folder) for key, entry in value.items()}
    return value

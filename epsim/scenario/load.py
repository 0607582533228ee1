"""From a scenario file and `--set` overrides to a checked `ScenarioSpec` (`load_scenario`).

Names of presets and files of models and clusters are replaced by what they hold. A path inside a YAML file is relative
to that file, a path in an override to the working directory.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from epsim.errors import ScenarioError
from epsim.scenario.spec import ScenarioSpec

_PRESET_FOLDERS = {"model": "models", "cluster": "clusters"}
_SWITCHES = ("placement.policy", "trace.kind")
_STEP = re.compile(r"([^.\[\]]+)|\[([^\[\]]+)\]")


def load_scenario(path: Path, overrides: Iterable[str] = ()) -> ScenarioSpec:
    """Return the checked scenario of a YAML file with `path=value` overrides applied.

    Raises ScenarioError with one line: the field's path, the value, the rule.
    """
    return check_scenario(load_raw(path, overrides))


def load_raw(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping of a scenario file with its own and the given overrides applied, not yet checked."""
    raw = _read_yaml(path, "scenario")
    _anchor_paths(raw, path.parent)
    own = raw.pop("overrides", None) or {}
    if not isinstance(own, dict):
        raise ScenarioError(
            'overrides: write a mapping of paths to values, e.g. "cluster.links[0].bandwidth: 25 Gbit/s"'
        )
    for target, value in own.items():
        apply_override(raw, str(target), value)
    for text in overrides:
        target, value = split_override(text)
        apply_override(raw, target, value)
    return raw


def check_scenario(raw: dict[str, Any]) -> ScenarioSpec:
    """Return the spec of a raw mapping (presets may still be names), or raise ScenarioError."""
    for section in _PRESET_FOLDERS:
        if isinstance(raw.get(section), str):
            raw[section] = _load_section(section, raw[section])
    if isinstance(raw.get("trace"), str):
        raw["trace"] = {"kind": "file", "path": raw["trace"]}
    try:
        return ScenarioSpec.model_validate(raw)
    except ValidationError as error:
        raise ScenarioError(describe(error, raw)) from error


def preset_names(section: str) -> list[str]:
    """Return the names of the shipped presets of "model" or "cluster"."""
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
        return target.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ScenarioError(f'--set "{text}": the value is not YAML; quote it') from error


def apply_override(raw: dict[str, Any], target: str, value: Any) -> None:
    """Set one field of a raw scenario, in place; list entries go by index or by their `name`: `links[ethernet]`.

    Another placement policy or kind of trace starts afresh: the old one's own fields do not outlive it.
    """
    steps = [match[1] or match[2] for match in _STEP.finditer(target)]
    if not steps or "".join(_STEP.split(target)[::3]).strip("."):
        raise ScenarioError(f'--set "{target}": write a path of names, e.g. cluster.links[0].bandwidth')
    section = raw.get(steps[0])
    if target in _SWITCHES and isinstance(section, dict) and section.get(steps[1]) != value:
        raw[steps[0]] = {}
    holder: Any = raw
    for depth, step in enumerate(steps[:-1]):
        key = _find(holder, step, steps[: depth + 1])
        if depth == 0 and step in _PRESET_FOLDERS and isinstance(holder.get(key), str):
            holder[key] = _load_section(step, holder[key])
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
        holder = holder[key]
    holder[_find(holder, steps[-1], steps)] = value


def _find(holder: Any, step: str, steps: Sequence[str]) -> Any:
    """Return the key or index that a step means in a mapping or a list."""
    path = _join(steps)
    if isinstance(holder, dict):
        return step
    if not isinstance(holder, list):
        raise ScenarioError(f'--set "{path}": {_join(steps[:-1])} is {_show(holder)}, which has no fields')
    if step.lstrip("-").isdigit():
        if 0 <= int(step) < len(holder):
            return int(step)
        raise ScenarioError(f'--set "{path}": there are {len(holder)} entries, numbered from 0; write one of those')
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in holder]
    if step not in names:
        raise ScenarioError(f'--set "{path}": no entry has the name "{step}"; write an index or one of {_names(names)}')
    return names.index(step)


def _names(names: Iterable[object]) -> str:
    return ", ".join(str(name) for name in names if name is not None) or "(none has a name)"


def _read_yaml(path: Path, noun: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot read this {noun}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{path}: not a text file in UTF-8; a {noun} is YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or "cannot be parsed").split())
        raise ScenarioError(f"{path}: not valid YAML{where}: {problem}") from error
    if not isinstance(content, dict):
        raise ScenarioError(f"{path}: a {noun} is a mapping of fields; this holds {_show(content)}")
    return content


def _load_section(section: str, name: str) -> dict[str, Any]:
    """Return the mapping behind a preset name or a path to a YAML file."""
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name), section)
    known = preset_names(section)
    if name not in known:
        raise ScenarioError(
            f'{section}: "{name}" is not a preset; write one of {", ".join(known)}, or a path that ends in .yaml'
            + _closest(name, known)
        )
    text = (files("epsim") / "presets" / _PRESET_FOLDERS[section] / f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make the paths that a scenario file names relative to the file's folder, in place."""
    for section in _PRESET_FOLDERS:
        if isinstance(raw.get(section), str) and raw[section].endswith((".yaml", ".yml")):
            raw[section] = str(folder / raw[section])
    if isinstance(raw.get("trace"), str):
        raw["trace"] = str(folder / raw["trace"])
    for section in ("trace", "placement"):
        values = raw.get(section)
        if isinstance(values, dict) and isinstance(values.get("path"), str):
            values["path"] = str(folder / values["path"])


def describe(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """Return one line on the first mistake that pydantic found: path, value, rule, and what to write."""
    first, *others = error.errors(include_url=False)
    keys = _real_keys(first["loc"], raw)
    path, given, context = _join(keys) or "scenario", _show(first["input"]), first.get("ctx", {})
    match first["type"]:
        case "missing":
            rule = "is missing; add it"
        case "extra_forbidden":
            rule = "is not a known field" + _closest(str(keys[-1]), _siblings(first["loc"]))
        case "value_error":
            rule = str(context["error"])
        case "literal_error":
            rule = f"{given} is not one of {context['expected']}"
        case "union_tag_invalid":
            tag = context["discriminator"].strip("'")
            path, rule = f"{path}.{tag}", f'"{context["tag"]}" is not one of {context["expected_tags"]}'
        case "union_tag_not_found":
            rule = f"the field {context['discriminator']} is missing; it says which kind this is"
        case _:
            message = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            rule = f"{given} must be {message}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{path}: {rule}{more}"


def _real_keys(location: Sequence[str | int], raw: Any) -> list[str | int]:
    """Drop the tags of discriminated unions, which pydantic puts among the keys."""
    keys: list[str | int] = []
    holder = raw
    for i, key in enumerate(location):
        is_tag = isinstance(holder, dict) and key not in holder and key in (holder.get("kind"), holder.get("policy"))
        if is_tag and i < len(location) - 1:
            continue
        keys.append(key)
        if isinstance(holder, dict):
            holder = holder.get(key)
        elif isinstance(holder, list) and isinstance(key, int) and key < len(holder):
            holder = holder[key]
    return keys


def _siblings(location: Sequence[str | int]) -> list[str]:
    """Return the fields that are allowed where an unknown one was found, by the schema."""
    schema = ScenarioSpec.model_json_schema()
    node: Any = schema
    for key in location[:-1]:
        node = _child(node, key, schema)
    return sorted(_resolve(node, schema).get("properties", {}))


def _resolve(node: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    while isinstance(node, dict) and "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node if isinstance(node, dict) else {}


def _child(node: Any, key: str | int, schema: Mapping[str, Any]) -> Any:
    node = _resolve(node, schema)
    if "discriminator" in node and key in node["discriminator"]["mapping"]:
        return {"$ref": node["discriminator"]["mapping"][key]}
    options = [
        node,
        *(_resolve(option, schema) for option in (*node.get("anyOf", ()), *node.get("oneOf", ()))),
    ]
    for option in options:
        if "discriminator" in option and key in option["discriminator"]["mapping"]:
            return {"$ref": option["discriminator"]["mapping"][key]}
        if isinstance(key, int) and "items" in option:
            return option["items"]
        if key in option.get("properties", {}):
            return option["properties"][key]
        if isinstance(option.get("additionalProperties"), dict):
            return option["additionalProperties"]
    return {}


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; known are {', '.join(known)}" if known and len(known) < 20 else ""


def _join(keys: Sequence[str | int]) -> str:
    """Return keys as a path.

    >>> _join(["cluster", "links", 2, "bandwidth"])
    'cluster.links[2].bandwidth'
    """
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) or str(key).isdigit() else f".{key}" if text else str(key)
    return text


def _show(value: object) -> str:
    """Return a value as the user wrote it, short enough for a line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

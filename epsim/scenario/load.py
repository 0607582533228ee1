"""From a scenario file and `--set` overrides to a checked `ScenarioSpec` (`load_scenario`).

Names of presets and files of models, clusters and device types are replaced by what they hold. A path inside a YAML
file is relative to that file, a path in an override of the command line to the working directory.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from epsim.errors import ScenarioError
from epsim.scenario.check import validated
from epsim.scenario.cluster import ClusterSpec
from epsim.scenario.describe import did_you_mean
from epsim.scenario.model import ModelSpec
from epsim.scenario.override import OverrideRules, own_overrides, split_override
from epsim.scenario.spec import ScenarioSpec
from epsim.scenario.yaml_text import parse_yaml, read_mapping

_PRESET_FOLDERS = {"model": "models", "cluster": "clusters", "device_types": "devices"}
_SECTIONS = ("model", "cluster")
_PATHS = ("trace.path", "placement.path")
_SYNTHETIC_KINDS = ("uniform", "zipf", "published")
_HOLDERS = ("trace", "placement", "cluster", "cluster.device_types")  # sections in which paths may stand
_EXAMPLE = '"cluster.links[0].bandwidth": 25 Gbit/s'  # of an override
_DEVICE_TYPE = re.compile(r"cluster\.device_types\.[^.]+")
_PROFILE = re.compile(r"(cluster\.device_types\.[^.]+|device_types)\.profile")  # the latter in a device's own file


def load_scenario(path: Path, overrides: Iterable[str] = ()) -> ScenarioSpec:
    """Return the checked scenario of a YAML file with `path=value` overrides applied.

    Raises ScenarioError with one line: the field's path, the value, the rule.
    """
    return check_scenario(load_raw(path, overrides))


def load_raw(path: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return the mapping of a scenario file with its own and the given overrides applied, not yet checked."""
    written = read_mapping(path, "scenario")
    own = own_overrides(written, _EXAMPLE)
    raw = {key: _anchored(key, value, path.parent) for key, value in written.items()}
    for target, value in own.items():
        apply_override(raw, str(target), _anchored(target, value, path.parent), origin="overrides")
    apply_overrides(raw, overrides)
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Apply `path=value` overrides, or those of the file in `@FILE`, to a raw scenario, in place."""
    for text in overrides:
        if text.startswith("@"):
            _apply_file(raw, Path(text[1:]))
            continue
        target, value = split_override(text)
        apply_override(raw, target, value)


def _apply_file(raw: dict[str, Any], path: Path) -> None:
    """Apply the `overrides` of a file, as `--set @FILE` names it, in place."""
    content = read_mapping(path, "overrides", "--set @")
    own = own_overrides(content, _EXAMPLE)
    if not own:
        raise ScenarioError(f"--set @{path}: has no overrides; name a file that epsim measure network wrote")
    for target, value in own.items():
        apply_override(raw, str(target), _anchored(target, value, path.parent), origin=f"--set @{path}")


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
    return validated(ScenarioSpec, raw)


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
    return validated(ModelSpec, _load_preset("model", name, where), "model")


def load_cluster(name: str, where: str = "cluster") -> ClusterSpec:
    """Return the cluster behind a preset name or a path to a YAML file; `where` is what messages call it."""
    raw = _load_preset("cluster", name, where)
    _load_device_types(raw)
    return validated(ClusterSpec, raw, "cluster")


def preset_names(section: str) -> list[str]:
    """Return the names of the shipped presets of "model", "cluster" or "device_types"."""
    folder = files("epsim") / "presets" / _PRESET_FOLDERS[section]
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def apply_override(raw: dict[str, Any], target: str, value: Any, origin: str = "--set") -> None:
    """Set one field of a raw scenario, in place; list entries go by index or by their `name`: `links[ethernet]`.

    Another placement policy or kind of trace or parallelism starts afresh: the old one's own fields do not outlive it.
    origin: where the override stands, for messages.
    """
    _RULES.set_field(raw, target, value, origin)


def _opened(steps: Sequence[str], name: str) -> dict[str, Any] | None:
    """Return the preset or file that a name at a path stands for, if one can stand there."""
    if len(steps) == 1 and steps[0] in _SECTIONS:
        return _load_preset(steps[0], name, steps[0])
    if len(steps) == 3 and list(steps[:2]) == ["cluster", "device_types"]:
        return _load_preset("device_types", name, ".".join(steps))
    return None


_RULES = OverrideRules(
    example="cluster.links[0].bandwidth",
    fixed={"overrides": "set the field itself"},
    switches=("parallelism.kind", "placement.policy", "trace.kind"),
    open_name=_opened,
)


def _load_preset(section: str, name: str, where: str) -> dict[str, Any]:
    """Return the mapping behind a preset name or a path to a YAML file; `where` is the field that holds the name."""
    if name.endswith((".yaml", ".yml")):
        content = read_mapping(Path(name), section)
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
        is_file = is_file or target in ("trace", *_PATHS) or bool(_PROFILE.fullmatch(str(target)))
        return str(folder / value) if is_file else value
    if isinstance(value, Mapping) and (target in _HOLDERS or _DEVICE_TYPE.fullmatch(str(target))):
        return {key: _anchored(f"{target}.{key}", entry, folder) for key, entry in value.items()}
    return value

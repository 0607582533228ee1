"""Single fields of a cluster by their path: `ClusterField` reads and writes numbers in the field's own units.

For what changes one number of a cluster many times (a calibration) and must follow the rules of the YAML.
"""

import re
import types
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from epsim.errors import ScenarioError
from epsim.scenario.base import StrictModel
from epsim.scenario.cluster import ClusterSpec
from epsim.scenario.describe import closest, describe_value

_STEP = r"[^.\[\]]+"
_TARGET = re.compile(rf"cluster(\.{_STEP}|\[{_STEP}\])+")


@dataclass(frozen=True, kw_only=True)
class ClusterField:
    """A numeric field under `cluster.`, by the path that `--set` takes. ScenarioError where there is no such field."""

    path: str

    def __post_init__(self) -> None:
        if not _TARGET.fullmatch(self.path):
            raise ScenarioError(
                f'"{self.path}" is not a field of the cluster; write e.g. cluster.device_types.orin.launch_overhead'
            )
        _ = self._adapter

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}  # what pydantic makes of the path cannot be pickled, and is made again

    @property
    def steps(self) -> list[str]:
        """The names of the path below `cluster`."""
        return _steps(self.path)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        annotation: Any = ClusterSpec
        for step in self.steps:
            annotation = _child(_bare(annotation), step, self.path)
        if _bare(annotation) is not float:
            raise ScenarioError(f'"{self.path}" is not a number; write the path of a single number')
        return TypeAdapter(annotation)

    def parse(self, value: Any) -> float:
        """Return a value of the YAML ("5 us", 0.5) in SI; ValueError with value, rule and mend."""
        try:
            return float(self._adapter.validate_python(value, strict=True))
        except ValidationError as error:
            raise ValueError(describe_value(error)) from error

    def format(self, value: float) -> str | float:
        """Return an SI value as the YAML has it; `parse` gives exactly this value again."""
        written: str | float = self._adapter.dump_python(value, mode="json")
        return written

    def keys(self, cluster: Mapping[str, Any]) -> tuple[str | int, ...]:
        """Return the keys and indices that the path means in a dump of a ClusterSpec, whichever way it is written."""
        return cluster_keys(self.path, cluster)

    def rounded(self, value: float, digits: int = 6) -> float:
        """Return a value whose text has so many digits at most."""
        written = self.format(value)
        if isinstance(written, str):
            number, unit = written.split()
            return self.parse(f"{float(number):.{digits}g} {unit}")
        return float(f"{value:.{digits}g}")

    def read(self, cluster: Mapping[str, Any]) -> float | None:
        """Return the field's SI value in a dump of a ClusterSpec; None where its section is left out."""
        holder: Any = cluster
        for step in self.steps:
            if holder is None:
                return None
            holder = holder[_key(holder, step, self.path)]
        return None if holder is None else float(holder)

    def write(self, cluster: MutableMapping[str, Any], value: float) -> None:
        """Set the field in a dump of a ClusterSpec; a section that was left out gets its defaults, None for none."""
        holder: Any = cluster
        annotation: Any = ClusterSpec
        for step in self.steps[:-1]:
            key, annotation = _key(holder, step, self.path), _bare(_child(annotation, step, self.path))
            if holder[key] is None:
                holder[key] = _defaults(annotation)
            holder = holder[key]
        holder[_key(holder, self.steps[-1], self.path)] = value


def cluster_keys(path: str, cluster: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Return the keys and indices that a path from `cluster` on, of a number or of a section, means in a dump.

    ScenarioError where the cluster has no such entry.
    """
    keys: list[str | int] = []
    holder: Any = cluster
    for step in _steps(path):
        keys.append(step if holder is None else _key(holder, step, path))
        holder = None if holder is None else holder[keys[-1]]
    return tuple(keys)


def _steps(path: str) -> list[str]:
    return re.findall(_STEP, path)[1:]


def _bare(annotation: Any) -> Any:
    """Return the type behind Annotated and `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(option for option in get_args(annotation) if option is not types.NoneType)
        else:
            return annotation


def _child(annotation: Any, step: str, path: str) -> Any:
    """Return the annotation of a step below one of a model, a mapping or a list."""
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        names = {info.alias or name: info for name, info in annotation.model_fields.items()}
        if step not in names:
            raise ScenarioError(f'"{path}": {step} is not a known field{closest(step, sorted(names))}')
        info = names[step]
        return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    if get_origin(annotation) in (dict, list):
        return get_args(annotation)[-1]
    raise ScenarioError(f'"{path}": there is no field {step}; write the path of a single number')


def _defaults(section: type[StrictModel]) -> dict[str, Any]:
    return {
        name: None if info.is_required() else info.get_default(call_default_factory=True)
        for name, info in section.model_fields.items()
    }


def _key(holder: Any, step: str, path: str) -> str | int:
    """Return the key or index that a step means; list entries go by index or by their name."""
    if isinstance(holder, Mapping):
        if step in holder:
            return step
        raise ScenarioError(f'"{path}": the cluster has no {step}; write one of {", ".join(map(str, holder))}')
    if step.isdecimal() and int(step) < len(holder):
        return int(step)
    names = [entry.get("name") for entry in holder]
    if step in names:
        return names.index(step)
    known = ", ".join([*map(str, range(len(names))), *(name for name in names if name)])
    raise ScenarioError(f'"{path}": there is no entry {step}; write one of {known}')

"""Fields of a YAML file that are set by path: `split_override` reads `path=value`, `OverrideRules` puts a value in."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epsim.errors import ScenarioError
from epsim.scenario.describe import join, show
from epsim.scenario.yaml_text import parse_yaml

_STEP = r"[^.\[\]]+"
_TARGET = re.compile(rf"{_STEP}(\.{_STEP}|\[{_STEP}\])*")


def split_override(text: str, example: str = "transmission.mode=async") -> tuple[str, Any]:
    """Return path and value of a `path=value` override; the value is read as YAML. example: for messages.

    >>> split_override("workload.batch_sizes=[1, 8]")
    ('workload.batch_sizes', [1, 8])
    """
    target, equals, value = text.partition("=")
    if not equals or not target.strip():
        raise ScenarioError(f'--set "{text}": write path=value, e.g. {example}')
    try:
        return target.strip(), parse_yaml(value)
    except ValueError as error:
        raise ScenarioError(f'--set "{text}": the value is not YAML ({error}); write it as in a file') from error


def own_overrides(written: dict[str, Any], example: str) -> dict[Any, Any]:
    """Take the `overrides` of a file out of its mapping and return them. example: for messages."""
    own = written.pop("overrides", None)
    if not isinstance(own, dict | None):
        raise ScenarioError(f"overrides: {show(own)} is not a mapping of paths to values; write e.g. {{{example}}}")
    return own or {}


@dataclass(frozen=True, kw_only=True)
class OverrideRules:
    """What is particular to overrides of one kind of YAML file.

    Attributes:
        example: a path, for messages.
        fixed: top-level keys that only the file itself can say, and what to do instead.
        switches: fields that choose among kinds of a section; another value empties the section first.
        open_name: what stands behind the name of a preset at these steps; None if names there are just text.
    """

    example: str
    fixed: Mapping[str, str]
    switches: tuple[str, ...]
    open_name: Callable[[Sequence[str], str], dict[str, Any] | None] = lambda steps, name: None

    def set_field(self, raw: dict[str, Any], target: str, value: Any, origin: str) -> None:
        """Set one field, in place; list entries go by index or by their `name`. origin: for messages."""
        where = f'{origin} "{target}"'
        if not _TARGET.fullmatch(target):
            raise ScenarioError(f"{where}: not a path; write names as in {self.example}")
        steps = re.findall(_STEP, target)
        if steps[0] in self.fixed:
            raise ScenarioError(f"{where}: {steps[0]} cannot be set; {self.fixed[steps[0]]}")
        section = raw.get(steps[0])
        is_same = isinstance(section, dict) and section.get(steps[-1]) == value
        if ".".join(steps) in self.switches and not is_same:
            raw[steps[0]] = {}
        holder: Any = raw
        for depth in range(1, len(steps)):
            holder = self._entered(holder, steps[:depth], where)
        holder[_find(holder, steps, where)] = value

    def _entered(self, holder: Any, steps: Sequence[str], where: str) -> Any:
        """Return what the last of the steps leads to; a preset is opened and a missing section made, in place."""
        key = _find(holder, steps, where)
        if isinstance(holder, dict):
            name = holder.get(key)
            opened = self.open_name(steps, name) if isinstance(name, str) else None
            if opened is not None:
                holder[key] = opened
            elif name is None:
                holder[key] = {}
        return holder[key]


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

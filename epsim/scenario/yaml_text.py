"""YAML as epsim reads it, `parse_yaml` and `read_mapping`, and writes it, `dump_yaml`.

A key that is there twice is an error, and a date is text.
"""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from epsim.errors import ScenarioError
from epsim.scenario.describe import show

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML without dates and without silently dropped keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                if key_node.value in seen:
                    raise ConstructorError(None, None, f'"{key_node.value}" is there twice', key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML document; raises ValueError with one line that says where and what is wrong.

    >>> parse_yaml("batch_sizes: [1, 8]")
    {'batch_sizes': [1, 8]}
    >>> parse_yaml("a: 1\\na: 2")
    Traceback (most recent call last):
    ValueError: line 2, column 1: "a" is there twice
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise ValueError(where + " ".join(str(problem).split())) from error
    except ValueError as error:  # thousands of digits, or none after 0x
        raise ValueError("a number cannot be read; put it in quotes if it is text") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_mapping(path: Path, noun: str, where: str = "") -> dict[str, Any]:
    """Return the mapping that a YAML file holds, or raise ScenarioError.

    noun: what the file is, for messages.
    where: put before the path in messages: the field that names it.
    """
    name = f"{where}{path}"
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{name}: cannot be read: {error.strerror}; write the path of a {noun} file") from error
    except UnicodeDecodeError as error:
        raise ScenarioError(f"{name}: not a text file in UTF-8; write the path of a {noun} file in YAML") from error
    except ValueError as error:
        raise ScenarioError(f"{name}: not valid YAML: {error}") from error
    if content is None:
        raise ScenarioError(f"{name}: the file is empty; write the fields of a {noun}")
    if not isinstance(content, dict):
        raise ScenarioError(f"{name}: {show(content)} is not a mapping; write the fields of a {noun}")
    return content


def dump_yaml(content: Any) -> str:
    """Return content as YAML, keys in their order."""
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
    return text

"""YAML as epsim reads it: `parse_yaml`. A key that is there twice is an error, and a date is text."""

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError

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

"""One line on a mistake in a YAML file: `describe` turns pydantic's first error into path, value, rule and mend."""

import difflib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Keys = Sequence[str | int]


def describe(error: ValidationError, raw: Mapping[str, Any], spec: type[BaseModel], noun: str = "scenario") -> str:
    """Return one line on the first mistake that pydantic found in `raw`.

    spec: what `raw` was held to; its fields are those that the line proposes.
    noun: what all of `raw` is called where a mistake is in no field.
    """
    first, *others = error.errors(include_url=False)
    schema = spec.model_json_schema()
    keys = _real_keys(first["loc"], raw, schema)
    if first["type"].startswith("union_tag"):
        keys.append(first["ctx"]["discriminator"].strip("'"))
    if first["type"] == "invalid_key":
        keys.pop()
    more = f" (and {len(others)} more)" if others else ""
    return f"{join(keys) or noun}: {_rule(first, keys, schema)}{more}"


def describe_value(error: ValidationError) -> str:
    """Return value, rule and mend of the first mistake in a single value."""
    first, *_ = error.errors(include_url=False)
    return _rule(first, (), {})


def _rule(error: ErrorDetails, keys: Keys, schema: Mapping[str, Any]) -> str:
    """Return value, rule and mend."""
    given, context = show(error["input"]), error.get("ctx", {})
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "missing":
            node = _node_at(error["loc"], schema)
            example = _mapping_example(node, "")
            choice = f"one of {', '.join(node['enum'])}" if "enum" in node else "it"
            return f"is missing; write {choice}" + (f", e.g. {example}" if example else "")
        case "extra_forbidden":
            return "is not a known field" + closest(str(keys[-1]), _fields(_node_at(error["loc"][:-1], schema)))
        case "literal_error":
            return f"{given} is not known; write {_plain(context['expected'])}"
        case "union_tag_invalid":
            given = show(error["input"].get(keys[-1]))
            return f"{given} is not known; write one of {_plain(context['expected_tags'])}"
        case "union_tag_not_found":
            return f"is missing; write one of {', '.join(_tags(_node_at(error['loc'], schema)))}"
        case "dict_type" | "model_type" | "model_attributes_type":
            example = _mapping_example(_node_at(error["loc"], schema), error["input"])
            return f"{given} is not a mapping of fields" + (f"; write e.g. {example}" if example else "")
        case "too_short" | "string_too_short":
            return f"{given} is empty; write at least one " + ("entry" if error["type"] == "too_short" else "character")
        case _:
            return f"{given} {_type_rule(error)}"


def _type_rule(error: ErrorDetails) -> str:
    """Return what is wrong with the type or size of a plain value."""
    value, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "string_type" | "invalid_key" if error["loc"][-1] == "[key]" or error["type"] == "invalid_key":
            return "is not the name of a field; write text, in quotes if it looks like a number"
        case "string_type":
            return "is not text; write text, in quotes if it looks like a number"
        case "string_unicode":
            return "holds half a character (a lone surrogate); write it out"
        case "int_type":
            return f"is not a whole number; write e.g. {_whole(value)}"
        case "float_type" | "finite_number":
            return f"is not a finite number; write e.g. {_number(value)}"
        case "bool_type":
            return "is neither true nor false; write one of them, without quotes"
        case "list_type" | "sequence_str" | "is_instance_of":  # the last two of a Sequence; no field asks for a class
            return "is not a list; " + (
                f"write e.g. [{value}]" if isinstance(value, int | str) else "write one with [ ]"
            )
        case "greater_than":
            return f"is not above {context['gt']:g}; write a larger number"
        case "greater_than_equal":
            return f"is below {context['ge']}; write {context['ge']} or more"
        case "less_than" if isinstance(context["lt"], float):
            return f"is not below {context['lt']:g}; write a smaller number"
        case "less_than" | "less_than_equal":
            limit = context.get("le", context.get("lt", 0) - 1)
            limit = int(limit) if limit == int(limit) else limit
            return f"is above {limit}; write {limit} or less"
        case "string_pattern_mismatch":
            return "is not a name; write letters, digits and _, a letter first"
        case "recursion_loop":
            return "holds itself; write it out without the YAML alias"
        case _:
            return f"does not fit: {error['msg']}"


def _whole(value: Any) -> int:
    """Return the whole number that was perhaps meant."""
    try:
        return max(1, int(float(value)))
    except (TypeError, ValueError, OverflowError):
        return 1


def _number(value: Any) -> str:
    """Return how YAML writes the number that was perhaps meant: it reads 2e-5, without a point, as text."""
    try:
        number = Decimal(value) if isinstance(value, str) and "e" in value.lower() else None
    except ArithmeticError:
        number = None
    return f"{number:f}" if number is not None and abs(number.adjusted()) < 12 else "0.5"


def _plain(names: str) -> str:
    return names.replace("'", "")


def _real_keys(location: Keys, raw: Any, schema: Mapping[str, Any]) -> list[str | int]:
    """Drop what pydantic puts among the keys: tags of discriminated unions, and keys that are wrong themselves."""
    models = schema.get("$defs", {})
    keys: list[str | int] = []
    holder = raw
    for i, key in enumerate(location):
        is_tag = key in models or (isinstance(holder, dict) and key in (holder.get("kind"), holder.get("policy")))
        if is_tag and not (isinstance(holder, dict) and key in holder):
            continue
        if location[i + 1 : i + 2] == ("[key]",):
            break
        keys.append(key)
        if isinstance(holder, dict):
            holder = holder.get(key)
        elif isinstance(holder, list) and isinstance(key, int) and key < len(holder):
            holder = holder[key]
    return keys


def _node_at(location: Keys, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON schema says of the field at a location of pydantic's."""
    node: Any = schema
    for key in location:
        node = _child(node, key, schema)
    node = _resolve(node, schema)
    if "oneOf" in node and "discriminator" not in node:  # told apart by a function: the first is what is meant
        return _resolve(node["oneOf"][0], schema)
    options = [_resolve(option, schema) for option in node.get("anyOf", ()) if option != {"type": "null"}]
    return options[0] if len(options) == 1 else node


def _resolve(node: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    while isinstance(node, dict) and "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node if isinstance(node, dict) else {}


def _child(node: Any, key: str | int, schema: Mapping[str, Any]) -> Any:
    node = _resolve(node, schema)
    if {"$ref": f"#/$defs/{key}"} in node.get("oneOf", ()):
        return {"$ref": f"#/$defs/{key}"}
    for option in (node, *(_resolve(option, schema) for option in (*node.get("anyOf", ()), *node.get("oneOf", ())))):
        if "discriminator" in option and key in option["discriminator"]["mapping"]:
            return {"$ref": option["discriminator"]["mapping"][key]}
        if isinstance(key, int) and "items" in option:
            return option["items"]
        if key in option.get("properties", {}):
            return option["properties"][key]
        if isinstance(option.get("additionalProperties"), dict):
            return option["additionalProperties"]
    return {}


def _fields(node: Mapping[str, Any]) -> list[str]:
    return sorted(node.get("properties", {}))


def _tags(node: Mapping[str, Any]) -> list[str]:
    return list(node.get("discriminator", {}).get("mapping", {}))


def _mapping_example(node: Mapping[str, Any], value: object) -> str:
    """Return a short mapping that fits the schema at a place, or nothing."""
    if tags := _tags(node):
        name = node["discriminator"]["propertyName"]
        return f"{{{name}: {value if value in tags else node.get('default', {}).get(name, tags[0])}}}"
    fields = node.get("required") or list(node.get("properties", {}))
    return f"{{{fields[0]}: ...}}" if fields else ""


def closest(name: str, known: Sequence[str]) -> str:
    """Return which of the known names was perhaps meant, or else all of them if they are few."""
    if meant := did_you_mean(name, known):
        return f"; {meant}"
    return f"; known are {', '.join(known)}" if known and len(known) < 20 else ""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a question after the known name that is nearest, "" if none is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{close[0]}"?' if close else ""


def join(keys: Keys) -> str:
    """Return keys as a path.

    >>> join(["cluster", "links", 2, "bandwidth"])
    'cluster.links[2].bandwidth'
    """
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def show(value: object) -> str:
    """Return a value as the user wrote it, short enough for a line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."

"""Where routing comes from, in words that no output leaves out: `origin_line`, `origin_words`."""

import json
from collections.abc import Mapping
from typing import Any


def origin_line(trace: Mapping[str, Any]) -> str:
    """Return the line for a trace with `origin`, `mock` and `description`."""
    mock = ", from MOCK tokens" if trace["mock"] else ""
    return f"{origin_words(trace['origin'])}{mock}: {_described(trace['description'])}"


def origin_words(origin: str) -> str:
    """Return the words for an origin; all but "captured" in capitals."""
    return f"routing: {origin if origin == 'captured' else origin.upper()}"


def _described(description: str) -> str:
    """A synthetic trace's description is a JSON object of its parameters: read it out."""
    try:
        fields = json.loads(description)
    except ValueError:
        return description
    return ", ".join(f"{name} {value}" for name, value in fields.items()) if isinstance(fields, dict) else description

"""Where routing comes from, in words that no output leaves out: `origin_line`, `origin_words`."""

from collections.abc import Mapping
from typing import Any


def origin_line(trace: Mapping[str, Any]) -> str:
    """Return the line for a trace with `origin`, `mock` and `description`."""
    mock = ", MOCK" if trace["mock"] else ""
    return f"{origin_words(trace['origin'])}{mock}: {trace['description']}"


def origin_words(origin: str) -> str:
    """Return the words for an origin; all but "captured" in capitals."""
    return f"routing: {origin if origin == 'captured' else origin.upper()}"

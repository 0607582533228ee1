"""Where routing comes from, in words that no output leaves out: `origin_line`, `origin_words`."""

from collections.abc import Mapping
from typing import Any


def origin_line(trace: Mapping[str, Any]) -> str:
    """Return the line for a trace with `kind` and `description`."""
    return f"{origin_words(trace['kind'])}: {trace['description']}"


def origin_words(kind: str) -> str:
    """Return the words for a kind of trace; all but "captured" in capitals."""
    return f"routing: {kind if kind.startswith('captured') else kind.upper()}"

"""Pieces of Markdown: `table`, and `capital` for what is in it."""

from collections.abc import Iterable, Sequence


def table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are text already."""
    lines = [list(columns)]
    lines.append(["---"] * len(lines[0]))
    lines += [list(row) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def capital(text: str) -> str:
    """Return a text with a capital first letter, all else as it is."""
    return text[:1].upper() + text[1:]

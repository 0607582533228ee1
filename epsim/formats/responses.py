"""Responses of a server in files: `read_responses` (.json, .jsonl, .npz); fields of them that engines share."""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from epsim.errors import FormatError
from epsim.formats.reading import Ints, in_range, ints, mapping, parse_json, read_json, read_text, whole
from epsim.json_file import check_regular
from epsim.scenario.describe import show

# What NumPy raises of a damaged .npy or .npz file, or one with Python objects in it.
DAMAGED = (
    *(ValueError, TypeError, KeyError, AttributeError, SyntaxError, TokenError, OverflowError, NotImplementedError),
    *(EOFError, OSError, MemoryError, zipfile.BadZipFile, zlib.error),
)
NOUN = "a response as .json, a list of them, or a .jsonl file with one per line"


def read_responses(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield file and place, and each response."""
    if path.suffix == ".npz":
        yield str(path), _arrays(path)
    elif path.suffix == ".jsonl":
        lines = read_text(path, NOUN).split("\n")  # str.splitlines() also splits at U+2028, which JSON has in strings
        full = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
        if not full:
            raise FormatError(f"{path}: is empty; write {NOUN}")
        for i, line in full:
            where = f"{path}: line {i}"
            yield where, mapping(parse_json(line, where, "a response"), where, "a response (a JSON object)")
    elif path.suffix == ".json":
        content = read_json(path, NOUN)
        if isinstance(content, dict):
            yield str(path), content
            return
        if not isinstance(content, list) or not content:
            raise FormatError(f"{path}: {show(content)} is neither a response nor a list of them; write {NOUN}")
        for i, response in enumerate(content):
            yield f"{path}: [{i}]", mapping(response, f"{path}: [{i}]", "a response (a JSON object)")
    else:
        raise FormatError(f"{path}: ends in none of .json, .jsonl and .npz; write {NOUN}")


def _arrays(path: Path) -> dict[str, Any]:
    """Return the arrays of an .npz file; one with Python objects in it is refused."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            return {name: content[name] for name in content.files}
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise FormatError(f"{path}: cannot be read: {reason}; write an .npz file of plain arrays") from error
    except DAMAGED as error:
        raise FormatError(f"{path}: is no .npz file of plain arrays, or damaged; write one with numpy.savez") from error


def token_ids(holder: dict[str, Any], key: str, where: str) -> Ints | None:
    """Return the token ids under a key, None if there are none."""
    value = holder.get(key)
    if value is None:
        return None
    place = f"{where}: {key}"
    if isinstance(value, list) and not value:
        return np.zeros(0, dtype=np.int64)
    ids_T = ints(value, ("token",), place)
    in_range(ids_T, -1, 2**31 - 1, place, "write ids of the vocabulary")
    return ids_T


def count(holder: dict[str, Any], section: str, key: str, where: str) -> int | None:
    """Return a count of tokens from a section of a response, None if it is not there."""
    part = holder.get(section)
    value = part.get(key) if isinstance(part, dict) else None
    return None if value is None else whole(value, f"{where}: {section}.{key}")

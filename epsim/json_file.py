"""JSON files that others wrote, read strictly: `read_regular`, `check_regular`, `decode_text`, `parse_json`.

A key that is there twice is an error, as are NaN and Infinity, which JSON does not have; a byte-order mark is not.
"""

import errno
import json
import stat
from pathlib import Path
from typing import Any, NoReturn


class JsonContentError(ValueError):
    """JSON that parses, and that nobody should have written; one line with what is wrong and the mend."""


def read_regular(path: Path) -> bytes:
    """Return the content of a file; raises OSError, for a pipe or a device before it is opened."""
    check_regular(path)
    return path.read_bytes()


def check_regular(path: Path) -> None:
    """Raise OSError for what is not there, and for pipes, devices and sockets, which could be waited for forever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def decode_text(content: bytes) -> str:
    """Return text from UTF-8, with a byte-order mark or without; raises UnicodeDecodeError."""
    return content.decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """Return parsed JSON; raises JsonContentError, ValueError (mostly JSONDecodeError) or RecursionError.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    epsim.json_file.JsonContentError: "a" is there twice; write it once
    """
    return json.loads(text, object_pairs_hook=_mapping, parse_constant=_refuse_constant)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    holder = dict(pairs)
    if len(holder) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = json.dumps(next(key for i, key in enumerate(keys) if key in keys[:i]))
        shown = twice if len(twice) <= 60 else twice[:57] + "..."
        raise JsonContentError(f"{shown} is there twice; write it once")
    return holder


def _refuse_constant(name: str) -> NoReturn:
    raise JsonContentError(f"{name} is not a number of JSON; write a finite one")

"""Files that are written whole or not at all, `whole_file`; what can go wrong, `require_writable`, `write_errors`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from epsim.errors import OutputError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it becomes `path` when the block ends well, else it goes away.

    Raises OutputError, before the block, if nothing can be written there.
    """
    named = Path(path)
    require_replaceable(named)
    target = named.resolve()  # a link stays a link: what it leads to is replaced
    part = _part(target)
    with write_errors(named):
        part.touch()
    try:
        yield part
        with write_errors(named):
            part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise OutputError unless a file can be written there, before hours of work that end in writing it."""
    require_replaceable(path)
    if not path.parent.exists():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it, or name another path")
    with write_errors(path):
        _part(path.resolve()).touch()
        _part(path.resolve()).unlink()


def require_replaceable(path: Path) -> None:
    """Raise OutputError where something stands that is not a regular file: a folder, a device, a pipe."""
    with write_errors(path):
        if path.is_dir():
            raise OutputError(f"{path}: it is a directory; name a file to write")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: it is not a regular file; name a file to write")


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn an OSError in the block into an OutputError that names `target`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error


def _part(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.part")

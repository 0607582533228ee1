"""Files that are written whole or not at all, `whole_file`, `write_all`; what can go wrong, `write_errors`.

Before there is anything to write: `check_folder`, `check_file`, `check_outputs`, and by trying, `require_writable`.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
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


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files, each whole or not at all, with their folders; none of them if one cannot be replaced."""
    for target in contents:
        require_replaceable(target)
    for target, content in contents.items():
        with write_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as part:
            part.write_bytes(content)


def check_folder(folder: Path) -> None:
    """Raise OutputError if files can surely not be written into a folder, which need not be there yet."""
    with write_errors(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    which = "" if there == folder else f"{there} "
    if not there.is_dir():
        raise OutputError(f"{folder}: {which}is not a folder; name another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: {which}is not writable; name another path")


def check_file(path: Path) -> None:
    """Raise OutputError if a file can surely not be written: it is a folder, or there is none to write it into."""
    require_replaceable(path)
    if not path.parent.exists():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it, or name another path")
    check_folder(path.parent)


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise OutputError if a file can surely not be written, or would replace an input or another output.

    outputs: by the option that names them; None for what is not asked for or not given.
    """
    taken = {path.resolve(): "is read for this" for path in inputs if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        check_file(path)
        if use := taken.get(path.resolve()):
            raise OutputError(f"{option} {path}: {use}; name another file")
        taken[path.resolve()] = f"is what {option} writes"


def require_writable(path: Path) -> None:
    """Raise OutputError unless a file can be written there, before hours of work that end in writing it."""
    check_file(path)
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

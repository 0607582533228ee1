"""The measured runs that ship with epsim: `shipped_folders`."""

from importlib.resources import as_file, files
from pathlib import Path

_NAMES = ("two-ranks-dilated", "two-ranks-emulated", "two-ranks-real", "two-ranks-in-step", "two-nodes-dilated")


def shipped_folders() -> list[Path]:
    """Return the folders, in the order of the page about them; epsim is installed unpacked."""
    with as_file(files("epsim.validate") / "data" / "measured") as folder:
        return [folder / name for name in _NAMES]

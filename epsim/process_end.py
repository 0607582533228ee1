"""How a process that was a rank ends: `note_rank`, `was_rank`, `leave`.

Threads of torch.distributed, which may want the interpreter or wait for ranks that are gone, now and then abort a
process that ends as Python does ("terminate called without an active exception").
"""

import contextlib
import os
import sys
from typing import NoReturn

_rank = False


def note_rank() -> None:
    """Say that this process uses torch.distributed from now on."""
    global _rank
    _rank = True


def was_rank() -> bool:
    """Return whether this process has to `leave`."""
    return _rank


def leave(code: int) -> NoReturn:
    """End this process now, with what it printed printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a reader that is gone, a stream that is not
            stream.flush()
    os._exit(code)

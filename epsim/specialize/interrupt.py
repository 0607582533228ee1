"""Ctrl-C that waits for the end of a step: `deferred_interrupts`, and the `DeferredInterrupt` that it becomes."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class DeferredInterrupt(KeyboardInterrupt):
    """An interrupt that has waited: no step is half done, as it may be where KeyboardInterrupt itself is raised."""


class Interrupts:
    """Whether an interrupt was asked for."""

    def __init__(self) -> None:
        self._asked = False

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal: the first is noted, the second ends the program as it would without this."""
        if self._asked:
            signal.default_int_handler(number, frame)
        self._asked = True

    def raise_if_asked(self) -> None:
        """Raise DeferredInterrupt if one was noted."""
        if self._asked:
            raise DeferredInterrupt


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """Note SIGINT and SIGTERM inside the block, to be raised where `raise_if_asked` is called."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

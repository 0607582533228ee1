"""Where messages that have been posted are taken up: `Box` in the order of posting, `WatchedBox` in that of arrival.

torch.distributed tells of an arrival only to whoever waits for it. With one peer the order is known and the rank itself
waits. With more, a thread for each `Stream` (messages of one kind from one peer) waits and hands over.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from epsim.measure.transport import Posted

_LONG_S = 600.0


class Box:
    """Takes up messages in the order in which they were expected."""

    def __init__(self) -> None:
        self._expected: deque[tuple[Posted, Any]] = deque()

    def expect(self, posted: Posted, item: Any) -> None:
        self._expected.append((posted, item))

    def take(self) -> Any:
        """Return the next item when its message is there."""
        posted, item = self._expected.popleft()
        posted.wait()
        return item


class WatchedBox:
    """Takes up what streams have put in, in the order of arrival."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        self._arrived.put(item)

    def take(self) -> Any:
        """Return the item that arrived first; the error of a stream that failed is raised here."""
        item = self._arrived.get(timeout=_LONG_S)
        if isinstance(item, BaseException):
            raise item
        return item


class Stream:
    """A thread that waits for messages one after the other and calls what is to be done with each."""

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        """failed: is told of an error, of the message or of what was called, which ends the stream."""
        self._queue: queue.SimpleQueue[tuple[Posted, Callable[[], None]] | None] = queue.SimpleQueue()
        self._failed = failed
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def expect(self, posted: Posted, then: Callable[[], None]) -> None:
        self._queue.put((posted, then))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    @torch.inference_mode()  # which is a thread's own
    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            posted, then = entry
            try:
                posted.wait()
                then()
            except BaseException as error:
                self._failed(error)
                return

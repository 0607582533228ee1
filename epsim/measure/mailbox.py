"""Where messages that have been posted are taken up: `Box` in the order of posting, `WatchedBox` in that of arrival.

`Streams` are those of a rank, `Buffers` the memory of its messages.

torch.distributed tells of an arrival only to whoever waits for it. With one peer the order is known and the rank itself
waits. With more, a thread for each `Stream` (messages of one kind from one peer) waits and hands over.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from epsim.measure.transport import Kind, PeerLost, Posted, Transport

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
        try:
            item = self._arrived.get(timeout=_LONG_S)
        except queue.Empty as error:
            raise PeerLost(f"a rank is gone: nothing has come for {_LONG_S:.0f} s") from error
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


class Streams:
    """The streams of a rank, one per kind, peer and label, kept from step to step."""

    def __init__(self) -> None:
        self._streams: dict[tuple[Kind, int, int], Stream] = {}
        self.tell_all: Callable[[BaseException], None] = lambda error: None

    def of(self, kind: Kind, peer: int, label: int) -> Stream:
        """Return the stream of such messages."""
        key = kind, peer, label
        if key not in self._streams:
            self._streams[key] = Stream(lambda error: self.tell_all(error))
        return self._streams[key]

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


@dataclass
class Buffers:
    """Memory for messages, by what they are; it grows in the first run, which is not timed."""

    transport: Transport
    kept: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def take(self, num_bytes: int, *key: Any) -> torch.Tensor:
        """Return num_bytes of the buffer of a key."""
        found = self.kept.get(key)
        if found is None or len(found) < num_bytes:
            found = self.kept[key] = self.transport.buffer(max(num_bytes, 1))
        return found[:num_bytes]

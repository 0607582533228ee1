"""Timelines for Perfetto (ui.perfetto.dev) and chrome://tracing: `timeline` makes the JSON object of a run's slices.

A process per device; threads compute, host, tx and rx (more than one of the latter where messages overlap); flow
arrows from each message's departure to its arrival. Times in microseconds, as the format wants.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol


class TimelineSlice(Protocol):
    """What the timeline needs to know of a piece of work."""

    @property
    def device(self) -> int: ...
    @property
    def track(self) -> Literal["compute", "host", "tx", "rx"]: ...
    @property
    def name(self) -> str: ...
    @property
    def start_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def layer(self) -> int: ...
    @property
    def peer(self) -> int: ...
    @property
    def num_bytes(self) -> float: ...
    @property
    def message_id(self) -> str: ...


_FIRST_LANE = {"compute": 0, "host": 50, "tx": 100, "rx": 200}


def timeline(slices: Iterable[TimelineSlice], device_names: Sequence[str], trace_origin: str) -> dict[str, Any]:
    """Return the trace-event object of the slices; where their routing came from stands in its `otherData`."""
    events: list[dict[str, Any]] = []
    lanes: dict[tuple[int, str], list[float]] = {}
    for piece in sorted(slices, key=lambda s: (s.start_s, s.end_s, s.device, s.track, s.name, s.peer)):
        lane = _free_lane(lanes.setdefault((piece.device, piece.track), []), piece)
        place = {"pid": piece.device, "tid": _FIRST_LANE[piece.track] + lane}
        peer = device_names[piece.peer] if piece.peer >= 0 else None
        arguments = {"layer": piece.layer, "peer": peer, "bytes": piece.num_bytes or None}
        events.append(
            {
                "ph": "X",
                "name": f"{piece.name} {peer}" if piece.track == "compute" and peer else piece.name,
                "cat": piece.track,
                **place,
                "ts": piece.start_s * 1e6,
                "dur": (piece.end_s - piece.start_s) * 1e6,
                "args": {key: value for key, value in arguments.items() if value is not None},
            }
        )
        if piece.message_id:
            events.append(_arrow_end(piece, place))
    return {
        "traceEvents": [*_names(lanes, device_names), *events],
        "displayTimeUnit": "ns",
        "otherData": {"trace_origin": trace_origin},
    }


def _free_lane(busy_until_s: list[float], piece: TimelineSlice) -> int:
    """Return the first lane that is free at the start of the piece, and take it: slices of a lane never overlap."""
    for lane, until_s in enumerate(busy_until_s):
        if until_s <= piece.start_s:
            busy_until_s[lane] = piece.end_s
            return lane
    busy_until_s.append(piece.end_s)
    return len(busy_until_s) - 1


def _arrow_end(piece: TimelineSlice, place: dict[str, int]) -> dict[str, Any]:
    """A flow arrow leaves in the middle of the tx slice and binds to the rx slice in which it ends."""
    middle = (piece.start_s + piece.end_s) / 2 * 1e6
    event = {"name": piece.name, "cat": "message", "id": piece.message_id, **place, "ts": middle}
    return {"ph": "s", **event} if piece.track == "tx" else {"ph": "f", "bp": "e", **event, "ts": piece.end_s * 1e6}


def _names(lanes: Mapping[tuple[int, str], list[float]], device_names: Sequence[str]) -> list[dict[str, Any]]:
    """Name the processes and threads, and put compute above tx above rx."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": device, "args": {"name": name}}
        for device, name in enumerate(device_names)
    ]
    for (device, track), busy_until_s in sorted(lanes.items()):
        for lane in range(len(busy_until_s)):
            name = track if lane == 0 else f"{track} {lane + 1}"
            tid = _FIRST_LANE[track] + lane
            events.append({"ph": "M", "name": "thread_name", "pid": device, "tid": tid, "args": {"name": name}})
            events.append(
                {
                    "ph": "M",
                    "name": "thread_sort_index",
                    "pid": device,
                    "tid": tid,
                    "args": {"sort_index": tid},
                }
            )
    return events

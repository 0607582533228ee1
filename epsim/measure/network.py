"""Micro-benchmarks of the network as the engine uses it: `measure_network`, run by all ranks together.

Messages go through the same `Transport` as in the engine, after a pause in which a rank waits as an emulated device
does, or computes: what follows a pause finds cold caches and sleeping threads, and costs two or three times as much.
For each pair of ranks that stands for others, by size: one-way time (half a round trip), the time that posting a send
and a receive takes its caller, both ways at once, and goodput. Of all ranks: the barrier, and what transfers take from
compute.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from epsim.measure.dry import dry_runs
from epsim.measure.emulate import Waiter, Way
from epsim.measure.iperf import iperf3_bytes_per_s
from epsim.measure.transport import Kind, Transport, now_s, wait_all

_PAUSE_S = 0.003
_WARM_UP = 3
_STREAM_BYTES = 2**17  # of the messages in which goodput and interference are measured
_STREAM_S = 0.4
Pause = Callable[[float], None]


def measure_network(transport: Transport, job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return, on every rank, what rank 0 will report.

    job: pairs [[a, b], ...]; sizes in bytes; repeats; pause "wait" or "compute"; way: how to wait, None to choose.
    """
    way, waits = _choose_way(transport, job["way"])
    pause: Pause = Waiter(way).until if job["pause"] == "wait" else _Computing(device).until
    pairs: list[dict[str, Any]] = []
    for a, b in job["pairs"]:
        cells = [_measure_pair(transport, a, b, size, job["repeats"], pause) for size in job["sizes"]]
        bytes_per_s = _goodput(transport, a, b, 8)
        goodput = _goodput(transport, a, b, max(8, min(400, int(bytes_per_s * _STREAM_S / _STREAM_BYTES))))
        pairs.append({"pair": [a, b], "cells": cells, "goodput_bytes_per_s": goodput})
    return {
        "pause": job["pause"],
        "way": way,
        "waits": waits,
        "pairs": pairs,
        "iperf3_bytes_per_s": iperf3_bytes_per_s(transport, *job["pairs"][0]),
        "barrier": _measure_barrier(transport, job["repeats"], pause),
        "dry_step_s": dry_runs(job["dry"], transport, pause),
        "interference_s_per_byte": (
            _interference(transport, device, pairs[0]["goodput_bytes_per_s"]) if job["pause"] == "compute" else None
        ),
    }


def _choose_way(transport: Transport, way: Way | None) -> tuple[Way, dict[str, float]]:
    """Return how to wait, and by how much either way overruns (median of the ranks' means): the better one is taken."""
    found: dict[str, float] = {}
    options: tuple[Way, ...] = ("sleep", "spin")
    for option in options:
        transport.barrier()
        errors_s = Waiter(option).errors_s(_PAUSE_S, 40)
        found[option] = float(np.median(transport.gather(float(np.mean(errors_s)))))
    return way if way is not None else min(options, key=lambda option: found[option]), found


class _Computing:
    """Passes the time with small matrix products, as a rank with real kernels does."""

    def __init__(self, device: torch.device) -> None:
        self._a = torch.randn(4, 256, device=device)
        self._b = torch.randn(128, 256, 256, device=device)  # 32 MB: out of most caches; a product takes some 20 us

    def until(self, deadline_s: float) -> None:
        i = 0
        while now_s() < deadline_s:
            (self._a @ self._b[i % len(self._b)]).sum().item()
            i += 1

    def work(self, products: int) -> float:
        """Return the seconds that so many products take."""
        start = now_s()
        for i in range(products):
            self._a @ self._b[i % len(self._b)]
        return now_s() - start


def _summary(values: Any) -> dict[str, float]:
    """Return median and quartiles in s."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"s": float(median), "p25_s": float(low), "p75_s": float(high)}


def _measure_pair(transport: Transport, a: int, b: int, size: int, repeats: int, pause: Pause) -> dict[str, Any]:
    """Return the figures of one pair and size, on all ranks."""
    seen: dict[str, list[float]] = {}
    transport.barrier()
    if transport.rank in (a, b):
        peer = b if transport.rank == a else a
        seen = _ping_pong(transport, peer, size, repeats, pause, first=transport.rank == a)
        seen["both"] = _both_ways(transport, peer, size, repeats, pause)
    of_a, of_b = (transport.gather(seen)[rank] for rank in (a, b))
    one_way = (np.array(of_a["turn"]) - np.array(of_b["turn"])) / 2
    both = (np.array(of_a["both"]) + np.array(of_b["both"])) / 2
    return {
        "bytes": size,
        "one_way": _summary(one_way),
        "both_ways": _summary(both),
        "send": _summary(of_a["send"] + of_b["send"]),
        "receive": _summary(of_a["receive"] + of_b["receive"]),
    }


def _ping_pong(
    transport: Transport, peer: int, size: int, repeats: int, pause: Pause, *, first: bool
) -> dict[str, list[float]]:
    """Send and get back in turn, each side after a pause; the receive is always posted before.

    Returns seconds of each turn: "turn", from before the send to the arrival (first), or from the arrival to before the
    send (the other): their difference is twice the one-way time. "send", "receive": what posting them took.
    """
    out, back = transport.buffer(size), transport.buffer(size)
    posted = transport.receive(peer, Kind.DISPATCH, back)
    turns, sends, receives = [], [], []
    for turn in range(repeats + _WARM_UP):
        arrived_s = now_s()
        if not first:
            posted.wait()
            arrived_s = now_s()
            posting_s = _post_next(transport, peer, back, turn < repeats + _WARM_UP - 1)
            posted = posting_s[1]
        pause(now_s() + _PAUSE_S)
        before_s = now_s()
        sent = transport.send(peer, Kind.DISPATCH, out)
        sends.append(now_s() - before_s)
        if first:
            posted.wait()
            turns.append(now_s() - before_s)
            posting_s = _post_next(transport, peer, back, turn < repeats + _WARM_UP - 1)
            posted = posting_s[1]
        else:
            turns.append(before_s - arrived_s)
        receives.append(posting_s[0])
        sent.wait()
    return {"turn": turns[_WARM_UP:], "send": sends[_WARM_UP:], "receive": receives[_WARM_UP:-1]}


def _post_next(transport: Transport, peer: int, back: torch.Tensor, more: bool) -> tuple[float, Any]:
    """Post the next receive, if there is one more; return what that took, and the receive."""
    if not more:
        return 0.0, None
    before_s = now_s()
    posted = transport.receive(peer, Kind.DISPATCH, back)
    return now_s() - before_s, posted


def _both_ways(transport: Transport, peer: int, size: int, repeats: int, pause: Pause) -> list[float]:
    """Return, for sends in both directions at once, seconds from this rank's send to the arrival of the other's."""
    out, back = transport.buffer(size), transport.buffer(size)
    seconds = []
    for _ in range(repeats + _WARM_UP):
        posted = transport.receive(peer, Kind.COMBINE, back)
        _meet(transport, peer)
        pause(now_s() + _PAUSE_S)
        before_s = now_s()
        sent = transport.send(peer, Kind.COMBINE, out)
        posted.wait()
        seconds.append(now_s() - before_s)
        sent.wait()
    return seconds[_WARM_UP:]


def _meet(transport: Transport, peer: int) -> None:
    """Return when both have come here (a barrier of two)."""
    data, empty = transport.buffer(1), transport.buffer(1)
    posted = transport.receive(peer, Kind.KV, data)
    transport.send(peer, Kind.KV, empty).wait()
    posted.wait()


def _goodput(transport: Transport, a: int, b: int, repeats: int) -> float:
    """Return bytes/s of messages sent one behind the other from a to b."""
    found = 0.0
    transport.barrier()
    if transport.rank == b:
        data = [transport.buffer(_STREAM_BYTES) for _ in range(repeats)]
        posted = [transport.receive(a, Kind.DISPATCH, one) for one in data]
        _meet(transport, a)
        posted[0].wait()
        start_s = now_s()
        wait_all(posted[1:])
        found = (repeats - 1) * _STREAM_BYTES / (now_s() - start_s)
    elif transport.rank == a:
        out = transport.buffer(_STREAM_BYTES)
        _meet(transport, b)
        wait_all([transport.send(b, Kind.DISPATCH, out) for _ in range(repeats)])
    return float(transport.gather(found)[b])


def _measure_barrier(transport: Transport, repeats: int, pause: Pause) -> dict[str, float]:
    """Return seconds that a barrier takes when all ranks come at about the same time, after a pause."""
    seconds = []
    for _ in range(repeats + _WARM_UP):
        transport.barrier()
        pause(now_s() + _PAUSE_S)
        before_s = now_s()
        transport.barrier()
        seconds.append(now_s() - before_s)
    return _summary(np.mean(transport.gather(seconds[_WARM_UP:]), axis=0))


def _interference(transport: Transport, device: torch.device, goodput_bytes_per_s: float) -> float:
    """Return compute seconds lost per byte that rank 0 sends or receives meanwhile (rank 1 does the same)."""
    computing, peer, lost = _Computing(device), 1 - transport.rank, []
    num_messages = max(4, int(goodput_bytes_per_s * 2 * _STREAM_S / _STREAM_BYTES))
    out = transport.buffer(_STREAM_BYTES) if transport.rank < 2 else None
    products = max(1, int(_STREAM_S / max(computing.work(200) / 200, 1e-6)))
    for _ in range(3):
        transport.barrier()
        if out is None:
            continue
        alone_s = computing.work(products)
        into = transport.buffer(_STREAM_BYTES)  # for all: nobody reads them
        posted = [transport.receive(peer, Kind.DISPATCH, into) for _ in range(num_messages)]
        _meet(transport, peer)
        start_s = now_s()
        sent = [transport.send(peer, Kind.DISPATCH, out) for _ in range(num_messages)]
        beside_s = computing.work(products)
        moved = 2 * goodput_bytes_per_s * min(now_s() - start_s, num_messages * _STREAM_BYTES / goodput_bytes_per_s)
        lost.append(max(0.0, beside_s - alone_s) / moved)
        wait_all([*posted, *sent])
    return float(np.median(transport.gather(float(np.median(lost)) if lost else 0.0)[:2]))

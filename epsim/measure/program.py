"""A rank's program of one step, in the three modes: `run_step`. `Stopwatch` says where the time went.

The same order as the simulator's (`epsim.sim.graph`): sync waits for all of an exchange before it computes; async
computes local tokens, then each message as it arrives, and sends each result as it is ready; two_batch lets two
micro-batches take turns.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from epsim.measure.exchange import StepExchange
from epsim.measure.transport import now_s
from epsim.measure.work import Work
from epsim.sim.step import Mode

PARTS = ("front", "send", "shared", "experts", "remote", "dispatch", "combine", "head", "barrier")


class Stopwatch:
    """Seconds by part and layer, float64 [parts, L + 1]; the last column is what follows the layers."""

    def __init__(self, num_layers: int) -> None:
        self.seconds_PL: npt.NDArray[np.float64] = np.zeros((len(PARTS), num_layers + 1))
        self._last_s = 0.0

    def start(self) -> None:
        self._last_s = now_s()

    def lap(self, part: str, layer: int) -> None:
        """What has passed since the last lap was for this part."""
        now = now_s()
        self.seconds_PL[PARTS.index(part), layer] += now - self._last_s
        self._last_s = now


def run_step(
    mode: Mode,
    exchange: StepExchange,
    work: Work,
    watch: Stopwatch,
    *,
    overlap_shared: bool,
    after_front: Callable[[int], None],
) -> None:
    """Run the layers and the head of a step. after_front: what leaves with a layer's dispatch (KV caches)."""
    watch.start()
    if mode == "sync":
        _run_sync(exchange, work, watch, overlap_shared, after_front)
    elif mode == "async":
        _run_async(exchange, work, watch, after_front)
    else:
        _run_two_batch(exchange, work, watch, overlap_shared, after_front)
    last = exchange.num_layers
    work.head()
    watch.lap("head", last)
    exchange.wait_sent()
    watch.lap("combine", last)


def _run_sync(
    x: StepExchange, work: Work, watch: Stopwatch, overlap_shared: bool, after_front: Callable[[int], None]
) -> None:
    for layer in range(x.num_layers):
        work.front(layer, 0)
        watch.lap("front", layer)
        x.send_tokens(layer, 0)
        after_front(layer)
        watch.lap("send", layer)
        if overlap_shared:
            work.shared(layer, 0)
            watch.lap("shared", layer)
        _compute_together(x, work, watch, layer, 0)
        _take_back(x, work, watch, layer, 0)


def _run_async(x: StepExchange, work: Work, watch: Stopwatch, after_front: Callable[[int], None]) -> None:
    for layer in range(x.num_layers):
        work.front(layer, 0)
        watch.lap("front", layer)
        for chunk in range(x.layout.num_chunks):
            x.send_tokens(layer, chunk)
        after_front(layer)
        watch.lap("send", layer)
        work.local(layer)
        watch.lap("experts", layer)
        x.post_receives(layer + 1)
        for _ in range(x.arrivals[layer, 0]):
            arrival = x.take_arrival(layer, 0)
            watch.lap("dispatch", layer)
            work.remote(arrival)
            watch.lap("remote", layer)
            x.send_result(arrival)
            watch.lap("send", layer)
        _take_back(x, work, watch, layer, 0)


def _run_two_batch(
    x: StepExchange, work: Work, watch: Stopwatch, overlap_shared: bool, after_front: Callable[[int], None]
) -> None:
    for layer in range(x.num_layers):
        for batch in range(2):
            if layer:
                _take_back(x, work, watch, layer - 1, batch)
            work.front(layer, batch)
            watch.lap("front", layer)
            x.send_tokens(layer, batch)
            if batch == 1:
                after_front(layer)
            watch.lap("send", layer)
            if overlap_shared:
                work.shared(layer, batch)
                watch.lap("shared", layer)
        for batch in range(2):
            _compute_together(x, work, watch, layer, batch, post=batch == 0)
    for batch in range(2):
        _take_back(x, work, watch, x.num_layers - 1, batch)


def _compute_together(
    x: StepExchange, work: Work, watch: Stopwatch, layer: int, batch: int, *, post: bool = True
) -> None:
    """Wait for all tokens of a micro-batch, compute them and the rank's own, and send the results."""
    if post:
        x.post_receives(layer + 1)
    arrivals = [x.take_arrival(layer, batch) for _ in range(x.arrivals[layer, batch])]
    watch.lap("dispatch", layer)
    work.experts(layer, batch, arrivals)
    watch.lap("experts", layer)
    for arrival in sorted(arrivals, key=lambda arrival: (arrival.home - x.rank) % x.num_ranks):
        x.send_result(arrival)
    watch.lap("send", layer)


def _take_back(x: StepExchange, work: Work, watch: Stopwatch, layer: int, batch: int) -> None:
    """Wait for the results of a micro-batch's home tokens, and add them up."""
    x.take_results(layer, batch)
    watch.lap("combine", layer)
    work.finish_layer(layer, batch)
    watch.lap("front", layer)

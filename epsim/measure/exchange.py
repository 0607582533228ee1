"""The messages of one step on one rank: `StepExchange` posts, sends, passes on and takes up.

Receives are posted a layer ahead (gloo sends a message only then). Near legs go straight to a rank. With node-level
dedup far ones go to the gateway, the rank of that node that has the sender's index; it passes on what is for others of
its node (FORWARD), and adds up their results (GATHER) before one message goes home.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from epsim.measure.layout import Leg, Part, StepLayout
from epsim.measure.mailbox import Box, Buffers, Streams, WatchedBox
from epsim.measure.transport import MOST_CHUNKS, Kind, Posted, Transport
from epsim.measure.wire import Codec, dispatch_bytes
from epsim.measure.work import Arrival, Work

Key = tuple[int, int]  # layer, batch


@dataclass
class _Gathering:
    """What a gateway still waits for before a home's results of a layer and chunk go back."""

    num_vectors: int
    waiting_for: int
    parts: dict[int, Part] = field(default_factory=dict)
    total: torch.Tensor | None = None


class StepExchange:
    """The messages of a step. `batch_of_chunk`: the micro-batch that a chunk's experts belong to."""

    def __init__(
        self,
        layout: StepLayout,
        *,
        transport: Transport,
        work: Work,
        buffers: Buffers,
        dispatch_codec: Codec,
        combine_codec: Codec,
        by_micro_batch: bool,
        streams: Streams | None,
        gateway_RN: np.ndarray[Any, np.dtype[np.int32]] | None,
    ) -> None:
        """streams: who waits for arrivals where they come in any order; gateway_RN: given with node-level dedup."""
        self.layout, self._transport, self._work, self._buffers = layout, transport, work, buffers
        self._dispatch, self._combine = dispatch_codec, combine_codec
        self._by_micro_batch, self._streams, self._gateway_RN = by_micro_batch, streams, gateway_RN
        self.rank, self.num_ranks = transport.rank, transport.num_ranks
        self.num_layers = layout.placement.num_layers
        self._node_R = layout.placement.node_of_device_R
        self._others = [(self.rank + i) % self.num_ranks for i in range(1, self.num_ranks)]
        self._lock = threading.Lock()
        self._gatherings: dict[tuple[int, int, int], _Gathering] = {}
        self._sent: list[Posted] = []
        self._legs: dict[tuple[int, int, int, int], Leg] = {}
        self._node_legs: dict[tuple[int, int, int, int], Leg] = {}
        self.arrivals: dict[Key, int] = {}  # how many to take in a layer and micro-batch
        self.returns: dict[Key, int] = {}
        boxes = [(layer, batch) for layer in range(self.num_layers) for batch in range(2)]
        self._arrived: dict[Key, Any] = {key: Box() if streams is None else WatchedBox() for key in boxes}
        self._returned: dict[Key, Any] = {key: Box() if streams is None else WatchedBox() for key in boxes}

    # What there will be.

    def _leg(self, layer: int, chunk: int, source: int, destination: int) -> Leg:
        key = (layer, chunk, source, destination)
        if key not in self._legs:
            self._legs[key] = self.layout.leg(*key)
        return self._legs[key]

    def _node_leg(self, layer: int, chunk: int, source: int, node: int) -> Leg:
        key = (layer, chunk, source, node)
        if key not in self._node_legs:
            self._node_legs[key] = self.layout.node_leg(*key)
        return self._node_legs[key]

    def _out_bytes(self, leg: Leg) -> int:
        return dispatch_bytes(self._dispatch, leg.num_vectors, leg.num_pairs)

    def _back_bytes(self, leg: Leg) -> int:
        return leg.num_vectors * self._combine.vector_bytes

    def _batch(self, chunk: int) -> int:
        return chunk if self._by_micro_batch else 0

    def _is_far(self, a: int, b: int) -> bool:
        return self._gateway_RN is not None and self._node_R[a] != self._node_R[b]

    def _gateway(self, home: int, node: int) -> int:
        assert self._gateway_RN is not None
        return int(self._gateway_RN[home, node])

    def _own_node(self) -> int:
        return int(self._node_R[self.rank])

    def _mates(self) -> list[int]:
        return [r for r in self._others if self._node_R[r] == self._own_node()]

    def _when(self, layer: int) -> tuple[int, int]:
        """Return what tells the buffers of a layer from those of others: ranks drift apart by layers, not by a step."""
        return layer, self.layout.tokens.step % 2

    # Receives, a layer ahead.

    def post_receives(self, layer: int) -> None:
        """Post every receive of a layer; behind the last layer there is none."""
        if layer >= self.num_layers:
            return
        for batch in range(2):
            self.arrivals[layer, batch] = self.returns[layer, batch] = 0
        for chunk in range(self.layout.num_chunks):
            key = layer, self._batch(chunk)
            for peer in self._others:
                self._receives_of(layer, chunk, peer, key)
            if self._gateway_RN is not None:
                self._receives_by_gateway(layer, chunk, key)

    def _receives_of(self, layer: int, chunk: int, peer: int, key: Key) -> None:
        """Tokens that a peer sends straight here, and the results of ours that it sends straight back."""
        if self._is_far(peer, self.rank):
            return
        come, back = self._leg(layer, chunk, peer, self.rank), self._leg(layer, chunk, self.rank, peer)
        if come.num_vectors:
            self.arrivals[key] += 1
            then = partial(self._come, key, layer, chunk, peer, come.num_vectors)
            self._post(Kind.DISPATCH, peer, 0, layer, chunk, self._out_bytes(come), then)
        if back.num_vectors:
            self.returns[key] += 1
            self._post(
                Kind.COMBINE, peer, 0, layer, chunk, self._back_bytes(back), partial(self._back, key, chunk, back)
            )

    def _come(self, key: Key, layer: int, chunk: int, home: int, num_vectors: int, data: Any) -> None:
        arrival = Arrival(layer=layer, chunk=chunk, home=home, num_vectors=num_vectors, data=data)
        self._arrived[key].put(arrival)

    def _back(self, key: Key, chunk: int, leg: Leg, data: torch.Tensor) -> None:
        self._returned[key].put((chunk, leg, data))

    def _receives_by_gateway(self, layer: int, chunk: int, key: Key) -> None:
        node = self._own_node()
        for node_there in range(int(self._node_R.max()) + 1):
            if node_there == node:
                continue
            leg = self._node_leg(layer, chunk, self.rank, node_there)
            if leg.num_vectors:  # our tokens went there by a gateway: one message comes back
                self.returns[key] += 1
                gateway = self._gateway(self.rank, node_there)
                then = partial(self._back, key, chunk, leg)
                self._post(Kind.NODE_COMBINE, gateway, 0, layer, chunk, self._back_bytes(leg), then)
        for home in self._others:
            if self._node_R[home] == node:
                continue
            leg = self._node_leg(layer, chunk, home, node)
            mine = self._leg(layer, chunk, home, self.rank)
            if mine.num_vectors:
                self.arrivals[key] += 1
            gateway = self._gateway(home, node)
            if gateway == self.rank and leg.num_vectors:
                self._receives_as_gateway(layer, chunk, key, home, leg)
            elif gateway != self.rank and mine.num_vectors:
                then = partial(self._come, key, layer, chunk, home, mine.num_vectors)
                self._post(Kind.FORWARD, gateway, home, layer, chunk, self._out_bytes(mine), then)

    def _receives_as_gateway(self, layer: int, chunk: int, key: Key, home: int, leg: Leg) -> None:
        """A far home's tokens for this node come here; so do the results that the node's ranks have for them."""
        sharers = [r for r in (self.rank, *self._mates()) if self._leg(layer, chunk, home, r).num_vectors]
        self._gatherings[layer, chunk, home] = _Gathering(num_vectors=leg.num_vectors, waiting_for=len(sharers))
        then = partial(self._pass_on, layer, chunk, key, home)
        self._post(Kind.NODE_DISPATCH, home, 0, layer, chunk, self._out_bytes(leg), then)
        for mate in sharers:
            if mate != self.rank:
                size = self._back_bytes(self._leg(layer, chunk, home, mate))
                self._post(Kind.GATHER, mate, home, layer, chunk, size, partial(self._gather, layer, chunk, home, mate))

    def _post(
        self, kind: Kind, peer: int, origin: int, layer: int, chunk: int, size: int, then: Callable[[Any], None]
    ) -> None:
        data = self._buffers.take(size, "in", kind, peer, origin, chunk, *self._when(layer))
        label = _label(origin, chunk)
        posted = self._transport.receive(peer, kind, data, label)
        if self._streams is not None:
            self._streams.of(kind, peer, label).expect(posted, partial(then, data))
            return
        key = layer, self._batch(chunk)
        if kind in (Kind.DISPATCH, Kind.NODE_DISPATCH):
            home = self._leg(layer, chunk, peer, self.rank)
            arrival = Arrival(layer=layer, chunk=chunk, home=peer, num_vectors=home.num_vectors, data=data)
            self._arrived[key].expect(posted, arrival)
        else:
            self._returned[key].expect(posted, (chunk, self._leg(layer, chunk, self.rank, peer), data))

    # Sends.

    def send_tokens(self, layer: int, chunk: int) -> None:
        """Send the home tokens of a chunk to where their experts are, the next rank first."""
        for peer in self._others:
            leg = self._leg(layer, chunk, self.rank, peer)
            if leg.num_vectors and not self._is_far(self.rank, peer):
                self._send_leg(Kind.DISPATCH, peer, layer, chunk, leg)
            elif self._is_far(self.rank, peer) and self._gateway(self.rank, int(self._node_R[peer])) == peer:
                leg = self._node_leg(layer, chunk, self.rank, int(self._node_R[peer]))
                if leg.num_vectors:
                    self._send_leg(Kind.NODE_DISPATCH, peer, layer, chunk, leg)

    def _send_leg(self, kind: Kind, peer: int, layer: int, chunk: int, leg: Leg) -> None:
        out = self._buffers.take(self._out_bytes(leg), "out", kind, peer, chunk, *self._when(layer))
        self._work.pack(layer, chunk, leg, out)
        self._send(peer, kind, out, _label(0, chunk))

    def _send(self, peer: int, kind: Kind, out: torch.Tensor, label: int) -> None:
        self._sent.append(self._transport.send(peer, kind, out, label))

    def send_result(self, arrival: Arrival) -> None:
        """Send the results for an arrival home, or to the gateway that its node shares for that home."""
        home, layer, chunk = arrival.home, arrival.layer, arrival.chunk
        if not self._is_far(home, self.rank):
            kind, peer, origin = Kind.COMBINE, home, 0
        else:
            kind, peer, origin = Kind.GATHER, self._gateway(home, self._own_node()), home
        if peer == self.rank:
            self._gather(layer, chunk, home, self.rank, arrival)
            return
        size = arrival.num_vectors * self._combine.vector_bytes
        out = self._buffers.take(size, "out", kind, peer, home, chunk, *self._when(layer))
        self._work.result(arrival, out)
        self._send(peer, kind, out, _label(origin, chunk))

    # What a gateway does; in the threads of its streams.

    def _pass_on(self, layer: int, chunk: int, key: Key, home: int, data: torch.Tensor) -> None:
        """Cut up the tokens of a far home for this node."""
        gathering = self._gatherings[layer, chunk, home]
        num_vectors = gathering.num_vectors
        for rank in (*self._mates(), self.rank):
            leg = self._leg(layer, chunk, home, rank)
            if not leg.num_vectors:
                continue
            out = None
            if rank != self.rank:
                out = self._buffers.take(
                    self._out_bytes(leg), "out", Kind.FORWARD, rank, home, chunk, *self._when(layer)
                )
            part, kept = self._work.split(data, num_vectors, rank, out)
            gathering.parts[rank] = part
            if out is None:
                self._come(key, layer, chunk, home, leg.num_vectors, kept)
            else:
                self._send(rank, Kind.FORWARD, out, _label(home, chunk))

    def _gather(self, layer: int, chunk: int, home: int, rank: int, arrived: Any) -> None:
        """Add the results of one rank of this node for a far home; the last ones send them home."""
        gathering = self._gatherings[layer, chunk, home]
        with self._lock:
            part = gathering.parts[rank]
            gathering.total = self._work.gather(gathering.total, part, arrived, gathering.num_vectors)
            gathering.waiting_for -= 1
            if gathering.waiting_for:
                return
        size = gathering.num_vectors * self._combine.vector_bytes
        out = self._buffers.take(size, "out", Kind.NODE_COMBINE, home, chunk, *self._when(layer))
        self._work.gathered(gathering.total, out)
        self._send(home, Kind.NODE_COMBINE, out, _label(0, chunk))

    # Taking up.

    def take_arrival(self, layer: int, batch: int) -> Arrival:
        """Return tokens that have come, the first there are (or, with one peer, the next)."""
        arrival: Arrival = self._arrived[layer, batch].take()
        return arrival

    def take_results(self, layer: int, batch: int) -> None:
        """Wait for all results of the home tokens of a micro-batch and hand them over."""
        for _ in range(self.returns[layer, batch]):
            chunk, leg, data = self._returned[layer, batch].take()
            self._work.accept(layer, chunk, leg, data)

    def wait_sent(self) -> None:
        """Wait until everything that was sent has left."""
        while self._sent:  # the threads of a gateway may still add to it
            self._sent.pop().wait()

    def fail(self, error: BaseException) -> None:
        """Hand an error to whoever waits."""
        for box in (*self._arrived.values(), *self._returned.values()):
            box.put(error)


def _label(origin: int, chunk: int) -> int:
    """Return what tells messages of a kind between two ranks apart, as chunks may overtake each other at gateways."""
    return origin * MOST_CHUNKS + chunk

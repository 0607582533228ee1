"""KV caches that move from prefill homes to decode homes: `KvTransfer`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from epsim.batch import StepTokens
from epsim.measure.mailbox import Buffers
from epsim.measure.transport import Kind, Posted, Transport, wait_all
from epsim.measure.work import Work
from epsim.model import ModelCard
from epsim.placement import Homes


@dataclass(frozen=True, kw_only=True)
class _Move:
    """Requests whose caches go to, or come from, a peer, and their tokens together."""

    peer: int
    requests: list[int]
    num_tokens: int


class KvTransfer:
    """The caches of one batch: sent layer by layer as they are made, or (not `overlapped`) when the prefill is done."""

    def __init__(
        self, transport: Transport, work: Work, buffers: Buffers, card: ModelCard, homes: Homes,
        tokens: Sequence[StepTokens], *, overlapped: bool, num_layers: int,
    ) -> None:  # fmt: skip
        self._transport, self._work, self._buffers, self._card = transport, work, buffers, card
        self._overlapped, self._num_layers = overlapped, num_layers
        decoding = np.unique(tokens[1].request_T) if len(tokens) > 1 else np.zeros(0, np.int64)
        prompt_Q = np.bincount(tokens[0].request_T, minlength=len(homes.prefill_Q))
        moving = [q for q in decoding if homes.prefill_Q[q] != homes.decode_Q[q]]
        self.moves = bool(moving)

        def between(source: int, destination: int) -> list[int]:
            return [int(q) for q in moving if (homes.prefill_Q[q], homes.decode_Q[q]) == (source, destination)]

        rank, peers = transport.rank, [r for r in range(transport.num_ranks) if r != transport.rank]
        out = {peer: between(rank, peer) for peer in peers}
        into = {peer: between(peer, rank) for peer in peers}
        self._out = [_move(peer, requests, prompt_Q) for peer, requests in out.items() if requests]
        self._in = [_move(peer, requests, prompt_Q) for peer, requests in into.items() if requests]
        self._posted: list[tuple[Posted, int, _Move, torch.Tensor]] = []
        self._sent: list[Posted] = []

    def _bytes(self, layer: int, move: _Move) -> int:
        layers = 1 + (self._card.num_dense_layers if layer == 0 else 0)
        return int(layers * move.num_tokens * self._card.kv_bytes_per_token)

    def post_receives(self) -> None:
        """Post the receives of all layers."""
        for move in self._in:
            for layer in range(self._num_layers):
                data = self._buffers.take(self._bytes(layer, move), "in", Kind.KV, move.peer, layer)
                self._posted.append((self._transport.receive(move.peer, Kind.KV, data), layer, move, data))

    def send_layer(self, layer: int) -> None:
        """Send a layer's caches, if they travel with its dispatch."""
        if self._overlapped:
            self._send(layer)

    def send_rest(self) -> None:
        """Send what has not been sent when the prefill is done."""
        if not self._overlapped:
            for layer in range(self._num_layers):
                self._send(layer)

    def _send(self, layer: int) -> None:
        for move in self._out:
            out = self._buffers.take(self._bytes(layer, move), "out", Kind.KV, move.peer, layer)
            self._work.cached(layer, move.requests, out)
            self._sent.append(self._transport.send(move.peer, Kind.KV, out))

    def wait(self) -> None:
        """Take over what comes, and see off what goes."""
        for posted, layer, move, data in self._posted:
            posted.wait()
            self._work.load(layer, move.requests, data)
        wait_all(self._sent)
        self._posted.clear()
        self._sent.clear()


def _move(peer: int, requests: list[int], prompt_Q: npt.NDArray[np.integer]) -> _Move:
    return _Move(peer=peer, requests=requests, num_tokens=int(prompt_Q[requests].sum()))

"""`Bench`: passes through all layers of a decoder in which each part is timed, on one process and device.

Shapes: T tokens of the pass, H hidden size, K top-k, V vectors, N (vector, expert) pairs, S tokens of a request.
"""

from collections.abc import Callable
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import Tensor

from epsim.measure.clock import Laps, clock_of
from epsim.measure.decoder import AttentionBatch, Decoder, KvCache
from epsim.measure.device_plan import ONCE_A_PASS, Cell, Setting
from epsim.measure.ranges import Ranges
from epsim.measure.wire import (
    Codec,
    LegIndex,
    Wire,
    add_returned,
    dispatch_bytes,
    pack_dispatch,
    pack_leg,
    read_arrival,
)
from epsim.model import ModelCard


class Bench:
    """A decoder with as many experts in each layer as a device of the scenario has, its cache full of numbers."""

    def __init__(
        self,
        card: ModelCard,
        ranges: Ranges,
        *,
        device: torch.device,
        dtype: torch.dtype,
        wire: Wire,
        meet: Callable[[], object] = lambda: None,
    ) -> None:
        """meet: waits for the other processes that measure."""
        self._meet = meet
        self._device, self._dtype, self._topk = device, dtype, card.topk
        self._out = Codec(hidden_size=card.hidden_size, dtype=wire.dispatch_dtype)
        self._back = Codec(hidden_size=card.hidden_size, dtype=wire.combine_dtype)
        self._pairs_per_vector = wire.pairs_per_vector
        self._buffers: dict[str, Tensor] = {}
        self._num_experts, self._num_slots = card.num_experts, ranges.experts
        self._num_dense_layers = card.num_dense_layers
        layers = len(card.moe_layer_ids)
        experts_LX = np.tile(np.arange(ranges.experts, dtype=np.int32) % card.num_experts, (layers, 1))
        self._decoder = Decoder(card, experts_LX=experts_LX, seed=0, device=device, dtype=dtype)
        most = max(ranges.context[1], ranges.prompt[1])
        self._cache = KvCache(card, num_requests=ranges.requests, max_tokens=most, device=device, dtype=dtype)
        self._fill_cache(ranges.requests, most)
        self._clock = clock_of(device)
        self._number = self._turn = 0  # of the pass, of the layer in all passes: which cells are next
        self.num_layers = layers
        self._batch = lru_cache(maxsize=4)(self._make_batch)
        self._pairs = lru_cache(maxsize=64)(self._make_pairs)

    def _start(self) -> None:
        """Begin a part, together with the other processes: ranks in step stream their weights at the same time."""
        self._meet()
        self._clock.start()

    def _fill_cache(self, requests: int, tokens: int) -> None:
        rows, lengths = range(requests), [tokens] * requests
        for layer in range(self._decoder.num_layers):
            flat = self._cache.rows(layer, rows, lengths)
            self._cache.load(layer, rows, lengths, torch.randn_like(flat))

    @torch.inference_mode()
    def run(self, setting: Setting, number: int) -> Laps:
        """Run a pass; return the cells that were measured in it with their seconds, once for each layer.

        number: of the pass among those of the setting; cells of an operation take turns.
        """
        self._number = number
        clock, decoder, tokens = self._clock, self._decoder, setting.num_tokens
        batch = self._batch(setting.attention)
        self._time_vision(setting)
        hidden_TH = decoder.embed(torch.arange(tokens, device=self._device))
        for layer in range(decoder.num_layers):
            for dense_layer in range(self._num_dense_layers if layer == 0 else 0):
                hidden_TH = self._attend(setting, dense_layer, hidden_TH, batch)
                hidden_TH = self._time_dense_ffn(setting, dense_layer, hidden_TH)
            hidden_TH = self._attend(setting, self._num_dense_layers + layer, hidden_TH, batch)
            self._turn = number * decoder.num_layers + layer
            self._time_moe(setting, layer, hidden_TH)
        if cell := self._next(setting, "head"):
            last_QH = _repeated(hidden_TH, cell.at[0])
            self._start()
            decoder.head(last_QH)
            clock.lap(cell)
        return clock.read()

    def _next(self, setting: Setting, op: str) -> Cell | None:
        """Return whose turn it is of an operation's cells."""
        cells = setting.others.get(op)
        turn = self._number if op in ONCE_A_PASS else self._turn
        return cells[turn % len(cells)] if cells else None

    def _attend(self, setting: Setting, decoder_layer: int, hidden_TH: Tensor, batch: AttentionBatch) -> Tensor:
        self._start()
        hidden_TH = self._decoder.attention(decoder_layer, hidden_TH, batch, self._cache)
        self._clock.lap(setting.attention)
        return hidden_TH

    def _time_vision(self, setting: Setting) -> None:
        if cell := self._next(setting, "vision"):
            self._start()
            self._decoder.vision(cell.at[0])
            self._clock.lap(cell)

    def _time_dense_ffn(self, setting: Setting, dense_layer: int, hidden_TH: Tensor) -> Tensor:
        cell = self._next(setting, "dense_ffn")
        given_TH = hidden_TH if cell is None else _repeated(hidden_TH, cell.at[0])
        self._start()
        self._decoder.dense_ffn(dense_layer, given_TH)
        if cell is not None:
            self._clock.lap(cell)
        return hidden_TH

    def _time_moe(self, setting: Setting, layer: int, hidden_TH: Tensor) -> None:
        """Router, messages, copies, shared and routed experts, sums; at sizes of their own, next to one another."""
        clock, decoder = self._clock, self._decoder
        cell = self._next(setting, "router")
        given_TH = hidden_TH if cell is None else _repeated(hidden_TH, cell.at[0])
        ids_TK = torch.arange(len(given_TH) * self._topk, device=self._device).view(-1, self._topk) % self._num_experts
        self._start()
        normed_TH, weights_TK = decoder.route(layer, given_TH, ids_TK)
        if cell is not None:
            clock.lap(cell)
        self._time_way_out(setting, normed_TH, weights_TK)
        if cell := self._next(setting, "shared_experts"):
            given_TH = _repeated(normed_TH, cell.at[0])
            self._start()
            decoder.shared(layer, given_TH)
            clock.lap(cell)
        if cell := self._next(setting, "experts"):
            num_vectors, *pairs = self._pairs(cell)
            given_VH = _repeated(normed_TH, num_vectors)
            self._start()
            decoder.experts(layer, given_VH, *pairs)
            clock.lap(cell)
        if cell := self._next(setting, "serve"):
            self._time_serve(cell, normed_TH)
        self._time_way_back(setting, hidden_TH)

    def _time_way_out(self, setting: Setting, normed_TH: Tensor, weights_TK: Tensor) -> None:
        clock = self._clock
        if cell := self._next(setting, "pack"):
            index, out = self._leg_index(cell.at[0], len(normed_TH)), self._dispatch("out", cell.at[0])
            self._start()
            pack_leg(self._out, normed_TH, weights_TK, index, out)
            clock.lap(cell)
        if cell := self._next(setting, "to_host"):
            given_VH = _repeated(normed_TH, self._vectors_of(cell))
            pinned_VH = self._pinned(given_VH)
            self._start()
            pinned_VH.copy_(given_VH, non_blocking=True)
            clock.lap(cell)

    def _time_serve(self, cell: Cell, normed_TH: Tensor) -> None:
        num_vectors = cell.at[0]
        index, data = self._leg_index(num_vectors, len(normed_TH)), self._dispatch("in", num_vectors)
        given_VH, out = _repeated(normed_TH, num_vectors), self._combine("out", num_vectors)
        pack_dispatch(self._out, given_VH, index.code_N, torch.ones_like(index.code_N), data)
        slots = {"num_slots": self._num_slots, "first_slot": 0}
        self._start()
        read_arrival(self._out, data, num_vectors, self._dtype, **slots)
        self._back.write(given_VH, out)
        self._clock.lap(cell)

    def _time_way_back(self, setting: Setting, hidden_TH: Tensor) -> None:
        clock = self._clock
        if cell := self._next(setting, "to_device"):
            given_VH = self._pinned(_repeated(hidden_TH, self._vectors_of(cell)))
            self._start()
            given_VH.to(self._device, non_blocking=True)
            clock.lap(cell)
        if cell := self._next(setting, "reduce"):
            data, rows_V = self._combine("in", cell.at[0]), self._rows(cell.at[0], len(hidden_TH))
            self._back.write(_repeated(hidden_TH, cell.at[0]), data)
            sums_TH = hidden_TH.clone()
            self._start()
            add_returned(self._back, data, rows_V, sums_TH)
            clock.lap(cell)

    def _vectors_of(self, cell: Cell) -> int:
        return max(1, cell.at[0] // (self._decoder.card.hidden_size * self._dtype.itemsize))

    @staticmethod
    def _pinned(like_VH: Tensor) -> Tensor:
        return torch.empty(like_VH.shape, dtype=like_VH.dtype, pin_memory=True)

    def _dispatch(self, name: str, num_vectors: int) -> Tensor:
        return self._buffer(name, dispatch_bytes(self._out, num_vectors, num_vectors * self._pairs_per_vector))

    def _combine(self, name: str, num_vectors: int) -> Tensor:
        return self._buffer(name, num_vectors * self._back.vector_bytes)

    def _buffer(self, name: str, num_bytes: int) -> Tensor:
        """Return so many bytes of memory that has been used before, as messages are."""
        if name not in self._buffers or len(self._buffers[name]) < num_bytes:
            self._buffers[name] = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        return self._buffers[name][:num_bytes]

    def _rows(self, num_vectors: int, num_tokens: int) -> Tensor:
        """Return the tokens of so many vectors: ascending, each as often as it must be."""
        return torch.arange(num_vectors, device=self._device) * num_tokens // num_vectors

    def _leg_index(self, num_vectors: int, num_tokens: int) -> LegIndex:
        """Return a dispatch of so many vectors, all with as many pairs."""
        rows_V, each = self._rows(num_vectors, num_tokens), self._pairs_per_vector
        number_N = torch.arange(num_vectors * each, device=self._device)
        code_N = (number_N // each * self._num_slots + number_N % self._num_slots).to(torch.int32)
        return LegIndex(
            rows_V=rows_V, code_N=code_N, row_N=rows_V.repeat_interleave(each), choice_N=number_N % self._topk
        )

    def _make_batch(self, cell: Cell) -> AttentionBatch:
        requests, tokens = cell.at
        decode = cell.op == "decode_attention"
        request_Q = torch.arange(requests, device=self._device)
        if decode:
            return AttentionBatch(request_T=request_Q, position_T=torch.full_like(request_Q, tokens - 1), decode=True)
        position_S = torch.arange(tokens, device=self._device)
        request_T = request_Q.repeat_interleave(tokens)
        return AttentionBatch(request_T=request_T, position_T=position_S.repeat(requests), decode=False)

    def _make_pairs(self, cell: Cell) -> tuple[int, Tensor, Tensor, Tensor]:
        """Return how many vectors there are, and the pairs: each expert has equally many, no vector one twice."""
        activated, per_expert = cell.at
        num_pairs = activated * per_expert
        num_vectors = max(per_expert, ceil(num_pairs / min(self._topk, activated)))
        generator = torch.Generator().manual_seed(num_pairs)
        number_N = torch.arange(num_pairs)
        slot_N = torch.randperm(self._num_slots, generator=generator)[:activated].sort().values[number_N // per_expert]
        vector_N = torch.randperm(num_vectors, generator=generator)[number_N % num_vectors]
        by_vector_N = vector_N.argsort(stable=True)  # as they arrive
        weight_N = torch.rand(num_pairs, generator=generator)
        parts = (part[by_vector_N].to(self._device) for part in (vector_N, slot_N, weight_N))
        return num_vectors, *parts  # type: ignore[return-value]


def _repeated(vectors_VH: Tensor, num_vectors: int) -> Tensor:
    """Return so many vectors, these again and again."""
    if num_vectors <= len(vectors_VH):
        return vectors_VH[:num_vectors]
    return vectors_VH.repeat(ceil(num_vectors / len(vectors_VH)), 1)[:num_vectors]

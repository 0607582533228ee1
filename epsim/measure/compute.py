"""A real model on one rank: `ModelWork`, the `Work` that computes.

Tokens are fixed beforehand (a hash of request and position), as a replay fixes their experts, so that runs on any
number of ranks compute the same. Letters: T home tokens of a step, V vectors, N pairs, K top-k, H hidden size, X slots
of the rank.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsim.batch import Deployment
from epsim.measure.decoder import Decoder, KvCache
from epsim.measure.home_step import dtype_of, home_step, to_tensor
from epsim.measure.layout import Leg, Part, StepLayout, part_of_leg
from epsim.measure.wire import Codec, LegIndex, add_returned, pack_dispatch, pack_leg, read_arrival
from epsim.measure.work import Arrival
from epsim.scenario.spec import ScenarioSpec
from epsim.sim import StepPlan

_SEED = 0  # of the weights


class ModelWork:
    """The compute of one rank. outputs: by step, the requests at home here, their last hidden vectors, tokens."""

    def __init__(self, rank: int, deployment: Deployment, spec: ScenarioSpec, *, device: torch.device) -> None:
        card, placement = deployment.model, deployment.layout.placement
        self._rank, self._device, self._dtype = rank, device, dtype_of(spec)
        self._num_slots = placement.physical_to_logical_LP.shape[1]
        self._slots_per_device = placement.slots_per_device
        experts_LX = placement.physical_to_logical_LP.reshape(placement.num_layers, placement.num_devices, -1)[:, rank]
        self.decoder = Decoder(card, experts_LX=experts_LX, seed=_SEED, device=device, dtype=self._dtype)
        transmission = spec.transmission
        self._out = Codec(hidden_size=card.hidden_size, dtype=transmission.dispatch_dtype)
        self._back = Codec(hidden_size=card.hidden_size, dtype=transmission.combine_dtype)
        self._batches = deployment.num_micro_batches
        self._overlap_shared = transmission.overlap_shared
        self._tokens_per_image = card.vision.tokens_per_image if card.vision else 0
        self._legs: dict[int, tuple[Leg, LegIndex]] = {}
        self._local: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._results: dict[tuple[int, int, int], Tensor] = {}
        self.outputs: list[tuple[tuple[int, ...], Tensor, list[int]]] = []

    # Before anything is timed.

    def prepare(self, layouts: Sequence[StepLayout], plans: Sequence[StepPlan]) -> None:
        self._steps = [
            home_step(
                layout,
                self._rank,
                num_batches=self._batches,
                tokens_per_image=self._tokens_per_image,
                device=self._device,
            )
            for layout in layouts
        ]
        requests = max(int(layout.tokens.request_T.max()) for layout in layouts) + 1
        longest = max(int(layout.tokens.position_T.max()) for layout in layouts) + 1
        self._lengths = np.bincount(layouts[0].tokens.request_T, minlength=requests)
        self._cache = KvCache(
            self.decoder.card, num_requests=requests, max_tokens=longest, device=self._device, dtype=self._dtype
        )

    def _tensor(self, values: Any) -> Tensor:
        return to_tensor(values, self._device)

    def _index(self, leg: Leg) -> LegIndex:
        """Return a leg's tensors, made when it is first met."""
        if id(leg) not in self._legs:
            index = LegIndex(
                rows_V=self._tensor(leg.rows_V),
                code_N=self._tensor((leg.vector_N * self._num_slots + leg.slot_N).astype(np.int32)),
                row_N=self._tensor(leg.rows_V[leg.vector_N]),
                choice_N=self._tensor(leg.choice_N),
            )
            self._legs[id(leg)] = leg, index
        return self._legs[id(leg)][1]

    def _local_pairs(self, layer: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, own slot, row and choice (for the weight) of the pairs of home tokens that stay here."""
        key = self._step, layer, batch
        if key not in self._local:
            layout, span = self._now.layout, self._now.spans_B[batch]
            slot_TK = layout.slot_TLK[layout.own(self._rank)][span, layer] - self._rank * self._slots_per_device
            row_N, choice_N = np.nonzero((slot_TK >= 0) & (slot_TK < self._slots_per_device))
            values = (row_N, slot_TK[row_N, choice_N], row_N + span.start, choice_N)
            self._local[key] = tuple(self._tensor(value) for value in values)  # type: ignore[assignment]
        return self._local[key]

    # A step.

    def begin(self, step: int) -> None:
        if step == 0:
            self.outputs = []
        self._step, self._now = step, self._steps[step]

    def front(self, layer: int, batch: int) -> None:
        now = self._now
        if layer == 0 and batch == 0:
            self._hidden_TH = self._embedded()
            self._normed_TH = torch.empty_like(self._hidden_TH)
            shape = (len(self._hidden_TH), now.expert_ids_LTK.shape[2])
            self._weights_TK = torch.empty(shape, dtype=torch.float32, device=self._device)
        attention, span = now.attention_B[batch], now.spans_B[batch]
        if attention is None:
            return
        hidden = self.decoder.attend(layer, self._hidden_TH[span], attention, self._cache)
        normed, weights = self.decoder.route(layer, hidden, now.expert_ids_LTK[layer, span])
        self._hidden_TH[span], self._normed_TH[span], self._weights_TK[span] = hidden, normed, weights

    def _embedded(self) -> Tensor:
        now = self._now
        hidden_TH = self.decoder.embed(now.token_ids_T)
        if now.num_images:
            seen = self.decoder.vision(now.num_images)
            hidden_TH[now.vision_rows] = seen[now.vision_places]
        return hidden_TH

    def pack(self, layer: int, chunk: int, leg: Leg, out: Tensor) -> None:
        pack_leg(self._out, self._normed_TH, self._weights_TK, self._index(leg), out)

    def shared(self, layer: int, batch: int) -> None:
        span = self._now.spans_B[batch]
        added = self.decoder.shared(layer, self._normed_TH[span])
        if added is not None:
            self._hidden_TH[span] += added

    def local(self, layer: int) -> None:
        row_N, slot_N, *where = self._local_pairs(layer, 0)
        out_TH = self.decoder.experts(layer, self._normed_TH, row_N, slot_N, self._weights_TK[*where])
        self._hidden_TH += out_TH
        self.shared(layer, 0)

    def remote(self, arrival: Arrival) -> None:
        vectors, vector_N, slot_N, weight_N = self._unpacked(arrival)
        self._keep(arrival, self.decoder.experts(arrival.layer, vectors, vector_N, slot_N, weight_N))

    def experts(self, layer: int, batch: int, arrivals: list[Arrival]) -> None:
        span = self._now.spans_B[batch]
        row_N, slot_N, *where = self._local_pairs(layer, batch)
        parts = [(self._normed_TH[span], row_N, slot_N, self._weights_TK[*where])]
        parts += [self._unpacked(arrival) for arrival in arrivals]
        starts = np.cumsum([0, *(len(part[0]) for part in parts)]).tolist()
        vectors, slots, weights = (torch.cat([part[i] for part in parts]) for i in (0, 2, 3))
        vector_N = torch.cat([part[1] + start for part, start in zip(parts, starts, strict=False)])
        out = self.decoder.experts(layer, vectors, vector_N, slots, weights)
        own, *others = out.split_with_sizes([len(part[0]) for part in parts])
        self._hidden_TH[span] += own
        for arrival, out in zip(arrivals, others, strict=True):
            self._keep(arrival, out)
        if not self._overlap_shared:
            self.shared(layer, batch)

    def _unpacked(self, arrival: Arrival) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return vectors, vector and own slot of each pair, and gate weights of an arrival."""
        first_slot = self._rank * self._slots_per_device
        if isinstance(arrival.data, Tensor):
            return self._read(arrival.data, arrival.num_vectors, first_slot)
        vectors, vector_N, slot_N, weight_N = arrival.data
        return vectors, vector_N, slot_N - first_slot, weight_N

    def _read(self, data: Tensor, num_vectors: int, first_slot: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return read_arrival(
            self._out,
            data.to(self._device),
            num_vectors,
            self._dtype,
            num_slots=self._num_slots,
            first_slot=first_slot,
        )

    def _keep(self, arrival: Arrival, out_VH: Tensor) -> None:
        self._results[arrival.layer, arrival.chunk, arrival.home] = out_VH

    def _result(self, arrival: Arrival) -> Tensor:
        return self._results.pop((arrival.layer, arrival.chunk, arrival.home))

    def result(self, arrival: Arrival, out: Tensor) -> None:
        self._back.write(self._result(arrival), out)

    def accept(self, layer: int, chunk: int, leg: Leg, data: Tensor) -> None:
        add_returned(self._back, data.to(self._device), self._index(leg).rows_V, self._hidden_TH)

    def finish_layer(self, layer: int, batch: int) -> None:
        """Everything has been added already."""

    # At a gateway.

    def split(self, data: Tensor, num_vectors: int, destination: int, out: Tensor | None) -> tuple[Part, Any]:
        vectors, vector_N, slot_N, weight_N = self._read(data, num_vectors, 0)
        part = part_of_leg(vector_N.cpu().numpy(), slot_N.cpu().numpy(), self._slots_per_device, destination)
        rows, pairs = self._tensor(part.vectors_V), self._tensor(part.pairs_N)
        renumbered_N = self._tensor(part.vector_N)
        if out is None:
            return part, (vectors[rows], renumbered_N, slot_N[pairs], weight_N[pairs])
        code_N = renumbered_N * self._num_slots + slot_N[pairs]
        pack_dispatch(self._out, vectors[rows], code_N, weight_N[pairs], out)
        return part, None

    def gather(self, total: Tensor | None, part: Part, arrived: Any, num_vectors: int) -> Tensor:
        if isinstance(arrived, Arrival):
            results_VH = self._result(arrived)
        else:
            results_VH = self._back.read(arrived.to(self._device), self._dtype)
        if total is None:
            total = torch.zeros(num_vectors, results_VH.shape[1], device=self._device)
        return total.index_add_(0, self._tensor(part.vectors_V), results_VH.float())

    def gathered(self, total: Tensor | None, out: Tensor) -> None:
        assert total is not None
        self._back.write(total, out)

    # The KV cache and the end of a step.

    def cached(self, layer: int, requests: list[int], out: Tensor) -> None:
        out.view(self._dtype).copy_(self._cache.rows(layer, requests, self._lengths[requests].tolist()))

    def load(self, layer: int, requests: list[int], data: Tensor) -> None:
        flat = data.view(self._dtype).to(self._device)
        self._cache.load(layer, requests, self._lengths[requests].tolist(), flat)

    def head(self) -> None:
        last_QH = self._hidden_TH[self._now.last_rows_Q]
        self.outputs.append((self._now.requests_Q, last_QH, self.decoder.head(last_QH).tolist()))

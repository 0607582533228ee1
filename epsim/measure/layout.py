"""Which token goes where in a step: `StepLayout`, the legs of every exchange, from routing, placement and homes.

It follows from routing alone, which a replay knows beforehand: so every rank knows how large the messages are that it
will get, as with the cached handles of DeepEP. What travels is complete nonetheless: a receiver computes from the
message, not from the trace. Letters: T tokens of a step, L MoE layers, K top-k, R ranks, C chunks, V vectors of a leg,
N pairs of a leg.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from epsim.batch import StepTokens
from epsim.placement import Placement
from epsim.traffic import Dedup

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Leg:
    """What one rank sends to another (or, by way of a gateway, to a node) in a layer and chunk.

    rows_V: rows of the source's home tokens, one per vector. vector_N: the vector of each pair. slot_N: the physical
    expert of each pair, numbered over all ranks. choice_N: which of the token's K choices the pair is.
    """

    rows_V: Ints
    vector_N: Ints
    slot_N: Ints
    choice_N: Ints

    @property
    def num_vectors(self) -> int:
        return len(self.rows_V)

    @property
    def num_pairs(self) -> int:
        return len(self.slot_N)


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """The exchanges of a step.

    tokens: all tokens, sorted by home. rows_of_rank: the tokens at home on each rank, as bounds [R + 1].
    slot_TLK: the physical expert that serves each choice. chunk_T: the chunk (in mode two_batch: the micro-batch) of
    each token within its home.
    """

    tokens: StepTokens
    dedup: Dedup
    placement: Placement
    chunk_T: Ints
    num_chunks: int

    @cached_property
    def rows_of_rank(self) -> Ints:
        return np.searchsorted(self.tokens.home_T, np.arange(self.placement.num_devices + 1))

    def own(self, rank: int) -> slice:
        """Return the rows of the tokens at home on a rank."""
        return slice(int(self.rows_of_rank[rank]), int(self.rows_of_rank[rank + 1]))

    @cached_property
    def slot_TLK(self) -> Ints:
        layer_L1 = np.arange(self.placement.num_layers)[:, None]
        ids_TLK = self.tokens.topk_expert_ids_TLK
        table_RLE = self.placement.slot_of_expert_RLE
        return table_RLE[self.tokens.home_T[:, None, None], layer_L1, ids_TLK].astype(np.int64)

    def leg(self, layer: int, chunk: int, source: int, destination: int) -> Leg:
        """Return what `source` has for the experts of `destination` (itself included)."""
        return self._leg(layer, chunk, source, self.slot_TLK // self.placement.slots_per_device == destination)

    def node_leg(self, layer: int, chunk: int, source: int, node: int) -> Leg:
        """Return what `source` has for the experts of a node: with node-level dedup, what crosses to its gateway."""
        return self._leg(layer, chunk, source, self._node_TLK == node)

    @cached_property
    def _node_TLK(self) -> Ints:
        return self.placement.node_of_device_R[self.slot_TLK // self.placement.slots_per_device].astype(np.int64)

    def _leg(self, layer: int, chunk: int, source: int, is_there_TLK: npt.NDArray[np.bool_]) -> Leg:
        own = self.own(source)
        is_there_TK = is_there_TLK[own, layer] & (self.chunk_T[own] == chunk)[:, None]
        token_N, choice_N = np.nonzero(is_there_TK)
        slot_N = self.slot_TLK[own, layer][token_N, choice_N]
        if self.dedup == "none":
            return Leg(rows_V=token_N, vector_N=np.arange(len(token_N)), slot_N=slot_N, choice_N=choice_N)
        rows_V, vector_N = np.unique(token_N, return_inverse=True)
        return Leg(rows_V=rows_V, vector_N=vector_N.astype(np.int64), slot_N=slot_N, choice_N=choice_N)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a node's leg that is for one of its ranks: vectors_V of the leg, its pairs with those renumbered."""

    vectors_V: Ints
    vector_N: Ints
    pairs_N: Ints


def part_of_leg(vector_N: Ints, slot_N: Ints, slots_per_device: int, destination: int) -> Part:
    """Return what a gateway passes on to `destination`, worked out from the message alone."""
    pairs_N = np.flatnonzero(slot_N // slots_per_device == destination)
    vectors_V, renumbered_N = np.unique(vector_N[pairs_N], return_inverse=True)
    return Part(vectors_V=vectors_V, vector_N=renumbered_N.astype(np.int64), pairs_N=pairs_N)

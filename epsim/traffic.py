"""What crosses between devices: from routed expert ids to tokens, pairs and activated experts.

`TrafficCounter` makes a `StepTraffic` (counts) of one prefill or decode step; `MessageFormat` turns counts into bytes.
Letters: T tokens, L MoE layers, K top-k, E logical experts, P slots, R devices (source, then destination), N nodes,
C chunks of a source's tokens, G = R C groups of tokens, X = R + N places, W 64-bit words, M modalities.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numba
import numpy as np
import numpy.typing as npt

from epsim.placement import Placement

Counts = npt.NDArray[np.int64]
Means = npt.NDArray[np.float64]  # counts in the mean
Dedup = Literal["none", "device", "node"]
Dtype = Literal["bf16", "fp8", "fp32"]
_BLOCK_TOKENS = 256  # a block of routing stays in the L2 cache for its two passes
_TOKENS_PER_THREAD = 4096
_NUM_THREADS = os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Counts of one step. The source of a token is its home, the destination the device of an expert it chose.

    pairs_LCRR: routed (token, expert) pairs.
    tokens_LCRR: tokens with at least one expert on the destination (what device-level dedup sends).
    node_tokens_LCRN: tokens with at least one expert in the destination node (what node-level dedup sends).
    experts_LCRR: distinct slots of the destination that the tokens of (chunk, source) activate.
    source_experts_LRR: the same over all chunks of the source.
    slot_load_LCP: pairs that each slot serves.
    """

    pairs_LCRR: Counts
    tokens_LCRR: Counts
    node_tokens_LCRN: Counts
    experts_LCRR: Counts
    source_experts_LRR: Counts
    slot_load_LCP: Counts

    @cached_property
    def device_pairs_LR(self) -> Counts:
        """Pairs that each device serves, from all sources."""
        return np.asarray(self.pairs_LCRR.sum(axis=(1, 2)))

    @property
    def device_experts_LR(self) -> Counts:
        """Distinct slots activated on each device, from all sources."""
        num_layers, num_devices = self.device_pairs_LR.shape
        is_used_LP = self.slot_load_LCP.any(axis=1)
        return np.asarray(is_used_LP.reshape(num_layers, num_devices, -1).sum(axis=2))

    def of_chunk(self, chunk: int) -> "StepTraffic":
        """Return the traffic of one chunk alone: that of a micro-batch."""
        only = slice(chunk, chunk + 1)
        return StepTraffic(
            pairs_LCRR=self.pairs_LCRR[:, only],
            tokens_LCRR=self.tokens_LCRR[:, only],
            node_tokens_LCRN=self.node_tokens_LCRN[:, only],
            experts_LCRR=self.experts_LCRR[:, only],
            source_experts_LRR=self.experts_LCRR[:, chunk],
            slot_load_LCP=self.slot_load_LCP[:, only],
        )


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """Bytes of what travels.

    dispatch_vector_bytes: one hidden vector on its way out (with its scales when it is quantised).
    combine_vector_bytes: one hidden vector on its way home.
    pair_bytes: expert id and gate weight of one routed pair, sent with the vector.
    """

    dispatch_vector_bytes: float
    combine_vector_bytes: float
    pair_bytes: float

    @classmethod
    def of(cls, hidden_size: int, dispatch_dtype: Dtype, combine_dtype: Dtype) -> Self:
        """Return the format of hidden vectors in these dtypes; each pair has an int32 id and a float32 weight.

        FP8 carries a float32 scale for every 128 values, as DeepEP sends it.
        """
        return cls(
            dispatch_vector_bytes=_vector_bytes(hidden_size, dispatch_dtype),
            combine_vector_bytes=_vector_bytes(hidden_size, combine_dtype),
            pair_bytes=8.0,
        )

    def dispatch_bytes(self, num_vectors: Counts | Means, num_pairs: Counts | Means) -> npt.NDArray[np.float64]:
        """Return vectors * dispatch_vector_bytes + pairs * pair_bytes, elementwise."""
        return np.asarray(num_vectors * self.dispatch_vector_bytes + num_pairs * self.pair_bytes, dtype=np.float64)

    def combine_bytes(self, num_vectors: Counts | Means) -> npt.NDArray[np.float64]:
        """Return vectors * combine_vector_bytes, elementwise."""
        return np.asarray(num_vectors * self.combine_vector_bytes, dtype=np.float64)


def _vector_bytes(hidden_size: int, dtype: Dtype) -> float:
    if dtype == "fp8":
        return hidden_size + 4.0 * -(-hidden_size // 128)
    return hidden_size * {"bf16": 2.0, "fp32": 4.0}[dtype]


class TrafficCounter:
    """Counts the traffic of steps under one placement (its lookup tables are made once)."""

    def __init__(self, placement: Placement, num_chunks: int = 1) -> None:
        """Each source cuts its tokens, in their order, into `num_chunks` nearly equal chunks."""
        self._placement = placement
        self._num_chunks = num_chunks
        self._num_devices = placement.num_devices
        self._num_nodes = int(placement.node_of_device_R.max()) + 1
        # A bit for each device and, after those, one for each node: a token's mask says what it touches.
        device_RLE = placement.device_of_expert_RLE
        node_RLE = self._num_devices + placement.node_of_device_R[device_RLE]
        num_places = self._num_devices + self._num_nodes
        self._bits_RWLE = bit_tables(device_RLE, num_places) | bit_tables(node_RLE, num_places)

    def count(
        self,
        topk_expert_ids_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
        home_T: npt.NDArray[np.int32],
    ) -> StepTraffic:
        """Count the traffic of one step.

        topk_expert_ids_TLK: logical expert ids, tokens in any order, distinct within (token, layer).
        home_T: int32, the device where each token lives.
        """
        if len(home_T) and (np.diff(home_T) < 0).any():
            order_T = np.argsort(home_T, kind="stable")
            topk_expert_ids_TLK, home_T = topk_expert_ids_TLK[order_T], home_T[order_T]
        elif not topk_expert_ids_TLK.flags.c_contiguous:
            topk_expert_ids_TLK = topk_expert_ids_TLK.copy()
        starts = self._group_starts(home_T)
        hist_GLE, tokens_GLX = self._count_groups(topk_expert_ids_TLK, starts)
        tokens_LCRX = self._by_layer(tokens_GLX)
        pairs, experts, source_experts, slot_load_LCP = spread_pairs(
            hist_GLE,
            self._num_chunks,
            self._placement.slot_of_expert_RLE,
            self._placement.slots_per_device,
            self._placement.physical_to_logical_LP.shape[1],
        )
        return StepTraffic(
            pairs_LCRR=pairs,
            tokens_LCRR=tokens_LCRX[..., : self._num_devices],
            node_tokens_LCRN=tokens_LCRX[..., self._num_devices :],
            experts_LCRR=experts,
            source_experts_LRR=source_experts,
            slot_load_LCP=slot_load_LCP,
        )

    def chunk_of_token_T(self, home_T: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Return the chunk of each token; home_T ascending."""
        starts = self._group_starts(home_T)
        return np.repeat(np.arange(len(starts) - 1) % self._num_chunks, np.diff(starts))

    def _by_layer(self, counts_GLX: Counts) -> Counts:
        per_group = counts_GLX.reshape(self._num_devices, self._num_chunks, *counts_GLX.shape[1:])
        return per_group.transpose(2, 1, 0, 3)

    def _group_starts(self, home_T: npt.NDArray[np.int32]) -> Counts:
        """Return the bounds of the G = R * C groups (source device, chunk) in the tokens sorted by home, [G + 1]."""
        per_device_R = np.bincount(home_T, minlength=self._num_devices)
        first_R = np.cumsum(per_device_R) - per_device_R
        inner_RC = per_device_R[:, None] * np.arange(self._num_chunks) // self._num_chunks
        return np.append((first_R[:, None] + inner_RC).reshape(-1), len(home_T)).astype(np.int64)

    def _count_groups(
        self, ids_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], starts: Counts
    ) -> tuple[Counts, Counts]:
        """Return hist [G, L, E] and, for each group, the tokens that touch each device and node [G, L, R + N]."""
        num_groups, num_layers = len(starts) - 1, ids_TLK.shape[1]
        shapes = (self._placement.num_experts, self._num_devices + self._num_nodes)
        parts = min(_NUM_THREADS, 1 + len(ids_TLK) // _TOKENS_PER_THREAD)
        bounds = [len(ids_TLK) * part // parts for part in range(parts + 1)]
        totals = [tuple(np.zeros((num_groups, num_layers, n), np.int64) for n in shapes) for _ in range(parts)]

        def work(part: int) -> None:
            tokens = (ids_TLK, bounds[part], bounds[part + 1], starts)
            count_range(*tokens, self._num_chunks, self._bits_RWLE, *totals[part])

        if parts == 1:
            work(0)
        else:
            with ThreadPoolExecutor(parts) as pool:
                list(pool.map(work, range(parts)))
        hist, touched = (sum(arrays[1:], start=arrays[0]) for arrays in zip(*totals, strict=True))
        return hist, touched


def bit_tables(group_RLE: npt.NDArray[np.int32], num_groups: int) -> npt.NDArray[np.uint64]:
    """Return the bit of each expert's group, 64 groups to a word: uint64 [R, words, L, E], 0 in the other words."""
    words = -(-num_groups // 64)
    offset_RWLE = group_RLE[:, None].astype(np.int64) - 64 * np.arange(words)[:, None, None]
    inside = (offset_RWLE >= 0) & (offset_RWLE < 64)
    return np.where(inside, np.uint64(1) << np.where(inside, offset_RWLE, 0).astype(np.uint64), np.uint64(0))


@numba.njit(cache=True, nogil=True)
def count_range(ids_TLK, first, last, starts, num_chunks, bits_RWLE, hist_GLE, touched_GLX):  # type: ignore[no-untyped-def]
    """Add the tokens [first, last), block by block, to the totals of their groups."""
    for g in range(len(starts) - 1):
        source = g // num_chunks
        begin, end = max(first, starts[g]), min(last, starts[g + 1])
        for block in range(begin, end, _BLOCK_TOKENS):
            block_end = min(block + _BLOCK_TOKENS, end)
            _count_experts(ids_TLK, block, block_end, hist_GLE[g])
            _count_touched(ids_TLK, block, block_end, bits_RWLE[source], touched_GLX[g])


@numba.njit(cache=True, nogil=True)
def _count_experts(ids_TLK, first, last, hist_LE):  # type: ignore[no-untyped-def]
    """Add the routed pairs of the tokens [first, last) to the histogram of experts."""
    num_layers, topk = ids_TLK.shape[1], ids_TLK.shape[2]
    block_LE = np.zeros(hist_LE.shape, np.uint32)
    for t in range(first, last):
        for layer in range(num_layers):
            for k in range(topk):
                block_LE[layer, ids_TLK[t, layer, k]] += np.uint32(1)
    hist_LE += block_LE


@numba.njit(cache=True, nogil=True)
def _count_touched(ids_TLK, first, last, bits_WLE, touched_LX):  # type: ignore[no-untyped-def]
    """Add 1 to touched_LX[layer, x] for every token with an expert in place x: a bit mask per 64 places."""
    num_layers, topk = ids_TLK.shape[1], ids_TLK.shape[2]
    block_LX = np.zeros(touched_LX.shape, np.uint32)
    for word in range(bits_WLE.shape[0]):
        bits_LE = bits_WLE[word]
        width = min(64, touched_LX.shape[1] - 64 * word)
        for t in range(first, last):
            for layer in range(num_layers):
                mask = np.uint64(0)
                for k in range(topk):
                    mask |= bits_LE[layer, ids_TLK[t, layer, k]]
                for x in range(width):
                    block_LX[layer, 64 * word + x] += np.uint32((mask >> np.uint64(x)) & np.uint64(1))
    touched_LX += block_LX


@numba.njit(cache=True)
def spread_pairs(hist_GLE, num_chunks, slot_of_expert_RLE, slots_per_device, num_slots):  # type: ignore[no-untyped-def]
    """Return pairs_LCRR, experts_LCRR, source_experts_LRR and slot_load_LCP from the histograms of the groups."""
    num_devices, num_layers, num_experts = slot_of_expert_RLE.shape
    pairs = np.zeros((num_layers, num_chunks, num_devices, num_devices), np.int64)
    experts = np.zeros_like(pairs)
    source_experts = np.zeros((num_layers, num_devices, num_devices), np.int64)
    slot_load = np.zeros((num_layers, num_chunks, num_slots), np.int64)
    for source in range(num_devices):
        for layer in range(num_layers):
            for e in range(num_experts):
                slot = slot_of_expert_RLE[source, layer, e]
                destination = slot // slots_per_device
                total = 0
                for c in range(num_chunks):
                    n = hist_GLE[source * num_chunks + c, layer, e]
                    if n > 0:
                        pairs[layer, c, source, destination] += n
                        experts[layer, c, source, destination] += 1
                        slot_load[layer, c, slot] += n
                        total += n
                if total > 0:
                    source_experts[layer, source, destination] += 1
    return pairs, experts, source_experts, slot_load


@numba.njit(cache=True)
def count_remote(topk_expert_ids_TLK, home_T, modality_T, device_of_expert_RLE):  # type: ignore[no-untyped-def]
    """Return [modality, (pairs, remote pairs, visits, remote visits)], int64 [2, 4].

    A visit is a (token, layer). A pair is remote when its expert's device is not the token's home, a visit when some
    pair of it is: the two ratios of SMoES table S10.
    """
    counts = np.zeros((2, 4), np.int64)
    num_tokens, num_layers, topk = topk_expert_ids_TLK.shape
    for t in range(num_tokens):
        home, m = home_T[t], modality_T[t]
        for layer in range(num_layers):
            remote = 0
            for k in range(topk):
                remote += device_of_expert_RLE[home, layer, topk_expert_ids_TLK[t, layer, k]] != home
            counts[m, 0] += topk
            counts[m, 1] += remote
            counts[m, 2] += 1
            counts[m, 3] += remote > 0
    return counts

"""`LayerTraffic`: counts what crosses between devices in one MoE layer, for one placement of its experts after another.

As `TrafficCounter` does, but all steps at once, a step in the place of each layer, and without tables to be made.
Letters: S steps, T tokens of all of them, C chunks, R devices, N nodes, X = R + N places, E experts, P slots, K top-k,
G = S R C groups of tokens.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epsim.traffic import Counts, StepTraffic, bit_tables, count_range, spread_pairs

Ids = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class LayerTraffic:
    """The routed tokens of one layer, ready to be counted."""

    def __init__(
        self,
        ids: Sequence[Ids],
        home: Sequence[npt.NDArray[np.int32]],
        chunk: Sequence[Counts],
        *,
        num_experts: int,
        num_chunks: int,
        node_of_device_R: npt.NDArray[np.int32],
    ) -> None:
        """ids: of each step, the experts of its tokens [T, K]. home, chunk: [T], tokens sorted by both."""
        self._num_steps, self._num_experts, self._num_chunks = len(ids), num_experts, num_chunks
        self._num_devices, self._num_nodes = len(node_of_device_R), int(node_of_device_R.max()) + 1
        self._place_of_node_R = (self._num_devices + node_of_device_R).astype(np.int32)
        self._ids_T1K = np.ascontiguousarray(np.concatenate(ids)[:, None])
        self._num_groups = self._num_steps * self._num_devices * num_chunks
        group_T = np.concatenate(
            [(s * self._num_devices + home_T) * num_chunks + chunk[s] for s, home_T in enumerate(home)]
        )
        self._starts_G = np.searchsorted(group_T, np.arange(self._num_groups + 1)).astype(np.int64)
        self.load_SE = np.stack([np.bincount(ids_TK.reshape(-1), minlength=num_experts) for ids_TK in ids])

    def count(self, device_of_expert_E: npt.NDArray[np.int32]) -> StepTraffic:
        """Return the traffic when the experts are on these devices, in slots by ascending id, [S] in the place of L."""
        num_places = self._num_devices + self._num_nodes
        node_11E = self._place_of_node_R[device_of_expert_E][None, None]
        bits_1W1E = bit_tables(device_of_expert_E[None, None], num_places) | bit_tables(node_11E, num_places)
        hist_G1E = np.zeros((self._num_groups, 1, self._num_experts), dtype=np.int64)
        tokens_G1X = np.zeros((self._num_groups, 1, num_places), dtype=np.int64)
        # To `count_range` all groups are of source 0: without replicas tokens of all sources go the same ways.
        ids_T1K, num_groups = self._ids_T1K, self._num_groups
        count_range(ids_T1K, 0, len(ids_T1K), self._starts_G, num_groups, bits_1W1E, hist_G1E, tokens_G1X)
        held_R = np.bincount(device_of_expert_E, minlength=self._num_devices)
        pairs, experts, source_experts, slot_load_LCP = spread_pairs(
            self._by_source(hist_G1E),
            self._num_chunks,
            np.tile(_slots(device_of_expert_E, held_R), (self._num_devices, self._num_steps, 1)),
            held_R.max(),
            self._num_devices * held_R.max(),
        )
        tokens_SRCX = tokens_G1X.reshape(self._num_steps, self._num_devices, self._num_chunks, num_places)
        tokens_SCRX = tokens_SRCX.transpose(0, 2, 1, 3)
        return StepTraffic(
            pairs_LCRR=pairs,
            tokens_LCRR=tokens_SCRX[..., : self._num_devices],
            node_tokens_LCRN=tokens_SCRX[..., self._num_devices :],
            experts_LCRR=experts,
            source_experts_LRR=source_experts,
            slot_load_LCP=slot_load_LCP,
        )

    def _by_source(self, hist_G1E: Counts) -> Counts:
        """Return the histograms as `spread_pairs` takes them: [R C, S, E]."""
        hist_SRCE = hist_G1E.reshape(self._num_steps, self._num_devices, self._num_chunks, self._num_experts)
        return np.ascontiguousarray(hist_SRCE.transpose(1, 2, 0, 3)).reshape(-1, self._num_steps, self._num_experts)


def _slots(device_E: npt.NDArray[np.int32], held_R: Counts) -> npt.NDArray[np.int32]:
    """Return the slot of each expert, as many slots per device as the fullest needs."""
    first_R = np.arange(len(held_R)) * held_R.max() - (np.cumsum(held_R) - held_R)
    slot_E = np.empty(len(device_E), dtype=np.int32)
    slot_E[np.argsort(device_E, kind="stable")] = np.arange(len(device_E)) + np.repeat(first_R, held_R)
    return slot_E


def traffic_at_home(pairs_LR: Counts, activated_LR: Counts, num_chunks: int, num_nodes: int) -> StepTraffic:
    """Return traffic in which each device serves so many pairs with so many experts, all from its own first chunk."""
    num_layers, num_devices = pairs_LR.shape
    shape, own = (num_layers, num_chunks, num_devices, num_devices), np.arange(num_devices)
    pairs, experts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    pairs[:, 0, own, own], experts[:, 0, own, own] = pairs_LR, activated_LR
    slots_per_device = max(1, int(activated_LR.max(initial=0)))
    slot_load = np.zeros((num_layers, num_chunks, num_devices, slots_per_device), dtype=np.int64)
    slot_load[:, 0] = np.arange(slots_per_device) < activated_LR[:, :, None]
    return StepTraffic(
        pairs_LCRR=pairs,
        tokens_LCRR=pairs,
        node_tokens_LCRN=np.zeros((*shape[:3], num_nodes), dtype=np.int64),
        experts_LCRR=experts,
        source_experts_LRR=experts[:, 0],
        slot_load_LCP=slot_load.reshape(num_layers, num_chunks, -1),
    )

"""What tokens cross in the published exchanges: `Exchange`, drawn as their benchmarks draw it.

DeepEP's tests give every token random scores and take the top-k: a uniform choice without replacement. In normal mode
over more than four nodes they choose among the experts of the four nodes with the best scores.
Letters: T tokens, K top-k, E experts, R devices, N nodes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.placement import Placement
from epsim.traffic import StepTraffic, TrafficCounter

Floats = npt.NDArray[np.float64]
MAX_NODE_GROUPS = 4
MAX_DRAWN_TOKENS = 512  # per rank; more are taken as even: the busiest of 64 ranks has 4 % more than the mean there


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Drawn numbers, or means, of what goes from each device [source, destination]: pairs, tokens, tokens to nodes."""

    pairs_RR: Floats
    tokens_RR: Floats
    node_tokens_RN: Floats

    def scaled(self, factor: float) -> "Exchange":
        """Return all numbers times a factor."""
        return Exchange(
            pairs_RR=factor * self.pairs_RR,
            tokens_RR=factor * self.tokens_RR,
            node_tokens_RN=factor * self.node_tokens_RN,
        )

    def even(self, node_R: npt.NDArray[np.int64]) -> "Exchange":
        """Return every number as the mean over the pairs that stand alike: the device itself, its node, elsewhere."""
        nearness_RR = (node_R[:, None] == node_R).astype(np.int64) + np.eye(len(node_R), dtype=np.int64)
        nearness_RN = (node_R[:, None] == np.arange(self.node_tokens_RN.shape[1])).astype(np.int64)
        return Exchange(
            pairs_RR=_mean_by(self.pairs_RR, nearness_RR),
            tokens_RR=_mean_by(self.tokens_RR, nearness_RR),
            node_tokens_RN=_mean_by(self.node_tokens_RN, nearness_RN),
        )


def draw_exchange(
    cluster: Cluster, num_tokens: int, topk: int, experts: int, is_grouped: bool, rng: np.random.Generator
) -> Exchange:
    """Return the numbers of one draw of num_tokens per device.

    experts: where they do not divide over the devices (288 over 64), empty slots are filled up, so that no device has
    more than another.
    """
    num_devices = cluster.num_devices
    num_slots = num_devices * -(-experts // num_devices)
    ids_TK = draw_topk(num_devices * num_tokens, topk, num_slots, cluster.num_nodes if is_grouped else 1, rng)
    placement = Placement(
        policy="contiguous",
        num_experts=num_slots,
        physical_to_logical_LP=np.arange(num_slots, dtype=np.int32)[None],
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
    )
    home_T = np.repeat(np.arange(num_devices, dtype=np.int32), num_tokens)
    return _of(TrafficCounter(placement).count(ids_TK[:, None].astype(np.uint16), home_T))


def draw_topk(
    num_tokens: int, topk: int, experts: int, num_nodes: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Return distinct experts of each token, int64 [T, K]; of at most MAX_NODE_GROUPS of num_nodes nodes."""
    if num_nodes > MAX_NODE_GROUPS:
        return _draw_in_groups(num_tokens, topk, experts, num_nodes, rng)
    if topk > experts // 2:  # then trying again would take long
        return np.argsort(rng.random((num_tokens, experts)), axis=1)[:, :topk]
    ids_TK = rng.integers(experts, size=(num_tokens, topk))
    while (again := np.flatnonzero(_has_twice(ids_TK))).size:
        ids_TK[again] = rng.integers(experts, size=(again.size, topk))
    return ids_TK


def _draw_in_groups(
    num_tokens: int, topk: int, experts: int, num_nodes: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw scores; keep the experts of the nodes with the best single scores; return the best of these."""
    found = []
    for start in range(0, num_tokens, 8192):
        scores = rng.random((min(8192, num_tokens - start), num_nodes, experts // num_nodes), dtype=np.float32)
        best_TN = scores.max(axis=2)
        limit_T1 = np.partition(best_TN, -MAX_NODE_GROUPS, axis=1)[:, -MAX_NODE_GROUPS, None]
        scores[best_TN < limit_T1] = -1.0
        found.append(np.argpartition(-scores.reshape(len(scores), -1), topk, axis=1)[:, :topk])
    return np.concatenate(found)


def _has_twice(ids_TK: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.asarray((np.diff(np.sort(ids_TK, axis=1), axis=1) == 0).any(axis=1))


def _of(traffic: StepTraffic) -> Exchange:
    """Return the numbers of the one layer and chunk."""
    arrays = (traffic.pairs_LCRR, traffic.tokens_LCRR, traffic.node_tokens_LCRN)
    pairs_RR, tokens_RR, node_tokens_RN = (array[0, 0].astype(np.float64) for array in arrays)
    return Exchange(pairs_RR=pairs_RR, tokens_RR=tokens_RR, node_tokens_RN=node_tokens_RN)


def _mean_by(values: Floats, group: npt.NDArray[np.int64]) -> Floats:
    sums, counts = np.bincount(group.ravel(), values.ravel()), np.bincount(group.ravel())
    return np.asarray((sums / np.maximum(counts, 1))[group])


def masked(exchange: Exchange, num_tokens: int, topk: int) -> Exchange:
    """Return the exchange without what DeepEP's low-latency test masks: ten picks of each rank, drawn with replacement.

    Of n picks (n - 1)^10 / n^9 stay, in the mean: 2.1 of 8 for a single token.
    """
    picks = num_tokens * topk
    return exchange.scaled((1 - 1 / picks) ** 10)

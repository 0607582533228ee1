"""What crosses between devices when requests of a trace are served under a layout: `Crossing`, `count_crossing`.

Letters: T tokens, L MoE layers, R devices (source, then destination), N nodes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.layout import Layout
from epsim.sim import Transmission
from epsim.trace import Phase, TraceSource
from epsim.traffic import StepTraffic, TrafficCounter

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """Sums over tokens of both phases.

    tokens_LRR: tokens of a home with an expert on a device. node_tokens_LRN: tokens of a home with an expert in a node.
    pairs_LRR: routed pairs by home and device. node_of_device_R: the node of each device.
    bytes_RR: what each device sends to each other one, dispatch and combine, layers together; 0 on the diagonal.
    """

    num_tokens: int
    tokens_LRR: Counts
    node_tokens_LRN: Counts
    pairs_LRR: Counts
    node_of_device_R: npt.NDArray[np.int32]
    bytes_RR: Floats

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all messages, all layers, per token."""
        return float(self.bytes_RR.sum()) / self.num_tokens

    @property
    def remote_devices(self) -> float:
        """Devices other than its home that a token has experts on, the mean over tokens and layers."""
        own = np.arange(self.tokens_LRR.shape[1])
        return self._mean(int(self.tokens_LRR.sum()) - int(self.tokens_LRR[:, own, own].sum()))

    @property
    def remote_nodes(self) -> float | None:
        """Nodes other than its home's that a token has experts in, the same mean; None on one node."""
        if self.node_tokens_LRN.shape[2] < 2:
            return None
        own = np.arange(self.node_tokens_LRN.shape[1])
        inside = int(self.node_tokens_LRN[:, own, self.node_of_device_R].sum())
        return self._mean(int(self.node_tokens_LRN.sum()) - inside)

    @property
    def served_LR(self) -> Counts:
        """Routed pairs that each device serves."""
        return np.asarray(self.pairs_LRR.sum(axis=1))

    def _mean(self, visits: int) -> float:
        return visits / (self.num_tokens * len(self.tokens_LRR))


def count_crossing(trace: TraceSource, layout: Layout, cluster: Cluster, transmission: Transmission) -> Crossing:
    """Count what crosses when request q, in the order of ids, lives on the q-th of the home devices, in turn."""
    requests, counter = trace.requests, TrafficCounter(layout.placement)
    homes = layout.homes.assign(len(requests))
    totals: list[Counts] = []
    for batch in trace.batches():
        q_T = np.searchsorted(requests.request_id_Q, batch.request_id_T)
        home_T = np.where(batch.phase_T == Phase.DECODE, homes.decode_Q[q_T], homes.prefill_Q[q_T])
        found = _sums(counter.count(batch.topk_expert_ids_TLK, home_T.astype(np.int32)))
        totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
    tokens_LRR, node_tokens_LRN, pairs_LRR = totals
    return Crossing(
        num_tokens=trace.num_tokens,
        tokens_LRR=tokens_LRR,
        node_tokens_LRN=node_tokens_LRN,
        pairs_LRR=pairs_LRR,
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
        bytes_RR=_bytes_RR(tokens_LRR, node_tokens_LRN, pairs_LRR, cluster, transmission),
    )


def _sums(traffic: StepTraffic) -> list[Counts]:
    """Return tokens, tokens by node and pairs without the chunks."""
    return [
        np.asarray(counts.sum(axis=1)) for counts in (traffic.tokens_LCRR, traffic.node_tokens_LCRN, traffic.pairs_LCRR)
    ]


def _bytes_RR(
    tokens_LRR: Counts, node_tokens_LRN: Counts, pairs_LRR: Counts, cluster: Cluster, transmission: Transmission
) -> Floats:
    """Return bytes by sender and receiver; with node-level dedup gateways pass on what is for others of their node."""
    form, by_node = transmission.message_format, transmission.dedup == "node"
    pairs_RR, node_tokens_RN = pairs_LRR.sum(axis=0), node_tokens_LRN.sum(axis=0)
    vectors_RR = pairs_RR if transmission.dedup == "none" else tokens_LRR.sum(axis=0)
    out_RR, back_RR = form.dispatch_bytes(vectors_RR, pairs_RR), form.combine_bytes(vectors_RR)
    sent_RR = np.zeros_like(out_RR)
    node_R = cluster.node_of_device_R
    for source in range(cluster.num_devices):
        for node in range(cluster.num_nodes):
            members = np.flatnonzero(node_R == node)
            hop = source
            if by_node and node != node_R[source]:
                hop = cluster.gateway(source, node)
                vectors, pairs = node_tokens_RN[source, node], pairs_RR[source, members].sum()
                sent_RR[source, hop] += form.dispatch_bytes(vectors, pairs)
                sent_RR[hop, source] += form.combine_bytes(vectors)
            sent_RR[hop, members] += out_RR[source, members] * (members != hop)
            sent_RR[members, hop] += back_RR[source, members] * (members != hop)
    return sent_RR

"""What a token's transfers cost under a placement: `TransferObjective`, and `FitTokens`, the tokens it is summed over.

A token of one phase lives on source s with a certain probability. Under dedup it travels once to each device that
holds an expert of its top-k, or, with node-level dedup, once to each such node and from there to the devices. So its
expected cost is a sum over the devices and the nodes that it touches. Letters: F phase (prefill, decode), S sources,
R devices, N nodes, L MoE layers, T tokens, K top-k, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numba
import numpy as np
import numpy.typing as npt

from epsim.trace import Phase, RoutingTrace, TraceSource
from epsim.trace.meta import ExpertIds

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TransferObjective:
    """The cost of the transfers of a token, in units of the dearest transfer of one vector between two devices.

    home_share_FS: float64, the probability that a token of a phase lives on a source; rows sum to 1, or to 0 where
        the tokens of that phase do not come here at all.
    device_cost_SR, node_cost_SN: float64, what a token of a source pays once for each device, and once for each node,
        that it touches; node costs are 0 without node-level dedup.
    node_of_device_R: int32.
    per_pair: a token pays for a device once for each of its experts there, as it travels without dedup.
    """

    home_share_FS: Floats
    device_cost_SR: Floats
    node_cost_SN: Floats
    node_of_device_R: npt.NDArray[np.int32]
    per_pair: bool = False

    def __post_init__(self) -> None:
        num_sources, num_devices = self.device_cost_SR.shape
        if self.home_share_FS.shape != (2, num_sources) or len(self.node_cost_SN) != num_sources:
            raise ValueError("home_share_FS, device_cost_SR and node_cost_SN must have the same sources")
        if self.node_of_device_R.shape != (num_devices,) or self.node_of_device_R.max() >= self.node_cost_SN.shape[1]:
            raise ValueError("node_of_device_R must name the nodes of the devices of device_cost_SR")
        if (self.device_cost_SR < 0).any() or (self.node_cost_SN < 0).any():
            raise ValueError("costs must not be below 0")

    @classmethod
    def of(
        cls,
        node_of_device_R: npt.NDArray[np.integer],
        home_share_FR: Floats,
        *,
        by_node: bool,
        per_pair: bool = False,
        same_node: float = 1.0,
        other_node: float = 1.0,
        gateway_RN: npt.NDArray[np.integer] | None = None,
    ) -> Self:
        """Return the objective of a cluster in which all devices may be homes.

        by_node: node-level dedup. per_pair: no dedup. same_node, other_node: the cost of a vector between devices of
        one node, of two. gateway_RN: by which device of a node its vectors come from a source; it need not pass them
        on to itself. None: to every device of another node they are passed on.
        """
        nodes_R = np.asarray(node_of_device_R, np.int32)
        is_near_RR = nodes_R[:, None] == nodes_R
        is_own_RN = nodes_R[:, None] == np.arange(nodes_R.max() + 1)
        across = same_node if by_node else other_node  # a vector for another node has been paid for with the node
        device_cost_RR = np.where(is_near_RR, same_node, across).astype(np.float64)
        np.fill_diagonal(device_cost_RR, 0.0)
        if by_node and gateway_RN is not None:
            device_cost_RR[np.arange(len(nodes_R))[:, None], gateway_RN] = 0.0
        return cls(
            home_share_FS=home_share_FR,
            device_cost_SR=device_cost_RR,
            node_cost_SN=np.where(is_own_RN, 0.0, other_node if by_node else 0.0),
            node_of_device_R=nodes_R,
            per_pair=per_pair,
        )

    @classmethod
    def uniform(cls, node_of_device_R: npt.NDArray[np.integer]) -> Self:
        """Return the objective that counts remote devices, where tokens live anywhere."""
        num_devices = len(node_of_device_R)
        return cls.of(node_of_device_R, np.full((2, num_devices), 1.0 / num_devices), by_node=False)

    @property
    def num_devices(self) -> int:
        return len(self.node_of_device_R)

    @property
    def device_cost_FR(self) -> Floats:
        """What a token of a phase pays for touching a device, in the mean over its homes."""
        return self.home_share_FS @ self.device_cost_SR

    @property
    def node_cost_FN(self) -> Floats:
        """What a token of a phase pays for touching a node, in the mean over its homes."""
        return self.home_share_FS @ self.node_cost_SN

    def on_devices(self, devices: npt.NDArray[np.integer], phases: Sequence[Phase] = tuple(Phase)) -> Self:
        """Return the objective of experts that are placed on some of the devices, for tokens of these phases.

        Sources stay where they are.
        """
        return replace(
            self,
            home_share_FS=self.home_share_FS * np.isin(list(Phase), phases)[:, None],
            device_cost_SR=self.device_cost_SR[:, devices],
            node_of_device_R=self.node_of_device_R[devices],
        )

    def cost_L(self, tokens: "FitTokens", device_of_expert_RLE: npt.NDArray[np.int32]) -> Floats:
        """Return the mean cost of a token in each layer, float64 [L]: what `charged` tokens pay for what they touch.

        device_of_expert_RLE: to which device each source sends the tokens of an expert (`Placement`); sources that no
        token lives on may be left out of the sum, and all are alike without replicas.
        """
        num_layers, num_tokens = tokens.ids_LTK.shape[0], max(1, tokens.num_tokens)
        tokens, total_L = self.charged(tokens), np.zeros(num_layers)
        same = bool((device_of_expert_RLE == device_of_expert_RLE[:1]).all())
        if not same and device_of_expert_RLE.shape[0] != self.home_share_FS.shape[1]:
            raise ValueError("a placement with replicas needs its devices to be the sources")
        shares = [(self.device_cost_FR, self.node_cost_FN, 0)] if same else list(self._by_source())
        for layer in range(num_layers):
            for device_cost_FR, node_cost_FN, source in shares:
                total_L[layer] += _total_cost(
                    tokens.ids_LTK[layer],
                    tokens.phase_T,
                    device_of_expert_RLE[source, layer],
                    self.node_of_device_R,
                    device_cost_FR,
                    node_cost_FN,
                )
        return total_L / num_tokens

    def charged(self, tokens: "FitTokens") -> "FitTokens":
        """Return the tokens in the form in which each pays once for what it touches: per pair, one for each expert."""
        if not self.per_pair:
            return tokens
        num_layers, _, topk = tokens.ids_LTK.shape
        return replace(
            tokens,
            ids_LTK=tokens.ids_LTK.reshape(num_layers, -1, 1),
            phase_T=np.repeat(tokens.phase_T, topk),
        )

    def _by_source(self) -> Iterator[tuple[Floats, Floats, int]]:
        for source, share_F in enumerate(self.home_share_FS.T):
            if share_F.any():
                yield (
                    np.outer(share_F, self.device_cost_SR[source]),
                    np.outer(share_F, self.node_cost_SN[source]),
                    source,
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class FitTokens:
    """The routing that a placement is fitted to or judged by, a layer's rows together.

    ids_LTK: uint8 or uint16, logical experts. phase_T: uint8.
    """

    ids_LTK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    phase_T: npt.NDArray[np.uint8]

    @classmethod
    def of(
        cls,
        trace: TraceSource,
        max_tokens: int | None = None,
        ids_of: Callable[[RoutingTrace], ExpertIds] = lambda rows: rows.topk_expert_ids_TLK,
    ) -> Self:
        """Return the tokens of a trace, or `max_tokens` of them, evenly spaced over its rows.

        ids_of: their expert ids [T, L, K], where the order of a token's experts matters.
        """
        num_rows = trace.num_tokens
        num_tokens = num_rows if max_tokens is None else min(num_rows, max_tokens)
        meta = trace.meta
        ids_LTK = np.empty((meta.num_layers, num_tokens, meta.topk), meta.expert_id_dtype)
        phase_T = np.empty(num_tokens, np.uint8)
        rows = np.arange(num_tokens) * num_rows // max(1, num_tokens)
        first = 0
        for batch in trace.batches():
            here = slice(*np.searchsorted(rows, (first, first + batch.num_tokens)))
            own = rows[here] - first
            ids_LTK[:, here] = ids_of(batch)[own].transpose(1, 0, 2)
            phase_T[here] = batch.phase_T[own]
            first += batch.num_tokens
        return cls(ids_LTK=ids_LTK, phase_T=phase_T)

    @property
    def num_tokens(self) -> int:
        return len(self.phase_T)


@numba.njit(cache=True, nogil=True)
def _total_cost(ids_TK, phase_T, device_of_expert_E, node_of_device_R, device_cost_FR, node_cost_FN):  # type: ignore[no-untyped-def]
    """Return the sum over tokens of the costs of the devices and the nodes that hold an expert of theirs."""
    seen_R = np.full(len(node_of_device_R), -1, np.int64)
    seen_N = np.full(node_cost_FN.shape[1], -1, np.int64)
    total = 0.0
    for t in range(ids_TK.shape[0]):
        phase = phase_T[t]
        for k in range(ids_TK.shape[1]):
            device = device_of_expert_E[ids_TK[t, k]]
            if seen_R[device] != t:
                seen_R[device] = t
                total += device_cost_FR[phase, device]
                node = node_of_device_R[device]
                if seen_N[node] != t:
                    seen_N[node] = t
                    total += node_cost_FN[phase, node]
    return total

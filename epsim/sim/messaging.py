"""What messages cost the devices at their two ends: `MessageCosts`, and the messages of an `Exchange` by their ends.

Letters: L MoE layers, C chunks, R devices (home, then expert device; of an `Exchange` sender, then receiver), N nodes.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster

Floats = npt.NDArray[np.float64]


def _s_per_byte(bytes_per_s: float | None) -> float:
    return 0.0 if bytes_per_s is None else 1.0 / bytes_per_s


@dataclass(frozen=True, kw_only=True)
class MessageCosts:
    """Compute time of a device, float64 [R] each: per message and byte that it sends, per message that it receives."""

    send_s_R: Floats
    send_s_per_byte_R: Floats
    receive_s_R: Floats

    def __post_init__(self) -> None:
        shapes = {self.send_s_R.shape, self.send_s_per_byte_R.shape, self.receive_s_R.shape}
        if len(shapes) != 1 or self.send_s_R.ndim != 1:
            raise ValueError(f"send_s_R, send_s_per_byte_R and receive_s_R have shapes {shapes}, not one of [R]")

    @classmethod
    def of(cls, cluster: Cluster) -> Self | None:
        """Return the costs on the devices of a cluster; None where messages cost nothing."""
        costs = cls(
            send_s_R=np.array([device.send_overhead_s for device in cluster.devices]),
            send_s_per_byte_R=np.array([_s_per_byte(device.send_bytes_per_s) for device in cluster.devices]),
            receive_s_R=np.array([device.receive_overhead_s for device in cluster.devices]),
        )
        return costs if costs.sends_R.any() or costs.receive_s_R.any() else None

    @property
    def sends_R(self) -> npt.NDArray[np.bool_]:
        """Whether messages that a device sends cost it something."""
        return np.asarray((self.send_s_R > 0) | (self.send_s_per_byte_R > 0))


def background_s_per_byte_R(cluster: Cluster) -> Floats:
    """Return what each byte that a device sends or receives takes from its compute, [R]."""
    return np.array([_s_per_byte(device.background_bytes_per_s) for device in cluster.devices])


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The messages of all dispatches, or of all combines, of a step: how many, and bytes, [L, from, to]."""

    count_LRR: Floats
    bytes_LRR: Floats

    @property
    def reversed(self) -> Self:
        """The same messages the other way."""
        return type(self)(count_LRR=self.count_LRR.swapaxes(1, 2), bytes_LRR=self.bytes_LRR.swapaxes(1, 2))


@dataclass(frozen=True, kw_only=True)
class Gateways:
    """Which pairs of home and device are joined through a gateway: gateway_RN (None: no pair is), node_of_device_R."""

    gateway_RN: npt.NDArray[np.int32] | None
    node_of_device_R: npt.NDArray[np.int32]

    def exchange(self, sent_LCRR: npt.NDArray[np.bool_], bytes_LCRR: Floats, node_bytes_LCRN: Floats) -> Exchange:
        """Return the messages from homes to devices: sent_LCRR says for which pairs there is one, bytes or not."""
        return Exchange(
            count_LRR=self._by_ends(sent_LCRR.astype(np.float64), (node_bytes_LCRN > 0).astype(np.float64)),
            bytes_LRR=self._by_ends(bytes_LCRR, node_bytes_LCRN),
        )

    def _by_ends(self, pairs_LCRR: Floats, nodes_LCRN: Floats) -> Floats:
        """Sum over chunks and, at gateways, over homes: [L, R, R]."""
        pairs_LRR, nodes_LRN = pairs_LCRR.sum(axis=1), nodes_LCRN.sum(axis=1)
        if self.gateway_RN is None:
            return np.asarray(pairs_LRR)
        home_RR, device_RR = np.indices(pairs_LRR.shape[1:])
        gateway_RR = self.gateway_RN[home_RR, self.node_of_device_R[device_RR]]
        far_RR = self.node_of_device_R[home_RR] != self.node_of_device_R[device_RR]
        onward_RR = far_RR & (gateway_RR != device_RR)
        ends_LRR = pairs_LRR * ~far_RR
        ends_RRL = ends_LRR.transpose(1, 2, 0)
        np.add.at(ends_RRL, (gateway_RR[onward_RR], device_RR[onward_RR]), pairs_LRR[:, onward_RR].T)
        home_RN = np.indices(self.gateway_RN.shape)[0]
        np.add.at(ends_RRL, (home_RN, self.gateway_RN), nodes_LRN.transpose(1, 2, 0))
        return np.asarray(ends_LRR)

    def only_passed_on_LR(self, sent_LCRR: npt.NDArray[np.bool_], node_bytes_LCRN: Floats) -> Floats:
        """Return how many messages a gateway gets that hold no token for itself, [L, R]."""
        passed_LR = np.zeros((sent_LCRR.shape[0], sent_LCRR.shape[2]))
        if self.gateway_RN is not None:
            for_itself_LCRN = np.take_along_axis(sent_LCRR, self.gateway_RN[None, None].astype(np.intp), axis=3)
            count_LRN = ((node_bytes_LCRN > 0) & ~for_itself_LCRN).sum(axis=1)
            np.add.at(passed_LR.T, self.gateway_RN, count_LRN.transpose(1, 2, 0))
        return passed_LR

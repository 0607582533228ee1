"""`Homes`: on which device the tokens of each request live in prefill and in decode, and the policies that choose it.

Where the two differ, the request's KV cache moves between the phases (SMoES supplement 2.4: "similar to PD
separation"). Letters: Q requests of a batch, R devices, L MoE layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.placement.placement import IntArray, Placement


@dataclass(frozen=True, kw_only=True)
class Homes:
    """prefill_Q, decode_Q: int32 device of each request's tokens in that phase."""

    prefill_Q: IntArray
    decode_Q: IntArray

    def __post_init__(self) -> None:
        if self.prefill_Q.shape != self.decode_Q.shape or self.prefill_Q.ndim != 1:
            raise ValueError("prefill_Q and decode_Q must be vectors of the same length")


@dataclass(frozen=True, kw_only=True)
class HomePlan:
    """The devices that take the requests of a phase in turn: request q lives on entry q mod length.

    prefill_devices, decode_devices: int32 vectors of device indices.
    """

    prefill_devices: IntArray
    decode_devices: IntArray

    def assign(self, num_requests: int) -> Homes:
        """Return the homes of a batch of `num_requests`."""
        q = np.arange(num_requests)
        return Homes(
            prefill_Q=self.prefill_devices[q % len(self.prefill_devices)],
            decode_Q=self.decode_devices[q % len(self.decode_devices)],
        )

    def share_FR(self, num_devices: int) -> npt.NDArray[np.float64]:
        """Return the share of each phase's requests that live on each device, float64 [phase (prefill, decode), R]."""
        plans = self.prefill_devices, self.decode_devices
        return np.stack([np.bincount(plan, minlength=num_devices) / len(plan) for plan in plans])

    @property
    def home_devices(self) -> IntArray:
        """All devices that are a home in some phase, ascending."""
        return np.union1d(self.prefill_devices, self.decode_devices).astype(np.int32)


def balanced(num_devices: int) -> HomePlan:
    """Return the plan in which request q lives on device q mod R in both phases (data-parallel attention)."""
    devices = np.arange(num_devices, dtype=np.int32)
    return HomePlan(prefill_devices=devices, decode_devices=devices)


def by_modality(placement: Placement, expert_load_MLE: npt.NDArray[np.int64]) -> HomePlan:
    """Return the plan in which prefill lives where the vision experts are and decode where the text experts are.

    Devices are ranked by the share of vision tokens among all tokens that their experts serve, each modality
    normalised by its total (as SMoES eq. 18 does); the upper half (rounded down) takes the prefill, the
    rest the decode; a single device takes both. Ties keep the device order.
    """
    share_MR = _device_share(placement, expert_load_MLE)
    vision_share_R = share_MR[1] / np.maximum(share_MR.sum(axis=0), np.finfo(float).tiny)
    order_R = np.argsort(-vision_share_R, kind="stable").astype(np.int32)
    return _in_halves(order_R)


def expected_by_modality(num_devices: int) -> HomePlan:
    """Return the plan of `by_modality` for placements whose vision experts are on the first devices.

    Policies that weigh homes need them before there is a placement; this is what they place for.
    """
    return _in_halves(np.arange(num_devices, dtype=np.int32))


def _in_halves(order_R: IntArray) -> HomePlan:
    half = max(1, len(order_R) // 2)
    rest = max(1, len(order_R) - half)
    return HomePlan(prefill_devices=np.sort(order_R[:half]), decode_devices=np.sort(order_R[-rest:]))


def _device_share(placement: Placement, expert_load_MLE: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return [modality, R]: the share of each modality's routed tokens that the experts of a device serve.

    The load of a replicated expert is split evenly over its replicas.
    """
    p2l_LP = placement.physical_to_logical_LP
    layers = np.arange(placement.num_layers)[:, None]
    replicas_LE = np.zeros((placement.num_layers, placement.num_experts))
    np.add.at(replicas_LE, (layers, p2l_LP), p2l_LP >= 0)
    per_slot_MLP = (expert_load_MLE / replicas_LE)[:, layers, p2l_LP] * (p2l_LP >= 0)
    per_device_MR = per_slot_MLP.reshape(2, placement.num_layers, placement.num_devices, -1).sum(axis=(1, 3))
    share_MR = per_device_MR / np.maximum(per_device_MR.sum(axis=1, keepdims=True), 1)
    return np.asarray(share_MR, dtype=np.float64)

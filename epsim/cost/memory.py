"""`MemoryAccount`: what a deployment puts into the memory of each device, and the check that it fits."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.errors import CapacityError
from epsim.model import ModelCard
from epsim.placement import HomePlan, Placement
from epsim.units import format_size

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """Bytes per device, float64 [R] each.

    experts_bytes_R: routed expert weights. shared_bytes_R: attention, router, dense and shared layers, embedding, head
    and vision encoder, on each device that is a home. kv_bytes_R: KV cache at its largest. buffers_bytes_R: vectors
    on their way in one layer of the prefill, sent and received. usable_bytes_R: what the device offers.
    """

    device_names: tuple[str, ...]
    experts_bytes_R: Floats
    shared_bytes_R: Floats
    kv_bytes_R: Floats
    buffers_bytes_R: Floats
    usable_bytes_R: Floats

    @property
    def total_bytes_R(self) -> Floats:
        return self.experts_bytes_R + self.shared_bytes_R + self.kv_bytes_R + self.buffers_bytes_R

    def of_groups(self, leader_R: npt.NDArray[np.int32], buffers_bytes_R: Floats) -> "MemoryAccount":
        """Return the account in which each device holds what leader_R[device] holds here, with other buffers."""
        return replace(
            self,
            experts_bytes_R=self.experts_bytes_R[leader_R],
            shared_bytes_R=self.shared_bytes_R[leader_R],
            kv_bytes_R=self.kv_bytes_R[leader_R],
            buffers_bytes_R=buffers_bytes_R,
        )

    @property
    def headroom_bytes(self) -> float:
        """What the fullest device has left."""
        return float((self.usable_bytes_R - self.total_bytes_R).min())

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return the account by device and item, as plain values."""
        items = {
            "experts": self.experts_bytes_R,
            "other_weights": self.shared_bytes_R,
            "kv_cache": self.kv_bytes_R,
            "buffers": self.buffers_bytes_R,
            "total": self.total_bytes_R,
            "usable": self.usable_bytes_R,
        }
        return {
            name: {item: float(bytes_R[r]) for item, bytes_R in items.items()}
            for r, name in enumerate(self.device_names)
        }

    def check(self, batch_size: int) -> None:
        """Raise CapacityError, with the numbers of the fullest device, when some device has too little memory."""
        worst = int(np.argmin(self.usable_bytes_R - self.total_bytes_R))
        if self.total_bytes_R[worst] <= self.usable_bytes_R[worst]:
            return
        parts = {
            "experts": self.experts_bytes_R,
            "other weights": self.shared_bytes_R,
            "KV cache": self.kv_bytes_R,
            "buffers": self.buffers_bytes_R,
        }
        account = " + ".join(f"{name} {format_size(float(part[worst]))}" for name, part in parts.items())
        raise CapacityError(
            f"workload: batch {batch_size} does not fit on {self.device_names[worst]}: {account} = "
            f"{format_size(float(self.total_bytes_R[worst]))} of {format_size(float(self.usable_bytes_R[worst]))} "
            "usable; use smaller batches, shorter requests, or more devices"
        )


def account_memory(
    *,
    model: ModelCard,
    cluster: Cluster,
    placement: Placement,
    homes: HomePlan,
    kv_tokens_R: npt.NDArray[np.int64],
    tokens_R: npt.NDArray[np.int64],
    dedup: bool,
) -> MemoryAccount:
    """Return the account of a batch.

    kv_tokens_R: the most tokens whose KV cache a device holds at once. tokens_R: home tokens of the prefill; buffers
    are for the worst case, as engines allocate them: each goes to min(K, D) of the D other devices of its group that
    have experts, and to those devices all of the others' come; without `dedup` K vectors of each go, and K come.
    """
    num_moe_layers = len(model.moe_layer_ids)
    per_layer = model.attention_bytes * model.num_layers + model.dense_ffn_bytes * model.num_dense_layers
    per_layer += (model.router_bytes + model.shared_expert_bytes) * num_moe_layers
    vision_bytes = model.vision.weight_bytes if model.vision else 0
    shared_bytes = per_layer + model.embedding_bytes + model.lm_head_bytes + vision_bytes
    is_home_R = np.isin(np.arange(cluster.num_devices), homes.home_devices)
    vectors_R = _vectors_on_their_way(placement, tokens_R, model.topk, dedup=dedup)
    return MemoryAccount(
        device_names=tuple(device.name for device in cluster.devices),
        experts_bytes_R=placement.filled_slots_R.astype(np.float64) * float(model.expert_bytes),
        shared_bytes_R=np.where(is_home_R, float(shared_bytes), 0.0),
        kv_bytes_R=kv_tokens_R.astype(np.float64) * float(model.kv_bytes_per_token * model.num_layers),
        buffers_bytes_R=vectors_R.astype(np.float64) * float(model.hidden_bytes_per_token),
        usable_bytes_R=np.array([d.memory_bytes * d.memory_usable_frac for d in cluster.devices]),
    )


def _vectors_on_their_way(
    placement: Placement, tokens_R: npt.NDArray[np.int64], topk: int, *, dedup: bool
) -> npt.NDArray[np.int64]:
    """Return the most hidden vectors that each device sends and receives in one layer, int64 [R]."""
    group_R = placement.group_of_device_R
    sends_RR = np.broadcast_to(placement.filled_slots_R > 0, (placement.num_devices,) * 2).copy()
    if group_R is not None:
        sends_RR &= group_R[:, None] == group_R
    np.fill_diagonal(sends_RR, False)
    num_others_R = sends_RR.sum(axis=1)
    out_R = np.minimum(topk, num_others_R) if dedup else topk * (num_others_R > 0)
    return np.asarray(tokens_R * out_R + (tokens_R @ sends_RR) * (1 if dedup else topk), dtype=np.int64)

"""What each device holds and where requests live: `Layout`, and a builder for each kind of parallelism.

`expert_parallel`, `replicas` (tensor and data parallel), `attention_apart`, `prefill_apart`. Letters: L MoE layers,
E experts, R devices, D devices of a pool, X slots of a device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import MemoryAccount, account_memory
from epsim.model import ModelCard
from epsim.placement import HomePlan, Placement, PlacementPolicy, PlacementProblem, balanced, by_modality
from epsim.trace import Phase

Devices = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What each device of a deployment holds, and where requests live.

    description: kind of parallelism and sizes, for people. card: what one device holds of the model (less experts that
    are not placed on it). group_size: devices that share each request; it lives on the first of its group, for which
    alone placement and homes stand.
    """

    description: str
    card: ModelCard
    placement: Placement
    homes: HomePlan
    group_size: int = 1

    @property
    def leader_R(self) -> Devices:
        """The first device of each device's group, int32 [R]."""
        return np.arange(self.placement.num_devices, dtype=np.int32) // self.group_size * self.group_size

    def devices_of(self, homes: Devices) -> list[int]:
        """Return the devices that work for requests with these homes, in order."""
        return [int(device) for device in np.flatnonzero(np.isin(self.leader_R, homes))]

    def serving_R(self, homes: Devices) -> npt.NDArray[np.bool_]:
        """Return which devices can serve routed pairs of requests with these homes: those of their groups with experts.

        Under tensor parallelism all of a group, each its slice.
        """
        group_R = self.placement.group_of_device_R
        has_experts_R: npt.NDArray[np.bool_] = (self.placement.filled_slots_R > 0)[self.leader_R]
        return has_experts_R if group_R is None else has_experts_R & np.isin(group_R, group_R[homes])

    def account(
        self,
        cluster: Cluster,
        kv_tokens_R: npt.NDArray[np.int64],
        tokens_R: npt.NDArray[np.int64],
        *,
        dedup: bool,
    ) -> MemoryAccount:
        """Return the memory account of a batch (`epsim.cost.account_memory`).

        Buffers of a tensor-parallel device: what it sends and receives in a reduce-scatter.
        """
        account = account_memory(
            model=self.card,
            cluster=cluster,
            placement=self.placement,
            homes=self.homes,
            kv_tokens_R=kv_tokens_R,
            tokens_R=tokens_R,
            dedup=dedup,
        )
        if self.group_size == 1:
            return account
        tokens_bytes_R = tokens_R[self.leader_R].astype(np.float64) * float(self.card.hidden_bytes_per_token)
        return account.of_groups(self.leader_R, 2 * (self.group_size - 1) / self.group_size * tokens_bytes_R)


def expert_parallel(
    card: ModelCard, policy: PlacementPolicy, problem: PlacementProblem, *, homes: Literal["balanced", "by_modality"]
) -> Layout:
    """Spread the experts over all devices."""
    placement = policy.place(problem)
    plan = balanced(problem.num_devices) if homes == "balanced" else by_modality(placement, problem.expert_load_MLE)
    return Layout(description="ep", card=card, placement=placement, homes=plan)


def replicas(card: ModelCard, problem: PlacementProblem, *, kind: Literal["tp", "dp"], size: int) -> Layout:
    """Let groups of `size` devices hold everything; card: the whole model. The placement says so of first devices."""
    num_devices = problem.num_devices
    leaders = np.arange(0, num_devices, size, dtype=np.int32)
    slots_LRX = np.full((problem.num_layers, num_devices, problem.num_experts), -1, np.int32)
    slots_LRX[:, leaders] = np.arange(problem.num_experts)
    groups = f"{len(leaders)} group{'s' if len(leaders) > 1 else ''} of {size}"
    return Layout(
        description=f"tp, {groups}" if kind == "tp" else f"dp, {num_devices} replicas",
        card=card.shard(size),
        placement=_placement(kind, problem, slots_LRX, np.arange(num_devices) // size),
        homes=HomePlan(prefill_devices=leaders, decode_devices=leaders),
        group_size=size,
    )


def attention_apart(
    card: ModelCard, policy: PlacementPolicy, problem: PlacementProblem, *, attention_devices: int | None
) -> Layout:
    """Have attention on the first devices (None: half, rounded down) and the experts on the others."""
    attention, experts = split_devices(problem.num_devices, attention_devices)
    return Layout(
        description=f"afd, attention on {len(attention)}, experts on {len(experts)}",
        card=card,
        placement=_place(policy, problem, {tuple(Phase): experts}),
        homes=HomePlan(prefill_devices=attention, decode_devices=attention),
    )


def prefill_apart(
    card: ModelCard, policy: PlacementPolicy, problem: PlacementProblem, *, prefill_devices: int | None
) -> Layout:
    """Prefill on the first devices (None: half, rounded down), decode on the others; each pool has all experts."""
    prefill, decode = split_devices(problem.num_devices, prefill_devices)
    return Layout(
        description=f"pd, prefill on {len(prefill)}, decode on {len(decode)}",
        card=card,
        placement=_place(policy, problem, {(Phase.PREFILL,): prefill, (Phase.DECODE,): decode}),
        homes=HomePlan(prefill_devices=prefill, decode_devices=decode),
    )


def split_devices(num_devices: int, first: int | None) -> tuple[Devices, Devices]:
    """Return the first and the other devices; half of them, rounded down, where it is not said."""
    devices = np.arange(num_devices, dtype=np.int32)
    first = num_devices // 2 if first is None else first
    return devices[:first], devices[first:]


def _place(policy: PlacementPolicy, problem: PlacementProblem, pools: Mapping[tuple[Phase, ...], Devices]) -> Placement:
    """Return the placement in which the policy places all experts on each of the pools, and none elsewhere.

    pools: the devices that serve the tokens of these phases.
    """
    placed = [policy.place(problem.on_devices(pool, phases)) for phases, pool in pools.items()]
    slots_per_device = max(placement.slots_per_device for placement in placed)
    slots_LRX = np.full((problem.num_layers, problem.num_devices, slots_per_device), -1, np.int32)
    group_R = np.zeros(problem.num_devices, dtype=np.int32)
    for group, (pool, placement) in enumerate(zip(pools.values(), placed, strict=True)):
        group_R[pool] = group
        slots_LDX = placement.physical_to_logical_LP.reshape(problem.num_layers, len(pool), -1)
        slots_LRX[:, pool, : placement.slots_per_device] = slots_LDX
    return _placement(policy.kind, problem, slots_LRX, group_R)


def _placement(
    policy: str, problem: PlacementProblem, slots_LRX: npt.NDArray[np.int32], group_R: npt.NDArray[np.integer]
) -> Placement:
    return Placement(
        policy=policy,
        num_experts=problem.num_experts,
        physical_to_logical_LP=slots_LRX.reshape(problem.num_layers, -1),
        node_of_device_R=problem.node_of_device_R,
        group_of_device_R=group_R.astype(np.int32),
    )

"""How a model is laid over the devices: a kind of parallelism becomes a `Layout` (`check_parallelism`, `lay_out`).

ep: experts spread over all devices. tp: groups of devices that share every layer. dp: a replica per device. afd:
attention on some devices, experts on the others. pd: prefill on some devices, decode on the others, experts spread
over the devices of each pool. Letters: L MoE layers, E experts, R devices, D devices of a pool, X slots of a device.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import MemoryAccount, account_memory
from epsim.errors import ScenarioError
from epsim.model import ModelCard
from epsim.placement import HomePlan, Placement, PlacementPolicy, PlacementProblem, balanced, by_modality
from epsim.scenario.describe import show
from epsim.scenario.spec import AfdSpec, DpSpec, ParallelismSpec, PdSpec, ScenarioSpec, TpSpec

Devices = npt.NDArray[np.int32]
_WHY = {"tp": "every device holds a slice of every expert", "dp": "every device holds the whole model"}


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


def check_parallelism(spec: ScenarioSpec, model: ModelCard, num_devices: int) -> None:
    """Raise ScenarioError where the kind of parallelism does not go with the model, the devices or other sections."""
    kind, chosen = spec.parallelism.kind, spec.parallelism
    if kind in _WHY:
        _require_defaults(spec)
    elif not model.moe_layer_ids:
        raise ScenarioError(
            f"model: {model.name} has no MoE layers; write a model with experts, e.g. olmoe, "
            "or parallelism.kind: tp or dp"
        )
    if isinstance(chosen, TpSpec):
        _check_size(chosen, model, num_devices)
    if isinstance(chosen, AfdSpec | PdSpec):
        _check_split(spec, num_devices)


def _check_size(chosen: TpSpec, model: ModelCard, num_devices: int) -> None:
    size = chosen.size or num_devices
    if num_devices % size:
        why = f"does not divide {num_devices} devices"
    elif uneven := model.uneven(size):
        why = f"does not split {uneven} of {model.name}"
    else:
        return
    fits = [n for n in range(1, num_devices + 1) if num_devices % n == 0 and not model.uneven(n)]
    raise ScenarioError(
        f"parallelism.size: {size} {why}; write {'one of ' * (len(fits) > 1)}{', '.join(map(str, fits))}"
    )


def _check_split(spec: ScenarioSpec, num_devices: int) -> None:
    kind, chosen = spec.parallelism.kind, spec.parallelism
    if isinstance(chosen, AfdSpec):
        field, first, where = "attention_devices", chosen.attention_devices, "on the attention devices"
    else:
        assert isinstance(chosen, PdSpec)
        field, first, where = "prefill_devices", chosen.prefill_devices, "first in the one, then in the other pool"
    if num_devices < 2:
        raise ScenarioError(f'parallelism.kind: "{kind}" needs 2 devices, the cluster has 1; write ep, tp or dp')
    if first is not None and first >= num_devices:
        raise ScenarioError(
            f"parallelism.{field}: {first} leaves none of {num_devices} devices; write {num_devices - 1} or less"
        )
    if spec.homes.policy != "balanced":
        raise ScenarioError(
            f'homes.policy: "{spec.homes.policy}" has no meaning under {kind}, where tokens live {where}; leave it out'
        )


def _require_defaults(spec: ScenarioSpec) -> None:
    """Where experts are not spread and tokens do not travel to them, nothing can be said about it."""
    kind = spec.parallelism.kind
    for section in ("placement", "homes", "transmission"):
        default = ScenarioSpec.model_fields[section].default
        for field, value in getattr(spec, section):
            if value != getattr(default, field, None):
                raise ScenarioError(
                    f"{section}.{field}: {show(value)} has no meaning under {kind}, where {_WHY[kind]}; leave it out"
                )


def group_size(chosen: ParallelismSpec, num_devices: int) -> int | None:
    """Return how many devices share each layer of a replica; None where devices are no replicas."""
    if isinstance(chosen, TpSpec):
        return chosen.size or num_devices
    return 1 if isinstance(chosen, DpSpec) else None


def lay_out(spec: ScenarioSpec, model: ModelCard, policy: PlacementPolicy, problem: PlacementProblem) -> Layout:
    """Return the layout of a scenario that `check_parallelism` accepts; `policy` places the experts where it can."""
    num_devices, chosen = problem.num_devices, spec.parallelism
    match chosen:
        case TpSpec() | DpSpec():
            size = group_size(chosen, num_devices)
            assert size is not None
            return _replicas(chosen.kind, size, model.shard(size), problem)
        case AfdSpec():
            attention, experts = _split(num_devices, chosen.attention_devices)
            placement = _place(policy, problem, (experts,))
            homes = HomePlan(prefill_devices=attention, decode_devices=attention)
            text = f"afd, attention on {len(attention)}, experts on {len(experts)}"
        case PdSpec():
            prefill, decode = _split(num_devices, chosen.prefill_devices)
            placement = _place(policy, problem, (prefill, decode))
            homes = HomePlan(prefill_devices=prefill, decode_devices=decode)
            text = f"pd, prefill on {len(prefill)}, decode on {len(decode)}"
        case _:
            placement, text = policy.place(problem), "ep"
            homes = balanced(num_devices)
            if spec.homes.policy == "by_modality":
                homes = by_modality(placement, problem.expert_load_MLE)
    return Layout(description=text, card=model, placement=placement, homes=homes)


def _split(num_devices: int, first: int | None) -> tuple[Devices, Devices]:
    """Return the first and the other devices; half of them, rounded down, where it is not said."""
    devices = np.arange(num_devices, dtype=np.int32)
    first = num_devices // 2 if first is None else first
    return devices[:first], devices[first:]


def _replicas(kind: str, size: int, card: ModelCard, problem: PlacementProblem) -> Layout:
    """Each group holds everything; the placement says so of its first device."""
    num_devices = problem.num_devices
    leaders = np.arange(0, num_devices, size, dtype=np.int32)
    slots_LRX = np.full((problem.num_layers, num_devices, problem.num_experts), -1, np.int32)
    slots_LRX[:, leaders] = np.arange(problem.num_experts)
    groups = f"{len(leaders)} group{'s' if len(leaders) > 1 else ''} of {size}"
    return Layout(
        description=f"tp, {groups}" if kind == "tp" else f"dp, {num_devices} replicas",
        card=card,
        placement=_placement(kind, problem, slots_LRX, np.arange(num_devices) // size),
        homes=HomePlan(prefill_devices=leaders, decode_devices=leaders),
        group_size=size,
    )


def _place(policy: PlacementPolicy, problem: PlacementProblem, pools: tuple[Devices, ...]) -> Placement:
    """Return the placement in which the policy places all experts on each of the pools, and none elsewhere."""
    placed = [policy.place(problem.on_devices(pool)) for pool in pools]
    slots_per_device = max(placement.slots_per_device for placement in placed)
    slots_LRX = np.full((problem.num_layers, problem.num_devices, slots_per_device), -1, np.int32)
    group_R = np.zeros(problem.num_devices, dtype=np.int32)
    for group, (pool, placement) in enumerate(zip(pools, placed, strict=True)):
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

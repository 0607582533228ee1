"""Where experts and requests of a trace would live, and what then crosses between devices: `Spread`, `serve`.

Letters: P phase (prefill, decode), L MoE layers, E experts, R devices, T tokens, Q requests.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.metrics import Phase as PhaseName
from epsim.metrics import TransferCounts
from epsim.placement import POLICIES, HomePlan, Placement, PlacementPolicy, PlacementProblem, balanced, by_modality
from epsim.placement.from_file import FromFile
from epsim.placement.policies import Random
from epsim.placement.predicted_time import PredictedTime
from epsim.trace import Phase, TraceSource
from epsim.traffic import TrafficCounter, count_remote

Counts = npt.NDArray[np.int64]
PHASES: dict[PhaseName, Phase] = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}
_NAMED = [kind for kind in POLICIES if kind not in (FromFile.kind, PredictedTime.kind)]  # without a scenario, no times


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where experts and requests would live: placement is a policy's name or a JSON file; seed is of `random`."""

    num_devices: int = 2
    placement: str = "contiguous"
    homes: str = "by_modality"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise PlacementError(f"devices: {self.num_devices} must be 1 or more")
        if self.homes not in ("by_modality", "balanced"):
            raise PlacementError(f"homes: {self.homes!r} is not one of by_modality, balanced")
        if self.placement not in _NAMED and not Path(self.placement).is_file():
            raise PlacementError(
                f"placement: {self.placement!r} is neither a policy nor a file; write {', '.join(_NAMED)}, "
                "or the path of a JSON file"
            )

    @property
    def policy(self) -> PlacementPolicy:
        """The policy of that name, else the placement in that file."""
        if self.placement == Random.kind:
            return Random(seed=self.seed)
        return POLICIES[self.placement]() if self.placement in _NAMED else FromFile(path=Path(self.placement))

    def place(self, source: TraceSource, load_MLE: Counts) -> tuple[Placement, HomePlan]:
        """Return the placement and the homes, both by the loads of this very trace where they ask for loads."""
        problem = PlacementProblem(
            num_layers=source.meta.num_layers,
            num_experts=source.meta.num_experts,
            node_of_device_R=np.zeros(self.num_devices, np.int32),
            expert_load_MLE=load_MLE,
        )
        placement = self.policy.place(problem)
        homes = balanced(self.num_devices) if self.homes == "balanced" else by_modality(placement, load_MLE)
        return placement, homes


@dataclass(frozen=True, kw_only=True)
class Served:
    """What crosses between devices.

    transfers: the counts of SMoES table S10.
    pairs_PLR: routed pairs that each device serves.
    remote_PL: those of them that come from another device.
    serving_R: the devices that hold experts.
    """

    transfers: TransferCounts
    pairs_PLR: Counts
    remote_PL: Counts
    serving_R: npt.NDArray[np.bool_]


def serve(source: TraceSource, placement: Placement, homes: HomePlan) -> Served:
    """Count what crosses when request q, in the order of ids, lives on the q-th of the home devices, in turn."""
    requests, counter, transfers = source.requests, TrafficCounter(placement), TransferCounts()
    assigned = homes.assign(len(requests))
    home_PQ = np.stack([assigned.prefill_Q, assigned.decode_Q])
    pairs_PLR = np.zeros((len(Phase), placement.num_layers, placement.num_devices), np.int64)
    remote_PL = np.zeros(pairs_PLR.shape[:2], np.int64)
    for batch in source.batches():
        q_T = np.searchsorted(requests.request_id_Q, batch.request_id_T)
        for name, phase in PHASES.items():
            rows = np.flatnonzero(batch.phase_T == phase)
            part = batch if len(rows) == batch.num_tokens else batch.take(rows)
            ids_TLK, home_T = part.topk_expert_ids_TLK, home_PQ[phase][q_T[rows]]
            transfers.add(name, count_remote(ids_TLK, home_T, part.modality_T, placement.device_of_expert_RLE))
            pairs_LRR = counter.count(ids_TLK, home_T).pairs_LCRR.sum(axis=1)
            pairs_PLR[phase] += pairs_LRR.sum(axis=1)
            remote_PL[phase] += pairs_LRR.sum(axis=(1, 2)) - np.trace(pairs_LRR, axis1=1, axis2=2)
    return Served(transfers=transfers, pairs_PLR=pairs_PLR, remote_PL=remote_PL, serving_R=placement.filled_slots_R > 0)

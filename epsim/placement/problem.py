"""What a policy may know, `PlacementProblem`, and what every policy offers, `PlacementPolicy`.

Letters: L MoE layers, E logical experts, P slots, R devices, T tokens, K top-k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.objective import TransferObjective
from epsim.placement.placement import IntArray, Placement
from epsim.trace import Phase, TraceSource
from epsim.trace.statistics import expert_load_by_phase


class LayerClock(Protocol):
    """A predictor of how long one MoE layer takes when its experts are placed in a certain way."""

    def seconds(self, layer: int, device_of_expert_E: npt.NDArray[np.integer]) -> float:
        """Return the predicted time of the layer over the steps that are fitted to, in s."""

    def bound_seconds(self, layer: int) -> float:
        """Return a time that no placement of the layer without replicas can beat, in s."""


@dataclass(frozen=True, kw_only=True)
class PlacementProblem:
    """What a policy may know: the shape, the devices, and the routing to fit to.

    expert_load_MLE: int64 [modality (text, vision), L, E], counts of routed tokens over the whole trace, both phases.
    node_of_device_R: int32 [R].
    trace: the rows to fit to; None where only the loads are known, and policies that need more raise.
    transfer: what a token's transfers cost; None: every remote device costs 1, and tokens live anywhere.
    clock: makes the simulator's time of a layer, for policies that search by it; None where there is none.
    phases: those whose tokens these devices serve.
    """

    num_layers: int
    num_experts: int
    node_of_device_R: IntArray
    expert_load_MLE: npt.NDArray[np.int64]
    trace: TraceSource | None = None
    transfer: TransferObjective | None = None
    clock: Callable[[], LayerClock] | None = None
    phases: tuple[Phase, ...] = tuple(Phase)

    def __post_init__(self) -> None:
        if self.expert_load_MLE.shape != (2, self.num_layers, self.num_experts):
            raise ValueError("expert_load_MLE must have the shape (2, num_layers, num_experts)")
        if self.transfer is not None and self.transfer.num_devices != self.num_devices:
            raise ValueError("transfer must have the costs of these devices")

    @property
    def num_devices(self) -> int:
        return len(self.node_of_device_R)

    @property
    def objective(self) -> TransferObjective:
        """What a token's transfers cost."""
        return self.transfer or TransferObjective.uniform(self.node_of_device_R)

    def on_devices(self, devices: npt.NDArray[np.integer], phases: Sequence[Phase] = tuple(Phase)) -> Self:
        """Return the problem of placing all experts on some of the devices, for the tokens of these phases."""
        transfer = None if self.transfer is None else self.transfer.on_devices(devices, phases)
        return replace(
            self,
            node_of_device_R=self.node_of_device_R[devices],
            transfer=transfer,
            clock=None,
            phases=tuple(phases),
        )

    @cached_property
    def load_LE(self) -> npt.NDArray[np.int64]:
        """How many routed pairs of the phases that are served here chose each expert, int64 [L, E].

        Where only the loads of both phases are known, those.
        """
        if self.phases == tuple(Phase) or self.trace is None:
            return np.asarray(self.expert_load_MLE.sum(axis=0))
        return np.asarray(expert_load_by_phase(self.trace)[list(self.phases)].sum(axis=(0, 1)))

    def require_even_split(self) -> None:
        """Raise PlacementError unless the same number of experts fits on every device without redundant ones."""
        if self.num_experts % self.num_devices:
            raise PlacementError(
                f"placement: {self.num_experts} experts do not divide over {self.num_devices} devices; "
                "use a number of devices that divides the experts, or a placement file with redundant experts"
            )

    def require_trace(self, policy: str) -> TraceSource:
        """Return the trace, or raise PlacementError where a policy needs one and there are only loads."""
        if self.trace is None:
            raise PlacementError(
                f"placement.policy: {policy} needs to know which experts each token chose, and here are only loads; "
                "give it a routing trace, or use a policy of loads, e.g. modality_bins"
            )
        return self.trace

    def placement(self, policy: str, physical_to_logical_LP: npt.NDArray[np.integer]) -> Placement:
        """Return the placement whose slots hold these experts; -1 is an empty slot."""
        return Placement(
            policy=policy,
            num_experts=self.num_experts,
            physical_to_logical_LP=np.ascontiguousarray(physical_to_logical_LP, np.int32),
            node_of_device_R=self.node_of_device_R,
        )


class PlacementPolicy(Protocol):
    """What every policy offers."""

    kind: ClassVar[str]

    def place(self, problem: PlacementProblem) -> Placement: ...

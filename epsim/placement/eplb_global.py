"""`EplbGlobal`: DeepSeek's expert-parallel load balancer (deepseek-ai/EPLB), its policy for all devices at once."""

from typing import ClassVar

from epsim.placement.eplb_packing import count_slots, replicate_and_pack
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem


class EplbGlobal:
    """Copies loaded experts and balances devices, whatever the nodes: EPLB's policy for decode on many devices.

    In each layer, by the loads of the whole trace:
    1. replicate: each of the redundant slots goes to the expert whose copies carry most (its load / its copies);
    2. pack: the copies, heaviest first, each go to the device with the least load that has a slot left.
    Ties: the lower expert, copy or device number. Two copies of an expert may meet on a device, as in EPLB.

    redundant_experts: slots beyond one per expert; all together must divide over the devices.
    """

    kind: ClassVar[str] = "eplb_global"

    def __init__(self, *, redundant_experts: int = 0) -> None:
        self.redundant_experts = redundant_experts

    def place(self, problem: PlacementProblem) -> Placement:
        """Raise PlacementError where the slots do not divide over the devices."""
        num_slots = count_slots(problem, self.redundant_experts)
        load_LE = problem.load_LE.astype(float)
        return problem.placement(self.kind, replicate_and_pack(load_LE, num_slots, problem.num_devices))

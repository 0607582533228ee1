"""`replicated`: copies of experts in spare slots, chosen by the transfer that they save.

Letters: E experts, R devices, S sources (here the devices too), N nodes, F phase (prefill, decode), T tokens, K top-k,
P slots, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numba
import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.balanced_coactivation import BalancedCoactivation
from epsim.placement.coactivation import Coactivation
from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.placement import IntArray, Placement, choose_replica, nearness_RR
from epsim.placement.policies import Contiguous, ModalityBins, RoundRobin
from epsim.placement.problem import PlacementPolicy, PlacementProblem

BASES: dict[str, type[PlacementPolicy]] = {
    base.kind: base for base in (Contiguous, RoundRobin, ModalityBins, Coactivation, BalancedCoactivation)
}

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Int32s = npt.NDArray[np.int32]


class Replicated:
    """A base placement, and in `spare_slots` more slots of each device copies that lower `TransferObjective.cost_L`.

    Layer by layer, greedily: of all (expert, device) that are left, the copy that lowers the cost most, given the
    copies before it and `Placement`'s rule of which replica a source takes; of equal ones the expert that is chosen
    more often, then the lower expert, then the lower device. A copy can raise the cost: sources on a third device may
    take it instead of one that shares its device with other experts of a token. Slots are filled all the same, as
    engines need them, so where every copy left for a device is a loss the cost can end above that of the base. On 2
    devices none is: there a copy changes only where its own device sends tokens, to itself, which costs nothing.

    Raises PlacementError where tokens live on other devices than the experts, so that no replica is a source's own.
    """

    kind: ClassVar[str] = "replicated"

    def __init__(self, *, base: str = Coactivation.kind, spare_slots: int = 1, max_tokens: int = 8192) -> None:
        self.base = BASES[base]()
        self.spare_slots = spare_slots
        self.max_tokens = max_tokens

    def place(self, problem: PlacementProblem) -> Placement:
        trace, objective, num_devices = problem.require_trace(self.kind), problem.objective, problem.num_devices
        if objective.home_share_FS.shape[1] != num_devices:
            raise PlacementError(
                "placement.policy: replicated needs tokens to live on the devices that hold experts, and under "
                f"parallelism.kind afd or pd they do not; write another policy, e.g. {self.base.kind}"
            )
        base = self.base.place(problem)
        most = problem.num_experts - base.slots_per_device
        if self.spare_slots > most:
            raise PlacementError(
                f"placement.spare_slots: {self.spare_slots} is above {most}, where every device has all of the "
                f"{problem.num_experts} experts; write {most} or less"
            )
        tokens = objective.charged(FitTokens.of(trace, self.max_tokens))
        slots_LRX = np.empty((problem.num_layers, num_devices, base.slots_per_device + self.spare_slots), np.int32)
        slots_LRX[:, :, : base.slots_per_device] = base.physical_to_logical_LP.reshape(len(slots_LRX), num_devices, -1)
        num_filled_LR = np.full((problem.num_layers, num_devices), base.slots_per_device)
        for layer, device_of_expert_E in enumerate(base.device_of_expert_RLE[0]):
            state = CopyState.of(
                tokens.ids_LTK[layer], tokens.phase_T, objective, device_of_expert_E, num_experts=problem.num_experts
            )
            for expert, device, _ in state.copies(self.spare_slots):
                slots_LRX[layer, device, num_filled_LR[layer, device]] = expert
                num_filled_LR[layer, device] += 1
        return problem.placement(self.kind, slots_LRX.reshape(problem.num_layers, -1))


@dataclass(kw_only=True, eq=False)
class CopyState:
    """Who holds which expert of a layer, and what every further copy would change. It changes with each copy.

    tokens_of_expert: the tokens of each expert, ascending. chosen_SE: the device that a source takes for an expert.
    device_met_ESR, node_met_ESN: of the tokens of expert e that live on s, how many (expected) touch that device, or
    node, by another of their experts: what e adds there costs them nothing more.
    """

    ids_TK: npt.NDArray[np.integer]
    phase_T: npt.NDArray[np.uint8]
    objective: TransferObjective
    tokens_of_expert: list[npt.NDArray[np.int64]]
    num_tokens_ES: Floats
    holds_ER: Bools
    chosen_SE: Int32s
    device_met_ESR: Floats
    node_met_ESN: Floats
    num_copies_R: npt.NDArray[np.int64] = field(init=False)
    nearness_SR: IntArray = field(init=False)

    def __post_init__(self) -> None:
        self.nearness_SR = nearness_RR(self.objective.node_of_device_R)
        self.num_copies_R = np.zeros(self.objective.num_devices, np.int64)

    @classmethod
    def of(
        cls,
        ids_TK: npt.NDArray[np.integer],
        phase_T: npt.NDArray[np.uint8],
        objective: TransferObjective,
        device_of_expert_E: Int32s,
        *,
        num_experts: int,
    ) -> "CopyState":
        """Return the state in which every expert is on one device."""
        num_sources, num_nodes = objective.node_cost_SN.shape
        token_of_pair = np.argsort(ids_TK.reshape(-1), kind="stable") // ids_TK.shape[1]
        load_E = np.bincount(ids_TK.reshape(-1), minlength=num_experts)
        load_FE = np.stack([np.bincount(ids_TK[phase_T == f].reshape(-1), minlength=num_experts) for f in (0, 1)])
        state = cls(
            ids_TK=ids_TK,
            phase_T=phase_T,
            objective=objective,
            tokens_of_expert=np.split(token_of_pair, np.cumsum(load_E)[:-1]),
            num_tokens_ES=load_FE.T @ objective.home_share_FS,
            holds_ER=device_of_expert_E[:, None] == np.arange(objective.num_devices),
            chosen_SE=np.tile(device_of_expert_E, (num_sources, 1)),
            device_met_ESR=np.zeros((num_experts, num_sources, objective.num_devices)),
            node_met_ESN=np.zeros((num_experts, num_sources, num_nodes)),
        )
        for source in range(num_sources):
            state._add(np.arange(len(ids_TK)), source, 1.0)
        return state

    @property
    def change_ER(self) -> Floats:
        """What a copy of an expert on a device changes of the cost of all tokens; infinite where it is already."""
        return np.asarray(
            _changes(
                self.holds_ER,
                self.chosen_SE,
                self.num_tokens_ES,
                self.device_met_ESR,
                self.node_met_ESN,
                self.objective.device_cost_SR,
                self.objective.node_cost_SN,
                self.objective.node_of_device_R,
                self.nearness_SR,
            )
        )

    def copies(self, spare_slots: int) -> Iterator[tuple[int, int, float]]:
        """Fill the spare slots of every device; yield the expert and the device of each copy, and what it changes."""
        by_load_E = np.argsort([-len(tokens) for tokens in self.tokens_of_expert], kind="stable")
        while (self.num_copies_R < spare_slots).any():
            change_ER = np.where(self.num_copies_R < spare_slots, self.change_ER, np.inf)
            # sums of shares differ in their last digits where they are equal on paper
            place, device = np.unravel_index(np.argmin(change_ER[by_load_E].round(9)), change_ER.shape)
            expert = int(by_load_E[place])
            yield expert, int(device), float(change_ER[expert, device])
            self.copy(expert, int(device))

    def copy(self, expert: int, device: int) -> None:
        """Put a copy of the expert on the device."""
        self.holds_ER[expert, device] = True
        self.num_copies_R[device] += 1
        holders = np.flatnonzero(self.holds_ER[expert])
        for source in range(len(self.chosen_SE)):
            chosen = holders[choose_replica(holders, len(holders), source, self.nearness_SR[source])]
            if chosen != self.chosen_SE[source, expert]:
                self._add(self.tokens_of_expert[expert], source, -1.0)
                self.chosen_SE[source, expert] = chosen
                self._add(self.tokens_of_expert[expert], source, 1.0)

    def _add(self, tokens: npt.NDArray[np.int64], source: int, sign: float) -> None:
        """Add, or take away, what these tokens touch when they live on a source."""
        if (share_F := sign * self.objective.home_share_FS[:, source]).any():
            _add_met(
                self.ids_TK,
                self.phase_T,
                tokens,
                share_F,
                self.chosen_SE[source],
                self.objective.node_of_device_R,
                self.device_met_ESR[:, source],
                self.node_met_ESN[:, source],
            )


@numba.njit(cache=True, nogil=True)
def _changes(  # type: ignore[no-untyped-def]
    holds_ER,
    chosen_SE,
    num_tokens_ES,
    device_met_ESR,
    node_met_ESN,
    device_cost_SR,
    node_cost_SN,
    node_of_device_R,
    nearness_SR,
):
    """Return `CopyState.change_ER`."""
    num_experts, num_devices = holds_ER.shape
    change_ER = np.full((num_experts, num_devices), np.inf)
    holders = np.empty(num_devices, np.int64)
    for e in range(num_experts):
        for d in range(num_devices):
            if holds_ER[e, d]:
                continue
            num_holders = 0
            for r in range(num_devices):
                if holds_ER[e, r] or r == d:
                    holders[num_holders] = r
                    num_holders += 1
            change = 0.0
            for s in range(len(chosen_SE)):
                old, new = chosen_SE[s, e], holders[choose_replica(holders, num_holders, s, nearness_SR[s])]
                if old == new:
                    continue
                tokens, old_node, new_node = num_tokens_ES[e, s], node_of_device_R[old], node_of_device_R[new]
                change += (tokens - device_met_ESR[e, s, new]) * device_cost_SR[s, new]
                change += (tokens - node_met_ESN[e, s, new_node]) * node_cost_SN[s, new_node]
                change -= (tokens - device_met_ESR[e, s, old]) * device_cost_SR[s, old]
                change -= (tokens - node_met_ESN[e, s, old_node]) * node_cost_SN[s, old_node]
            change_ER[e, d] = change
    return change_ER


@numba.njit(cache=True, nogil=True)
def _add_met(  # type: ignore[no-untyped-def]
    ids_TK, phase_T, tokens, share_F, chosen_E, node_of_device_R, device_met_ER, node_met_EN
):
    """Add to each expert the shares of its tokens whose other experts touch a device, or a node."""
    topk = ids_TK.shape[1]
    on_device_R = np.zeros(device_met_ER.shape[1], np.int64)
    on_node_N = np.zeros(node_met_EN.shape[1], np.int64)
    for t in tokens:
        share = share_F[phase_T[t]]
        if share == 0.0:
            continue
        for k in range(topk):
            device = chosen_E[ids_TK[t, k]]
            on_device_R[device] += 1
            on_node_N[node_of_device_R[device]] += 1
        for k in range(topk):
            expert = ids_TK[t, k]
            own, own_node = chosen_E[expert], node_of_device_R[chosen_E[expert]]
            for device in range(len(on_device_R)):
                if on_device_R[device] > (device == own):
                    device_met_ER[expert, device] += share
            for node in range(len(on_node_N)):
                if on_node_N[node] > (node == own_node):
                    node_met_EN[expert, node] += share
        on_device_R[:] = 0
        on_node_N[:] = 0

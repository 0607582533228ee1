"""`exact`: the placement of least expected transfer, proved by integer programming, for small cases.

One problem per layer. Letters: E experts, R devices, N nodes, T tokens, K top-k, S different expert sets, U touches
(of a device or a node by an expert set), V variables, C constraints, F phase (prefill, decode).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from epsim.errors import PlacementError
from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.placement import IntArray, Placement
from epsim.placement.problem import PlacementProblem

MAX_VARIABLES = 10_000
TIME_LIMIT_STATUS = 1  # of scipy.optimize.milp
_HINT = "use placement.policy: coactivation, which searches without a proof"

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Exact:
    """The assignment, as many experts on each device, that minimises `TransferObjective.cost_L` on the fitted tokens.

    An integer program per layer (HiGHS, by scipy.optimize.milp). Raises PlacementError where a program would have more
    than MAX_VARIABLES variables, or where `time_limit` (s, per layer) ends before the optimum is proved. A proof is
    as exact as HiGHS: to 1e-6 of the dearest transfer of one vector, summed over the tokens of a layer.
    """

    kind: ClassVar[str] = "exact"

    def __init__(self, *, time_limit: float = 60.0, max_tokens: int = 8192) -> None:
        self.time_limit = time_limit
        self.max_tokens = max_tokens

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        tokens = problem.objective.charged(FitTokens.of(problem.require_trace(self.kind), self.max_tokens))
        device_of_expert_LE = []
        for layer, ids_TK in enumerate(tokens.ids_LTK):
            program = _Program.of(ids_TK, tokens.phase_T, problem.objective, problem.num_experts)
            if program.num_variables > MAX_VARIABLES:
                raise PlacementError(
                    f"placement.policy: exact would have {program.num_variables} variables in layer {layer}, "
                    f"from {problem.num_experts} experts, {problem.num_devices} devices and {len(program.sets_SK)} "
                    f"different expert sets; the most are {MAX_VARIABLES}; {_HINT}"
                )
            device_of_expert_LE.append(self._solve(program, layer))
        return problem.placement(self.kind, np.argsort(device_of_expert_LE, axis=1, kind="stable"))

    def _solve(self, program: "_Program", layer: int) -> IntArray:
        from scipy.optimize import Bounds, LinearConstraint, milp  # here: slow to load

        matrix_CV, least_C, most_C = program.constraints()
        answer = milp(
            program.cost_V,
            integrality=program.is_integer_V,
            bounds=Bounds(0, program.upper_V),
            constraints=LinearConstraint(matrix_CV, least_C, most_C),
            options={"time_limit": self.time_limit, "mip_rel_gap": 0.0},
        )
        if answer.status == TIME_LIMIT_STATUS:
            left = "" if answer.x is None else f", of which at most {100 * answer.mip_gap:.2g} % could be saved"
            found = f"{'no' if answer.x is None else 'a'} placement{left}"
            raise PlacementError(
                f"placement.time_limit: {self.time_limit:g} s ended with {found}, before the optimum of layer "
                f"{layer} was proved; write more, or {_HINT}"
            )
        if not answer.success:
            raise PlacementError(f"placement.policy: exact failed in layer {layer}: {answer.message}; {_HINT}")
        return program.device_of_expert(answer.x)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Program:
    """The integer program of one layer: x[e, d], expert e is on device d; then a variable per touch that costs.

    Tokens of the same expert set touch the same devices, so only the sets are told apart. Touches are continuous: with
    x they are 0 or 1 at an optimum.

    sets_SK: experts, ascending. set_U: the set of each touch; the first `num_y` are touches of devices, the others of
    nodes. is_on_UR: the devices that a touch is of. cost_U: what the tokens of the set together pay for it.
    rank_R: which number a device has among those that are interchangeable with it.
    """

    num_experts: int
    sets_SK: Ints
    set_U: Ints
    num_y: int
    is_on_UR: npt.NDArray[np.bool_]
    cost_U: Floats
    rank_R: Ints

    @classmethod
    def of(
        cls,
        ids_TK: npt.NDArray[np.integer],
        phase_T: npt.NDArray[np.uint8],
        objective: TransferObjective,
        num_experts: int,
    ) -> "_Program":
        sets_SK, set_T = np.unique(np.sort(ids_TK.astype(np.int64), axis=1), axis=0, return_inverse=True)
        count_SF = np.zeros((len(sets_SK), 2))
        np.add.at(count_SF, (set_T.reshape(-1), phase_T), 1)
        device_cost_SR = count_SF @ objective.device_cost_FR
        node_cost_SN = count_SF @ objective.node_cost_FN
        set_Y, device_Y = np.nonzero(device_cost_SR)
        set_Z, node_Z = np.nonzero(node_cost_SN)
        is_y_on_YR = device_Y[:, None] == np.arange(objective.num_devices)
        is_z_on_ZR = node_Z[:, None] == objective.node_of_device_R
        return cls(
            num_experts=num_experts,
            sets_SK=sets_SK,
            set_U=np.concatenate([set_Y, set_Z]),
            num_y=len(set_Y),
            is_on_UR=np.concatenate([is_y_on_YR, is_z_on_ZR]),
            cost_U=np.concatenate([device_cost_SR[set_Y, device_Y], node_cost_SN[set_Z, node_Z]]),
            rank_R=_rank_among_equals(objective, count_SF.sum(axis=0) > 0),
        )

    @property
    def num_devices(self) -> int:
        return len(self.rank_R)

    @property
    def num_x(self) -> int:
        return self.num_experts * self.num_devices

    @property
    def num_variables(self) -> int:
        return self.num_x + len(self.set_U)

    @property
    def cost_V(self) -> Floats:
        return np.concatenate([np.zeros(self.num_x), self.cost_U])

    @property
    def is_integer_V(self) -> npt.NDArray[np.bool_]:
        return np.arange(self.num_variables) < self.num_x

    @property
    def upper_V(self) -> Floats:
        """1; 0 where symmetry keeps an expert off a device.

        Interchangeable devices are ordered by their lowest experts, so number i of them (from 0) has none below i.
        """
        may_hold_ER = np.arange(self.num_experts)[:, None] >= self.rank_R
        return np.concatenate([may_hold_ER.reshape(-1), np.ones(len(self.set_U))]).astype(np.float64)

    def constraints(self) -> tuple[Any, Floats, Floats]:
        """Return a sparse matrix [C, V], and the least and the most that each of its rows may be, float64 [C]."""
        from scipy.sparse import coo_array, vstack  # here: slow to load

        num_sets, topk = self.sets_SK.shape
        per_device = self.num_experts // self.num_devices
        expert, device = (ids_ER.reshape(-1) for ids_ER in np.indices((self.num_experts, self.num_devices)))
        x, u = np.arange(self.num_x), np.arange(len(self.set_U))
        touch, k, on = np.nonzero(np.repeat(self.is_on_UR[:, None], topk, axis=1))
        touched_x = self.sets_SK[self.set_U[touch], k] * self.num_devices + on

        def rows(row: Ints, column: Ints, value: Floats, num_rows: int) -> Any:
            return coo_array((value, (row, column)), shape=(num_rows, self.num_variables))

        covered = rows(  # u >= sum over its devices of x, for each expert of its set
            np.concatenate([np.arange(len(u) * topk), touch * topk + k]),
            np.concatenate([self.num_x + np.repeat(u, topk), touched_x]),
            np.concatenate([np.ones(len(u) * topk), np.full(len(touch), -1.0)]),
            len(u) * topk,
        )
        set_Y = self.set_U[: self.num_y]
        num_free_S = self.num_devices - np.bincount(set_Y, minlength=num_sets)  # touches without a variable
        # implied, but only with the integers: K experts do not fit on fewer devices
        touched = rows(set_Y, self.num_x + u[: self.num_y], np.ones(self.num_y), num_sets)
        blocks = [
            (rows(expert, x, np.ones(len(x)), self.num_experts), 1.0, 1.0),
            (rows(device, x, np.ones(len(x)), self.num_devices), per_device, per_device),
            (covered, 0.0, np.inf),
            (touched, -(-topk // per_device) - num_free_S, np.inf),
        ]
        least, most = ([np.broadcast_to(block[i], block[0].shape[0]) for block in blocks] for i in (1, 2))
        return vstack([block[0] for block in blocks], format="csr"), np.concatenate(least), np.concatenate(most)

    def device_of_expert(self, solution_V: Floats) -> IntArray:
        """Return the device of each expert in a solution, int32 [E]."""
        device_E = solution_V[: self.num_x].reshape(-1, self.num_devices).argmax(axis=1)
        return np.asarray(device_E, dtype=np.int32)


def _rank_among_equals(objective: TransferObjective, has_tokens_F: npt.NDArray[np.bool_]) -> Ints:
    """Return for each device how many before it cost the same in all phases with tokens and are, if that costs, in
    the same node."""
    keys_XR = np.round(objective.device_cost_FR * has_tokens_F[:, None], 12)
    if (objective.node_cost_FN * has_tokens_F[:, None]).any():
        keys_XR = np.vstack([keys_XR, objective.node_of_device_R])
    equal_RR = (keys_XR[:, :, None] == keys_XR[:, None]).all(axis=0)
    return np.asarray(np.tril(equal_RR, -1).sum(axis=1), dtype=np.int64)

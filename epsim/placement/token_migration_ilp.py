"""`solve_exactly`: the integer program of `token_migration`, by HiGHS (scipy), for small cases.

x[l, e, r] = 1 where device r holds expert e of layer l. A path is what a token does in one layer: the primary expert
of the layer before, if there is one, and the experts of this one; n tokens share it. With d[path, r] >= x of each of
its experts and h[path, r] <= x of the primary before and <= the sum of x of its experts,

    minimise sum of n (touch cost * sum over r of d - sum over r of h)

which is `MigrationCost` times the tokens, but for a constant. d and h need not be declared whole: for whole x their
best values are. Devices are alike, so expert 0 of layer 0 is put on device 0.
"""

from typing import Any

import numpy as np

from epsim.errors import PlacementError
from epsim.placement.exact import TIME_LIMIT_STATUS
from epsim.placement.migration_cost import Devices, Floats, MigrationCost

MAX_BINARIES = 64  # 4 layers of 8 experts on 2 devices take a second to a minute, on 4 devices more than two minutes
MAX_VARIABLES = 20_000
TIME_LIMIT_S = 120.0


def solve_exactly(cost: MigrationCost) -> Devices:
    """Return the device of each expert, [L, E], of a placement of least cost.

    Raises PlacementError where the case is too large, or is not solved, in TIME_LIMIT_S or at all.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here: slow to load

    program = _Program(cost)
    shape = cost.num_layers, cost.num_experts, cost.num_devices
    if program.num_binaries > MAX_BINARIES or program.num_variables > MAX_VARIABLES:
        raise PlacementError(
            f"placement.method: ilp would have {program.num_binaries} binary and {program.num_variables} variables in "
            f"all, the most are {MAX_BINARIES} and {MAX_VARIABLES}; write sweep, or give it fewer layers, experts, "
            "devices or tokens (placement.max_tokens)"
        )
    matrix, lower, upper = program.constraints()
    least = np.zeros(program.num_variables)
    least[0] = 1.0  # expert 0 of layer 0 on device 0
    result = milp(
        program.objective(),
        constraints=LinearConstraint(matrix, lower, upper),
        integrality=np.arange(program.num_variables) < program.num_binaries,
        bounds=Bounds(least, 1.0),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 0.0},
    )
    if result.status == TIME_LIMIT_STATUS:
        raise PlacementError(
            f"placement.method: ilp was not solved in {TIME_LIMIT_S:.0f} s; write sweep, or give it a smaller case"
        )
    if not result.success:
        raise PlacementError(f"placement.method: ilp failed: {result.message}; write sweep")
    x_LER = result.x[: program.num_binaries].reshape(shape)
    return np.asarray(x_LER.argmax(axis=2), dtype=np.int32)


class _Program:
    """Variables in this order: x [L, E, R], then for each path d [R], then for each path h [R]."""

    def __init__(self, cost: MigrationCost) -> None:
        self._cost = cost
        self._paths: list[tuple[int, int, tuple[int, ...]]] = []  # layer, primary of the layer before, experts
        num_tokens: list[int] = []
        for layer, ids_TK in enumerate(cost.ids_LTK.astype(np.int64)):
            before_T = np.full(len(ids_TK), -1) if layer == 0 else cost.ids_LTK[layer - 1, :, 0].astype(np.int64)
            rows = np.column_stack([before_T, np.sort(ids_TK, axis=1)])
            for (before, *experts), count in zip(*np.unique(rows, axis=0, return_counts=True), strict=True):
                self._paths.append((layer, int(before), tuple(map(int, experts))))
                num_tokens.append(int(count))
        self._tokens_of_path = np.array(num_tokens, dtype=np.float64)

    @property
    def num_binaries(self) -> int:
        return self._cost.num_layers * self._cost.num_experts * self._cost.num_devices

    @property
    def num_variables(self) -> int:
        return self.num_binaries + 2 * len(self._paths) * self._cost.num_devices

    def objective(self) -> Floats:
        touch_cost = self._cost.touch_cost_L[[layer for layer, _, _ in self._paths]] * self._tokens_of_path
        saved = self._tokens_of_path * [before >= 0 for _, before, _ in self._paths]
        per_path = np.repeat(np.concatenate([touch_cost, -saved]), self._cost.num_devices)
        return np.concatenate([np.zeros(self.num_binaries), per_path])

    def constraints(self) -> tuple[Any, Floats, Floats]:
        """Return a sparse matrix and the bounds of its rows."""
        from scipy.sparse import coo_array

        num_experts, num_devices = self._cost.num_experts, self._cost.num_devices
        x = np.arange(self.num_binaries).reshape(-1, num_experts, num_devices)
        d, h = np.arange(self.num_binaries, self.num_variables).reshape(2, -1, num_devices)
        # The columns of each row with their values, and its bounds.
        rows: list[tuple[dict[int, float], float, float]] = []
        for x_ER in x:
            rows += [(dict.fromkeys(x_R.tolist(), 1.0), 1.0, 1.0) for x_R in x_ER]
            equal = num_experts / num_devices
            rows += [(dict.fromkeys(x_E.tolist(), 1.0), equal, equal) for x_E in x_ER.T]
        for path, (layer, before, experts) in enumerate(self._paths):
            for r in range(num_devices):
                own = x[layer, list(experts), r].tolist()
                rows += [({int(d[path, r]): 1.0, column: -1.0}, 0.0, np.inf) for column in own]
                if before >= 0:
                    rows.append(({int(h[path, r]): 1.0, int(x[layer - 1, before, r]): -1.0}, -np.inf, 0.0))
                    rows.append(({int(h[path, r]): 1.0} | dict.fromkeys(own, -1.0), -np.inf, 0.0))
        columns = [column for entries, _, _ in rows for column in entries]
        values = [value for entries, _, _ in rows for value in entries.values()]
        lines = np.repeat(np.arange(len(rows)), [len(entries) for entries, _, _ in rows])
        matrix = coo_array((values, (lines, columns)), shape=(len(rows), self.num_variables)).tocsr()
        return matrix, np.array([low for _, low, _ in rows]), np.array([high for _, _, high in rows])

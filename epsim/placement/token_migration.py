"""`TokenMigration`: experts of consecutive layers put together for tokens that stay where their first expert was.

The mode is `epsim.migration`'s, the cost `MigrationCost`'s. The idea of placing by the affinity of consecutive layers,
and of an integer program for it, is ExFlow's (Yao et al., IPDPS 2024, arXiv:2401.08383), for one expert per token and
layer, the program split in two by two devices where it is too large. Letters: L MoE layers, E experts, R devices.
"""

from typing import ClassVar, Literal

import numpy as np

from epsim.placement.migration_cost import Devices, MigrationCost
from epsim.placement.objective import FitTokens
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem
from epsim.placement.token_migration_ilp import solve_exactly
from epsim.trace.primary import primary_first


class TokenMigration:
    """Fewest hidden vectors that cross per migrating token, with as many experts on each device.

    method: "sweep", a search from `starts` placements (contiguous, then random ones by `seed`), each with and without
    sweeps of assignments first: the best names of devices, then swaps of pairs until none helps; "ilp", an exact
    optimum of small cases by HiGHS. max_tokens: how many tokens, evenly spaced over the trace, it is fitted to.
    Loads are not evened out, and costs of links not told apart.
    """

    kind: ClassVar[str] = "token_migration"

    def __init__(
        self, *, method: Literal["sweep", "ilp"] = "sweep", starts: int = 2, seed: int = 0, max_tokens: int = 5_000
    ) -> None:
        self.method = method
        self.starts = starts
        self.seed = seed
        self.max_tokens = max_tokens

    def place(self, problem: PlacementProblem) -> Placement:
        problem.require_even_split()
        cost = MigrationCost(
            ids_LTK=self._tokens(problem).ids_LTK, num_experts=problem.num_experts, num_devices=problem.num_devices
        )
        device_LE = solve_exactly(cost) if self.method == "ilp" else self._search(cost)
        return problem.placement(self.kind, np.argsort(device_LE, axis=1, kind="stable"))

    def _tokens(self, problem: PlacementProblem) -> FitTokens:
        """Return the tokens to fit to: those of the phases that come to these devices."""
        tokens = FitTokens.of(problem.require_trace(self.kind), self.max_tokens, primary_first)
        comes = np.flatnonzero(problem.objective.home_share_FS.sum(axis=1))
        own_T = np.isin(tokens.phase_T, comes)
        return FitTokens(ids_LTK=tokens.ids_LTK[:, own_T], phase_T=tokens.phase_T[own_T])

    def _search(self, cost: MigrationCost) -> Devices:
        """Return the best of what the starts lead to; never worse than contiguous, the first start."""
        rng = np.random.default_rng(self.seed)
        slots_per_device = cost.num_experts // cost.num_devices
        contiguous_LE = np.tile(np.arange(cost.num_experts, dtype=np.int32) // slots_per_device, (cost.num_layers, 1))
        candidates = [contiguous_LE]
        for start in range(self.starts):
            begin_LE = contiguous_LE if start == 0 else rng.permuted(contiguous_LE, axis=1)
            begins = begin_LE, cost.assigned(begin_LE)  # swaps alone end elsewhere, at times lower
            candidates += [cost.relabelled(cost.swapped(cost.relabelled(device_LE))) for device_LE in begins]
        return min(candidates, key=cost.of)

"""`BalancedCoactivation`: `Coactivation` under a cap on the load of each device."""

from typing import ClassVar

from epsim.placement.layer_search import SearchOptions, search_placement
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem


class BalancedCoactivation:
    """Minimises what `Coactivation` does while no device serves more than `max_load` times the mean of its layer.

    A device's load is the number of routed pairs of the trace that its experts serve. In a layer where the search finds
    no such assignment (an expert alone may be above the cap), the cap is the least that it finds.

    max_load: 1 or more, of the mean. The others as for `Coactivation`.
    """

    kind: ClassVar[str] = "balanced_coactivation"

    def __init__(
        self,
        *,
        max_load: float = 1.1,
        starts: int = 4,
        rounds: float = 8.0,
        search_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        self.max_load = max_load
        self.options = SearchOptions(starts=starts, rounds=rounds, search_tokens=search_tokens, seed=seed)

    def place(self, problem: PlacementProblem) -> Placement:
        found_LP = search_placement(problem, self.kind, self.options, max_load=self.max_load)
        return problem.placement(self.kind, found_LP)

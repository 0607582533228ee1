"""`Coactivation`: experts that are chosen together go to the same device."""

from typing import ClassVar

from epsim.placement.layer_search import SearchOptions, search_placement
from epsim.placement.placement import Placement
from epsim.placement.problem import PlacementProblem


class Coactivation:
    """Minimises what a token pays for the devices that it touches, under dedup, with equal experts per device.

    The objective is `TransferObjective.cost_L` on the tokens of the trace: the mean number of remote devices where all
    links are alike and tokens live anywhere; where homes follow the modality, devices that are homes cost less to their
    phase. With node-level dedup the experts are first spread over nodes by what those cost, then inside each over its
    devices. The search is by swaps from several starts (`swap_search`). Grouping co-activated experts to save
    communication: MoETuner (Go and Mahajan, 2025) and Occult (Luo et al., 2025) pose it with other objectives.

    starts: assignments to search from. rounds: swaps per expert from each. search_tokens: see `SearchOptions`.
    """

    kind: ClassVar[str] = "coactivation"

    def __init__(self, *, starts: int = 4, rounds: float = 8.0, search_tokens: int = 16384, seed: int = 0) -> None:
        self.options = SearchOptions(starts=starts, rounds=rounds, search_tokens=search_tokens, seed=seed)

    def place(self, problem: PlacementProblem) -> Placement:
        return problem.placement(self.kind, search_placement(problem, self.kind, self.options))

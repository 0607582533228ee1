"""Expert placements: `Placement`, the policies in `POLICIES` that make one, and the homes of tokens."""

from epsim.placement.eplb_global import EplbGlobal
from epsim.placement.eplb_hierarchical import EplbHierarchical
from epsim.placement.from_file import FromFile
from epsim.placement.homes import HomePlan, Homes, balanced, by_modality
from epsim.placement.placement import Placement
from epsim.placement.policies import (
    Contiguous,
    ModalityBins,
    PlacementPolicy,
    PlacementProblem,
    Random,
    RoundRobin,
)

POLICIES: dict[str, type[PlacementPolicy]] = {
    policy.kind: policy
    for policy in (Contiguous, RoundRobin, Random, ModalityBins, EplbHierarchical, EplbGlobal, FromFile)
}

__all__ = [
    "POLICIES",
    "HomePlan",
    "Homes",
    "Placement",
    "PlacementPolicy",
    "PlacementProblem",
    "balanced",
    "by_modality",
]

"""Expert placements: `Placement`, the policies in `POLICIES` that make one, and the homes of tokens."""

from epsim.placement.from_file import FromFile
from epsim.placement.homes import HomePlan, Homes, balanced, by_modality, expected_by_modality
from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.placement import Placement
from epsim.placement.policies import Contiguous, ModalityBins, Random, RoundRobin
from epsim.placement.predicted_time import PredictedTime
from epsim.placement.problem import LayerClock, PlacementPolicy, PlacementProblem

POLICIES: dict[str, type[PlacementPolicy]] = {
    policy.kind: policy for policy in (Contiguous, RoundRobin, Random, ModalityBins, FromFile, PredictedTime)
}

__all__ = [
    "POLICIES",
    "FitTokens",
    "HomePlan",
    "Homes",
    "LayerClock",
    "Placement",
    "PlacementPolicy",
    "PlacementProblem",
    "TransferObjective",
    "balanced",
    "by_modality",
    "expected_by_modality",
]

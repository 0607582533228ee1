"""Expert placements: `Placement`, the policies in `POLICIES` that make one, and the homes of tokens."""

from epsim.placement.balanced_coactivation import BalancedCoactivation
from epsim.placement.coactivation import Coactivation
from epsim.placement.eplb_global import EplbGlobal
from epsim.placement.eplb_hierarchical import EplbHierarchical
from epsim.placement.exact import Exact
from epsim.placement.from_file import FromFile
from epsim.placement.homes import HomePlan, Homes, balanced, by_modality, expected_by_modality
from epsim.placement.objective import FitTokens, TransferObjective
from epsim.placement.placement import Placement
from epsim.placement.policies import Contiguous, ModalityBins, Random, RoundRobin
from epsim.placement.predicted_time import PredictedTime
from epsim.placement.problem import LayerClock, PlacementPolicy, PlacementProblem
from epsim.placement.replicated import Replicated
from epsim.placement.token_migration import TokenMigration

POLICIES: dict[str, type[PlacementPolicy]] = {
    policy.kind: policy
    for policy in (
        Contiguous,
        RoundRobin,
        Random,
        ModalityBins,
        Coactivation,
        BalancedCoactivation,
        PredictedTime,
        EplbHierarchical,
        EplbGlobal,
        Replicated,
        TokenMigration,
        Exact,
        FromFile,
    )
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

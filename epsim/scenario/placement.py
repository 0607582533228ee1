"""The `placement` section of a scenario: `PlacementSpec`, a spec for each policy."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from epsim.scenario.base import NonNegativeInt, PositiveInt, Seed, StrictModel, Time

Base = Literal["contiguous", "round_robin", "modality_bins", "coactivation", "balanced_coactivation"]
SearchStart = Literal["contiguous", "modality_bins", "coactivation", "balanced_coactivation"]


class ContiguousSpec(StrictModel):
    """Experts in the order of their ids."""

    policy: Literal["contiguous"] = "contiguous"


class RoundRobinSpec(StrictModel):
    """Expert e on device e mod R."""

    policy: Literal["round_robin"]


class RandomSpec(StrictModel):
    """A random permutation per layer."""

    policy: Literal["random"]
    seed: Seed = 0


class ModalityBinsSpec(StrictModel):
    """SMoES binning: experts sorted by text bias, cut into `num_bins` (default: one per device), put on devices.

    With `momentum`, the bias is of moving averages over batches of `batch_requests` requests (default: 1).
    """

    policy: Literal["modality_bins"]
    num_bins: PositiveInt | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    batch_requests: PositiveInt | None = None

    @model_validator(mode="after")
    def _batches_are_of_momentum(self) -> Self:
        if self.batch_requests is not None and self.momentum is None:
            raise ValueError(
                f"batch_requests {self.batch_requests} has no meaning without momentum; write momentum, e.g. 0.99"
            )
        return self


class ExactSpec(StrictModel):
    """The placement of least expected transfer, proved, for small cases; `time_limit` is per layer."""

    policy: Literal["exact"]
    time_limit: Time = 60.0
    max_tokens: PositiveInt = 8192


class ReplicatedSpec(StrictModel):
    """A base placement, and copies of experts in `spare_slots` per device and layer, by the transfer that they save."""

    policy: Literal["replicated"]
    base: Base = "coactivation"
    spare_slots: PositiveInt = 1
    max_tokens: PositiveInt = 8192


class CoactivationSpec(StrictModel):
    """Experts that tokens choose together on one device: few remote devices per token, equal experts per device.

    `starts` assignments are searched from, by `rounds` swaps per expert each, on at most `search_tokens` tokens; the
    best then goes on with all tokens.
    """

    policy: Literal["coactivation"]
    starts: PositiveInt = 4
    rounds: Annotated[float, Field(gt=0, le=1000)] = 8.0
    search_tokens: PositiveInt = 16384
    seed: Seed = 0


class BalancedCoactivationSpec(CoactivationSpec):
    """The same while no device serves more than `max_load` times the mean of its layer."""

    policy: Literal["balanced_coactivation"]  # type: ignore[assignment]
    max_load: Annotated[float, Field(ge=1, le=100)] = 1.1


class PredictedTimeSpec(StrictModel):
    """A search on the simulator's time of each layer, from the best of the `start` policies."""

    policy: Literal["predicted_time"]
    max_evaluations: PositiveInt = 400
    start: Annotated[list[SearchStart], Field(min_length=1)] = Field(
        default_factory=lambda: list(get_args(SearchStart))
    )
    seed: Seed = 0


class EplbHierarchicalSpec(StrictModel):
    """DeepSeek's EPLB: expert groups onto nodes, then redundant experts and devices in each node."""

    policy: Literal["eplb_hierarchical"]
    num_groups: PositiveInt
    redundant_experts: NonNegativeInt = 0


class EplbGlobalSpec(StrictModel):
    """DeepSeek's EPLB without groups: redundant experts and devices over the whole cluster."""

    policy: Literal["eplb_global"]
    redundant_experts: NonNegativeInt = 0


class TokenMigrationSpec(StrictModel):
    """Experts of consecutive layers together, for tokens that stay where their first expert was."""

    policy: Literal["token_migration"]
    method: Literal["sweep", "ilp"] = "sweep"
    starts: Annotated[int, Field(gt=0, le=1000)] = 2
    seed: Seed = 0
    max_tokens: PositiveInt = 5_000


class PlacementFileSpec(StrictModel):
    """A JSON file: epsim's own placement file, or {"physical_to_logical_map": [layers][slots]}."""

    policy: Literal["file"]
    path: Annotated[str, Field(min_length=1)]


PlacementSpec = Annotated[
    ContiguousSpec
    | RoundRobinSpec
    | RandomSpec
    | ModalityBinsSpec
    | CoactivationSpec
    | BalancedCoactivationSpec
    | PredictedTimeSpec
    | EplbHierarchicalSpec
    | EplbGlobalSpec
    | ReplicatedSpec
    | TokenMigrationSpec
    | ExactSpec
    | PlacementFileSpec,
    Field(discriminator="policy"),
]

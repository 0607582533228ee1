"""The YAML of a scenario: `ScenarioSpec` and its sections. It knows fields and their ranges, no domain class."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from epsim.scenario.base import NonNegativeInt, PositiveInt, StrictModel, Time
from epsim.scenario.cluster import ClusterSpec
from epsim.scenario.model import ModelSpec

Benchmark = Literal["MMMU", "SQA-IMG", "POPE", "GQA", "TextVQA"]
Method = Literal["baseline", "attention-soft", "gaussian-soft"]
Dtype = Literal["bf16", "fp8", "fp32"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class FileTraceSpec(StrictModel):
    """A routing trace on disk; `trace: FILE` is short for it."""

    kind: Literal["file"]
    path: Annotated[str, Field(min_length=1)]


class _SyntheticTraceSpec(StrictModel):
    """What synthetic traces share. `requests`: how many; the default is as many as the workload needs."""

    requests: PositiveInt | None = None
    seed: Seed = 0


class UniformTraceSpec(_SyntheticTraceSpec):
    """Every set of K experts equally likely; all requests alike."""

    kind: Literal["uniform"]
    vision_tokens: NonNegativeInt = 576
    text_tokens: NonNegativeInt = 128
    output_tokens: PositiveInt = 32

    @model_validator(mode="after")
    def _prompts_have_tokens(self) -> Self:
        if not self.vision_tokens + self.text_tokens:
            raise ValueError("text_tokens 0 and vision_tokens 0 leave no prompt; write at least 1 of either")
        return self


class ZipfTraceSpec(UniformTraceSpec):
    """Expert popularity rank^-exponent, another order in each layer."""

    kind: Literal["zipf"]  # type: ignore[assignment]
    exponent: Annotated[float, Field(ge=0, le=10)] = 1.0


class PublishedTraceSpec(_SyntheticTraceSpec):
    """Routing with the transfer ratios of a row of SMoES table S10; token counts follow its token mix by default."""

    kind: Literal["published"]
    benchmark: Benchmark
    method: Method
    images: PositiveInt = 1
    text_tokens: NonNegativeInt | None = None
    output_tokens: PositiveInt | None = None


SyntheticTraceSpec = UniformTraceSpec | ZipfTraceSpec | PublishedTraceSpec
TraceSpec = Annotated[FileTraceSpec | SyntheticTraceSpec, Field(discriminator="kind")]


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
    """SMoES binning: experts sorted by text bias, cut into `num_bins` (default: one per device), put on devices."""

    policy: Literal["modality_bins"]
    num_bins: PositiveInt | None = None


class PlacementFileSpec(StrictModel):
    """A JSON file {"physical_to_logical_map": [layers][slots]}."""

    policy: Literal["file"]
    path: Annotated[str, Field(min_length=1)]


SearchStart = Literal["contiguous", "modality_bins"]


def _search_starts() -> list[SearchStart]:
    return ["contiguous", "modality_bins"]


class PredictedTimeSpec(StrictModel):
    """A search on the simulator's time of each layer, from the best of the `start` policies."""

    policy: Literal["predicted_time"]
    max_evaluations: PositiveInt = 400
    start: Annotated[list[SearchStart], Field(min_length=1)] = Field(default_factory=_search_starts)
    seed: Seed = 0


PlacementSpec = Annotated[
    ContiguousSpec | RoundRobinSpec | RandomSpec | ModalityBinsSpec | PlacementFileSpec | PredictedTimeSpec,
    Field(discriminator="policy"),
]


class EpSpec(StrictModel):
    """Expert parallel: experts spread over the devices, tokens travel to them."""

    kind: Literal["ep"] = "ep"


class TpSpec(StrictModel):
    """Tensor parallel in groups of `size` consecutive devices (default: all); each group is a replica of the model."""

    kind: Literal["tp"]
    size: PositiveInt | None = None


class DpSpec(StrictModel):
    """Data parallel: every device is a replica of the model."""

    kind: Literal["dp"]


class AfdSpec(StrictModel):
    """Attention on the first `attention_devices` (default: half of them, rounded down), experts on the others."""

    kind: Literal["afd"]
    attention_devices: PositiveInt | None = None


class PdSpec(StrictModel):
    """Prefill on the first `prefill_devices` (default: half of them, rounded down), decode on the others."""

    kind: Literal["pd"]
    prefill_devices: PositiveInt | None = None


ParallelismSpec = Annotated[EpSpec | TpSpec | DpSpec | AfdSpec | PdSpec, Field(discriminator="kind")]


class HomesSpec(StrictModel):
    """Where tokens live, and whether the KV cache that moves between phases overlaps the prefill."""

    policy: Literal["balanced", "by_modality"] = "balanced"
    kv_transfer: Literal["overlapped", "exposed"] = "overlapped"


class TransmissionSpec(StrictModel):
    """How tokens travel. `num_chunks` is for async: each rank's tokens leave in that many messages per destination.

    `barriers` is for sync: a collective ends for all ranks at once, or for each when its own messages are there.
    """

    mode: Literal["sync", "async", "two_batch"] = "sync"
    num_chunks: Annotated[int, Field(gt=0, le=64)] = 1
    dedup: Literal["none", "device", "node"] = "device"
    dispatch_dtype: Dtype = "bf16"
    combine_dtype: Dtype = "bf16"
    overlap_shared: bool = False
    connections: Literal["flow", "pair"] = "flow"
    barriers: Literal["all", "own"] = "all"


class SloSpec(StrictModel):
    """Limits that a request must meet to count towards goodput."""

    ttft: Time | None = None
    tpot: Time | None = None


def _ascending(sizes: list[int]) -> list[int]:
    if sorted(set(sizes)) != sizes:
        raise ValueError(f"{sizes} must rise without repeats; write e.g. {sorted(set(sizes))}")
    return sizes


class WorkloadSpec(StrictModel):
    """Static batches: each batch size is run `num_batches` times, on consecutive requests of the trace."""

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1), AfterValidator(_ascending)] = Field(
        default_factory=lambda: [1, 8, 32]
    )
    num_batches: PositiveInt = 1
    max_output_tokens: PositiveInt | None = None
    slo: SloSpec = SloSpec()


class SimulationSpec(StrictModel):
    """Which engine, and how many decode steps of the first batch the timeline shows."""

    fidelity: Literal["event", "analytic", "simpy"] = "event"
    timeline_decode_steps: NonNegativeInt = 3


class ScenarioSpec(StrictModel):
    """A scenario, with its model and cluster written out."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    model: ModelSpec
    cluster: ClusterSpec
    trace: TraceSpec
    parallelism: ParallelismSpec = EpSpec()
    placement: PlacementSpec = ContiguousSpec()
    homes: HomesSpec = HomesSpec()
    transmission: TransmissionSpec = TransmissionSpec()
    workload: WorkloadSpec = WorkloadSpec()
    simulation: SimulationSpec = SimulationSpec()

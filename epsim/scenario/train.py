"""The YAML of a training run: `TrainSpec` and its sections. It knows fields and their ranges, no domain class.

Defaults of weights, decays and temperatures are those of SMoES (supplement 1.3, table S1) and SMAR (table 7).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    model_serializer,
    model_validator,
)

from epsim.scenario.base import NonNegativeInt, PositiveInt, Share, StrictModel

Weight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # what is larger fits into no memory
Depth = Annotated[int, Field(gt=0, le=1000)]
Count = Annotated[int, Field(gt=0, le=10**6)]
LearningRate = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Part = Literal["vision", "projector", "language"]
Text = Annotated[str, Field(min_length=1)]
Backbone = Literal["olmoe", "deepseekmoe", "moonlight", "qwen3-moe", "mixtral"]
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # it becomes part of a file's name


class VisionSpec(StrictModel):
    """A CLIP vision encoder; an image is (image_size / patch_size)^2 tokens."""

    image_size: Width = 64
    patch_size: Width = 8
    hidden_size: Width = 64
    num_layers: Depth = 2
    num_heads: Width = 4

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}")
        return self


class DrawnModelSpec(StrictModel):
    """Random weights in the architecture of a backbone, at a size of its own; `full_size: true` is the card's."""

    backbone: Backbone
    full_size: bool = False
    num_layers: Depth = 4
    hidden_size: Width = 128
    num_heads: Width = 4
    num_experts: Width = 64
    topk: Width = 8
    expert_ffn_size: Width = 64
    vision: VisionSpec = VisionSpec()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} must be at most num_experts {self.num_experts}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 num_heads = {2 * self.num_heads}")
        given = [name for name in self._sizes() if name in self.model_fields_set]
        if self.full_size and given:
            raise ValueError(f"full_size true takes all sizes from the model card; leave {', '.join(given)} out")
        return self

    @classmethod
    def _sizes(cls) -> list[str]:
        return [name for name in cls.model_fields if name not in ("backbone", "full_size")]

    @model_serializer(mode="wrap")
    def _without_sizes_of_the_card(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        return {name: value for name, value in content.items() if not (self.full_size and name in self._sizes())}


class CheckpointSpec(StrictModel):
    """A LLaVA-style checkpoint around an MoE language model: a folder, or a name "owner/model" of huggingface.co."""

    checkpoint: Text


def _model_kind(value: Any) -> str:
    """Return which spec a model is of: `checkpoint` stands in one alone."""
    is_checkpoint = "checkpoint" in value if isinstance(value, dict) else isinstance(value, CheckpointSpec)
    return CheckpointSpec.__name__ if is_checkpoint else DrawnModelSpec.__name__


AnyModelSpec = Annotated[
    Annotated[DrawnModelSpec, Tag(DrawnModelSpec.__name__)] | Annotated[CheckpointSpec, Tag(CheckpointSpec.__name__)],
    Discriminator(_model_kind),
]


class DataSpec(StrictModel):
    """What is learnt: the built-in scenes of digits, or files of prompts with answers.

    train, test: JSONL files (docs/capture.md), each line with an "answer"; None: built in.
    num_test, num_test_text: held-out prompts with and without an image on which accuracy is measured.
    """

    train: Text | None = None
    test: Text | None = None
    num_test: Count = 400
    num_test_text: Annotated[int, Field(ge=0, le=10**6)] = 200

    @model_validator(mode="after")
    def _both_files(self) -> Self:
        if (self.train is None) != (self.test is None):
            raise ValueError("train and test belong together; write both files, or none")
        return self


def _different(parts: Sequence[Part]) -> Sequence[Part]:
    if len(set(parts)) < len(parts):
        raise ValueError(f"[{', '.join(parts)}] names a part twice; write each once")
    return parts


class StageSpec(StrictModel):
    """Part of a training run: what is trained on what, for how long.

    task: "cells", digit and ink of each cell of a scene from the vision encoder alone; "text", prompts without images;
    "multimodal", prompts with images, and a share `text_only` without.
    balance_weight: of load balance over all experts (SMoES eq. 1) where the method is not in place.
    specialize: the method is in place: its losses, and its masks of experts or biases.
    """

    name: StageName
    task: Literal["cells", "text", "multimodal"]
    trains: Annotated[Sequence[Part], Field(min_length=1), AfterValidator(_different)]
    steps: PositiveInt
    batch_size: Width = 16
    learning_rate: LearningRate
    warmup_frac: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    text_only: Share = 0.2
    balance_weight: Weight = 0.0
    specialize: bool = False

    @model_validator(mode="after")
    def _reaches_what_it_trains(self) -> Self:
        reached = {"cells": "vision", "text": "language"}.get(self.task)
        if reached is not None and list(self.trains) != [reached]:
            raise ValueError(f"task {self.task} reaches {reached} alone; write trains: [{reached}]")
        if self.task == "cells" and self.specialize:
            raise ValueError("task cells has no experts; leave specialize out")
        return self


def _differently_named(stages: Sequence[StageSpec]) -> Sequence[StageSpec]:
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)} must be different names; name each stage once")
    return stages


class SoftSpec(StrictModel):
    """Soft routing: the model's own router, with the load balance of SMoES eq. 1."""

    kind: Literal["soft"]
    balance_weight: Weight = 0.001


class SmoesSpec(StrictModel):
    """SMoES: experts in bins, an objective between bins, and load balance within them (eq. 10 to 17)."""

    kind: Literal["smoes"]
    objective: Literal["mutual_information", "kl", "none"] = "mutual_information"
    score: Literal["attention", "gaussian", "gmm2", "gmm4", "hard"] = "attention"
    weight: Weight = 0.0001
    balance_weight: Weight = 0.001
    binning: Literal["adaptive", "fixed"] = "adaptive"
    num_bins: PositiveInt = 8
    decay: Decay = 0.99
    temperature: Annotated[float, Field(gt=0)] = 0.5


class SmarSpec(StrictModel):
    """SMAR: the distance of both modalities' routing held in a band, and a bias of its own for each."""

    kind: Literal["smar"]
    min_distance: Weight = 1.5
    max_distance: Weight = 2.0
    weight: Weight = 0.01
    balance_weight: Weight = 0.0
    modality_bias: bool = True

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.min_distance > self.max_distance:
            raise ValueError(f"min_distance {self.min_distance} must be at most max_distance {self.max_distance}")
        return self


class PartitionSpec(StrictModel):
    """Experts for one modality alone: hard routing, or MoIIE's hybrid with experts that both share."""

    kind: Literal["partition"]
    text_experts: PositiveInt
    vision_experts: PositiveInt
    shared_experts: NonNegativeInt = 0
    balance_weight: Weight = 0.001


MethodSpec = Annotated[SoftSpec | SmoesSpec | SmarSpec | PartitionSpec, Field(discriminator="kind")]


class TrainSpec(StrictModel):
    """A training run: a model, data, stages one after the other, and the method that specialises experts."""

    name: Text
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: AnyModelSpec
    data: DataSpec = DataSpec()
    method: MethodSpec
    stages: Annotated[Sequence[StageSpec], Field(min_length=1), AfterValidator(_differently_named)]
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100

    @model_validator(mode="after")
    def _method_acts(self) -> Self:
        if not isinstance(self.method, SoftSpec) and not any(stage.specialize for stage in self.stages):
            raise ValueError(
                f"method {self.method.kind} acts in stages with specialize: true, and there is none; write it into one"
            )
        return self

    @model_validator(mode="after")
    def _method_fits_experts(self) -> Self:
        if isinstance(self.model, CheckpointSpec) or self.model.full_size:
            return self  # how many experts these have is known when they are loaded
        num_experts, topk = self.model.num_experts, self.model.topk
        if isinstance(self.method, SmoesSpec) and num_experts % self.method.num_bins:
            raise ValueError(f"method.num_bins {self.method.num_bins} must divide model.num_experts {num_experts}")
        if isinstance(self.method, PartitionSpec):
            _require_partition_fits(self.method, num_experts, topk)
        return self


def _require_partition_fits(method: PartitionSpec, num_experts: int, topk: int) -> None:
    """Raise ValueError unless every expert is in one part and tokens of both modalities have topk to go to."""
    parts = (method.text_experts, method.vision_experts, method.shared_experts)
    if sum(parts) != num_experts:
        raise ValueError(
            f"method.text_experts {parts[0]}, vision_experts {parts[1]} and shared_experts {parts[2]} are {sum(parts)} "
            f"together; they must be model.num_experts {num_experts}"
        )
    for name, own in (("text_experts", parts[0]), ("vision_experts", parts[1])):
        if own + parts[2] < topk:
            raise ValueError(
                f"method.{name} {own} and shared_experts {parts[2]} must be at least model.topk {topk} together"
            )

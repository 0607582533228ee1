"""The YAML of a training run: `TrainSpec` and its sections. It knows fields and their ranges, no domain class.

Defaults of weights, decays and temperatures are those of SMoES (supplement 1.3, table S1) and SMAR (table 7).
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from epsim.scenario.base import NonNegativeInt, PositiveInt, Share, StrictModel

Weight = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[float, Field(gt=0, le=10)]
Decay = Annotated[float, Field(gt=0, lt=1)]
Part = Literal["vision", "projector", "language"]
Text = Annotated[str, Field(min_length=1)]


class VisionSpec(StrictModel):
    """A CLIP vision encoder; an image is (image_size / patch_size)^2 tokens."""

    image_size: PositiveInt = 64
    patch_size: PositiveInt = 8
    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4

    @model_validator(mode="after")
    def _whole_patches(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        return self


class DrawnModelSpec(StrictModel):
    """Random weights in the architecture of a backbone, at a size of its own; `full_size: true` is the card's."""

    backbone: Text
    full_size: bool = False
    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 128
    num_heads: PositiveInt = 4
    num_experts: PositiveInt = 64
    topk: PositiveInt = 8
    expert_ffn_size: PositiveInt = 64
    vision: VisionSpec = VisionSpec()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.topk > self.num_experts:
            raise ValueError(f"topk {self.topk} must be at most num_experts {self.num_experts}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 num_heads = {2 * self.num_heads}")
        return self


class CheckpointSpec(StrictModel):
    """A LLaVA-style checkpoint around an MoE language model: a folder, or a name "owner/model" of huggingface.co."""

    checkpoint: Text


class DataSpec(StrictModel):
    """What is learnt: the built-in scenes of digits, or files of prompts with answers.

    train, test: JSONL files (docs/capture.md), each line with an "answer"; None: built in.
    num_test, num_test_text: held-out prompts with and without an image on which accuracy is measured.
    """

    train: Text | None = None
    test: Text | None = None
    num_test: PositiveInt = 400
    num_test_text: NonNegativeInt = 200

    @model_validator(mode="after")
    def _both_files(self) -> Self:
        if (self.train is None) != (self.test is None):
            raise ValueError("train and test belong together; write both files, or none")
        return self


class StageSpec(StrictModel):
    """Part of a training run: what is trained on what, for how long.

    task: "cells", digit and ink of each cell of a scene from the vision encoder alone; "text", prompts without images;
    "multimodal", prompts with images, and a share `text_only` without.
    specialize: the method is in place: its losses, and its masks of experts or biases.
    """

    name: Text
    task: Literal["cells", "text", "multimodal"]
    trains: Annotated[Sequence[Part], Field(min_length=1)]
    steps: PositiveInt
    batch_size: PositiveInt = 16
    learning_rate: Rate
    warmup_frac: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    text_only: Share = 0.2
    specialize: bool = False


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
    model: DrawnModelSpec | CheckpointSpec
    data: DataSpec = DataSpec()
    method: MethodSpec
    stages: Annotated[Sequence[StageSpec], Field(min_length=1)]
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100

    @model_validator(mode="after")
    def _stages_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages: {', '.join(names)} must have different names")
        return self

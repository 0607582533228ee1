"""The YAML of a model card: `ModelSpec`, with `AttentionSpec`, `MoeSpec` and `VisionSpec` inside it.

A card holds the shapes of one checkpoint, under names close to its `config.json`; bytes and FLOPs are derived
from them elsewhere. Sizes are numbers of elements, not bytes.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from epsim.scenario.base import NonNegativeInt, PositiveInt, StrictModel

DtypeBytes = Annotated[float, Field(gt=0, le=16)]  # bytes of one stored number; 0.5 for 4-bit


class MhaSpec(StrictModel):
    """Multi-head attention: every query head has its own key and value head."""

    kind: Literal["mha"]
    num_heads: PositiveInt
    head_dim: PositiveInt


class GqaSpec(StrictModel):
    """Grouped-query attention: `num_heads / num_kv_heads` query heads share a key and value head."""

    kind: Literal["gqa"]
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt

    @model_validator(mode="after")
    def _groups_are_equal(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "write num_attention_heads and num_key_value_heads of the checkpoint's config.json"
            )
        return self


class MlaSpec(StrictModel):
    """Multi-head latent attention (DeepSeek-V2): a latent and one rotary key per token are cached.

    `q_lora_rank` is left out (or null) where the query is projected in one step.
    """

    kind: Literal["mla"]
    num_heads: PositiveInt
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    q_lora_rank: PositiveInt | None = None


AttentionSpec = Annotated[MhaSpec | GqaSpec | MlaSpec, Field(discriminator="kind")]


class MoeSpec(StrictModel):
    """The expert layers. The first `num_dense_layers` layers of the model have a dense FFN instead."""

    num_experts: Annotated[int, Field(gt=0, le=65536)]
    topk: PositiveInt
    expert_ffn_size: PositiveInt
    num_dense_layers: NonNegativeInt = 0
    num_shared_experts: NonNegativeInt = 0
    shared_expert_ffn_size: PositiveInt | None = None  # of one shared expert; as a routed one if left out

    @model_validator(mode="after")
    def _topk_fits(self) -> Self:
        if self.topk > self.num_experts:
            raise ValueError(
                f"topk {self.topk} is more than num_experts {self.num_experts}; "
                "a token goes to topk different experts, write topk <= num_experts"
            )
        if self.shared_expert_ffn_size is not None and not self.num_shared_experts:
            raise ValueError(
                f"shared_expert_ffn_size {self.shared_expert_ffn_size} without shared experts; "
                "write num_shared_experts or leave shared_expert_ffn_size out"
            )
        return self


class VisionSpec(StrictModel):
    """A ViT encoder and the two-layer GELU projector behind it, for one image (or one tile of it).

    `num_layers` counts the layers that run, `pixel_shuffle_factor` the patches per side in one token.
    """

    name: str
    image_size: PositiveInt
    patch_size: PositiveInt
    hidden_size: PositiveInt
    ffn_size: PositiveInt
    num_layers: PositiveInt
    num_class_tokens: NonNegativeInt = 1
    pixel_shuffle_factor: PositiveInt = 1

    @model_validator(mode="after")
    def _patches_fit(self) -> Self:
        if self.image_size % (self.patch_size * self.pixel_shuffle_factor):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size} x "
                f"pixel_shuffle_factor {self.pixel_shuffle_factor}; write the pixels per side of its input"
            )
        return self


class ModelSpec(StrictModel):
    """A model card: shapes of a language backbone, dense or MoE, and of its vision encoder if it has one."""

    name: str
    hidden_size: PositiveInt
    num_layers: Annotated[int, Field(gt=0, le=1000)]
    vocab_size: PositiveInt
    attention: AttentionSpec
    tie_embeddings: bool = False
    dense_ffn_size: PositiveInt | None = None
    moe: MoeSpec | None = None
    vision: VisionSpec | None = None
    compute_dtype: Annotated[str, Field(min_length=1)] = "bf16"
    weight_dtype_bytes: DtypeBytes = 2.0
    activation_dtype_bytes: DtypeBytes = 2.0
    kv_dtype_bytes: DtypeBytes = 2.0

    @model_validator(mode="after")
    def _layers_have_an_ffn(self) -> Self:
        num_dense_layers = self.num_layers if self.moe is None else self.moe.num_dense_layers
        if self.moe is not None and num_dense_layers >= self.num_layers:
            raise ValueError(
                f"moe.num_dense_layers {num_dense_layers} leaves no MoE layer of {self.num_layers}; "
                "write num_dense_layers < num_layers, or leave moe out for a dense model"
            )
        if num_dense_layers and self.dense_ffn_size is None:
            raise ValueError(
                f"dense_ffn_size is missing, but {num_dense_layers} layers are dense; "
                "write intermediate_size of the checkpoint's config.json"
            )
        if not num_dense_layers and self.dense_ffn_size is not None:
            raise ValueError(
                f"dense_ffn_size {self.dense_ffn_size}, but no layer is dense; "
                "leave it out, or write moe.num_dense_layers"
            )
        return self

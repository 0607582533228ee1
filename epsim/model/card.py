"""Model cards: `ModelCard` and, inside it, `Moe`; bytes and FLOPs that follow from the shapes of a backbone.

Figures are per layer, and per token where they say so, unless their name says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from epsim.errors import ScenarioError
from epsim.model._sizes import check_sizes
from epsim.model.attention import Attention, attention_from_mapping
from epsim.model.vision import VisionEncoder


def _gated_ffn_params(hidden_size: int, ffn_size: int) -> int:
    """Weights of a gated MLP: the up, gate and down matrices."""
    return 3 * hidden_size * ffn_size


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Routed and shared experts of the MoE layers; `shared_expert_ffn_size` is of one shared expert."""

    num_experts: int
    topk: int
    expert_ffn_size: int
    num_dense_layers: int = 0
    num_shared_experts: int = 0
    shared_expert_ffn_size: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "model.moe.", "num_dense_layers", "num_shared_experts")
        if self.topk > self.num_experts:
            raise ScenarioError(
                f"model.moe.topk: {self.topk} is more than num_experts {self.num_experts}; write at most that"
            )

    @property
    def shared_ffn_size(self) -> int:
        """Width of all shared experts of a layer together."""
        one = self.expert_ffn_size if self.shared_expert_ffn_size is None else self.shared_expert_ffn_size
        return self.num_shared_experts * one

    def uneven(self, size: int) -> str | None:
        """Return the field that `size` devices cannot share evenly, with its value; None if there is none."""
        for name in ("expert_ffn_size", "shared_expert_ffn_size"):
            if (getattr(self, name) or 0) % size:
                return f"{name} {getattr(self, name)}"
        return None

    def shard(self, size: int) -> Self:
        """Return one device's part: every expert, with 1 / size of its width."""
        shared = self.shared_expert_ffn_size
        return replace(
            self,
            expert_ffn_size=self.expert_ffn_size // size,
            shared_expert_ffn_size=None if shared is None else shared // size,
        )


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The shapes of one checkpoint, in elements, and the bytes and FLOPs that follow from them.

    `dense_ffn_size` is the FFN of the leading dense layers, or of every layer where `moe` is None.
    """

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    attention: Attention
    tie_embeddings: bool = False
    dense_ffn_size: int | None = None
    moe: Moe | None = None
    vision: VisionEncoder | None = None
    compute_dtype: str = "bf16"
    weight_dtype_bytes: float = 2.0
    activation_dtype_bytes: float = 2.0
    kv_dtype_bytes: float = 2.0

    def __post_init__(self) -> None:
        check_sizes(self, "model.")
        if self.moe is not None and self.moe.num_dense_layers >= self.num_layers:
            raise ScenarioError(
                f"model.moe.num_dense_layers: {self.moe.num_dense_layers} leaves no MoE layer of "
                f"{self.num_layers}; write num_dense_layers < num_layers"
            )
        if (self.num_dense_layers > 0) != (self.dense_ffn_size is not None):
            raise ScenarioError(
                f"model.dense_ffn_size: {self.dense_ffn_size} with {self.num_dense_layers} dense layers; "
                "write it if and only if a layer is dense"
            )
        if self.vision is not None and self.vision.output_size != self.hidden_size:
            raise ScenarioError(
                f"model.vision.output_size: {self.vision.output_size} is not the backbone's hidden_size; "
                f"write {self.hidden_size}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build a card from nested mappings as `ModelSpec.model_dump()` gives them.

        Raises ScenarioError where shapes contradict each other, TypeError on names that no field has.
        """
        values = dict(values)
        attention = attention_from_mapping(values.pop("attention"))
        moe, vision = values.pop("moe", None), values.pop("vision", None)
        if moe is not None:
            moe = Moe(**moe)
        if vision is not None:
            weight_dtype_bytes = values.get("weight_dtype_bytes", cls.weight_dtype_bytes)
            vision = VisionEncoder(**vision, output_size=values["hidden_size"], weight_dtype_bytes=weight_dtype_bytes)
        return cls(attention=attention, moe=moe, vision=vision, **values)

    def shard(self, size: int) -> Self:
        """Return the card of one of `size` tensor-parallel devices, as Megatron-LM splits a model (arXiv:1909.08053).

        Each has 1 / size of the heads, of the width of every FFN and expert, and of the vocabulary. Router, vision
        encoder, the latent of MLA, and key-value heads that are fewer than the devices are on each of them.
        Raises ValueError where something does not divide (see `uneven`).
        """
        if uneven := self.uneven(size):
            raise ValueError(f"{self.name}: {size} devices cannot share {uneven} evenly")
        return replace(
            self,
            attention=self.attention.shard(size),
            dense_ffn_size=None if self.dense_ffn_size is None else self.dense_ffn_size // size,
            moe=None if self.moe is None else self.moe.shard(size),
            vocab_size=self.vocab_size // size,
        )

    def uneven(self, size: int) -> str | None:
        """Return the field that `size` devices cannot share evenly, with its value; None if there is none."""
        for name in ("vocab_size", "dense_ffn_size"):
            if (getattr(self, name) or 0) % size:
                return f"{name} {getattr(self, name)}"
        if uneven := self.attention.uneven(size):
            return f"attention.{uneven}"
        moe_uneven = self.moe.uneven(size) if self.moe else None
        return f"moe.{moe_uneven}" if moe_uneven else None

    @property
    def num_dense_layers(self) -> int:
        """Leading layers with a dense FFN; all layers of a dense model."""
        return self.num_layers if self.moe is None else self.moe.num_dense_layers

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        """Layer numbers in the model, from 0, of its MoE layers, ascending; empty for a dense model."""
        return tuple(range(self.num_dense_layers, self.num_layers))

    @property
    def num_experts(self) -> int:
        """Routed logical experts per MoE layer; 0 for a dense model."""
        return 0 if self.moe is None else self.moe.num_experts

    @property
    def topk(self) -> int:
        """Routed experts per token; 0 for a dense model."""
        return 0 if self.moe is None else self.moe.topk

    @property
    def hidden_bytes_per_token(self) -> float:
        """Bytes of one hidden vector, as dispatch and combine send it."""
        return self.hidden_size * self.activation_dtype_bytes

    @property
    def _expert_params(self) -> int:
        return 0 if self.moe is None else _gated_ffn_params(self.hidden_size, self.moe.expert_ffn_size)

    @property
    def expert_bytes(self) -> float:
        """Weights of one routed expert; 0 for a dense model."""
        return self._expert_params * self.weight_dtype_bytes

    @property
    def expert_flops_per_token(self) -> int:
        """FLOPs of one routed expert on one token: 2 * 3 * hidden_size * expert_ffn_size."""
        return 2 * self._expert_params

    @property
    def _shared_expert_params(self) -> int:
        return 0 if self.moe is None else _gated_ffn_params(self.hidden_size, self.moe.shared_ffn_size)

    @property
    def shared_expert_bytes(self) -> float:
        """Weights of all shared experts of an MoE layer together."""
        return self._shared_expert_params * self.weight_dtype_bytes

    @property
    def shared_expert_flops_per_token(self) -> int:
        """FLOPs of all shared experts of an MoE layer together, on one token."""
        return 2 * self._shared_expert_params

    @property
    def _dense_ffn_params(self) -> int:
        return _gated_ffn_params(self.hidden_size, self.dense_ffn_size or 0)

    @property
    def dense_ffn_bytes(self) -> float:
        """Weights of the FFN of a dense layer; 0 if no layer is dense."""
        return self._dense_ffn_params * self.weight_dtype_bytes

    @property
    def dense_ffn_flops_per_token(self) -> int:
        """FLOPs of the FFN of a dense layer on one token."""
        return 2 * self._dense_ffn_params

    @property
    def _attention_params(self) -> int:
        return self.attention.num_params(self.hidden_size)

    @property
    def attention_bytes(self) -> float:
        """Weights of the attention projections of a layer, output projection included."""
        return self._attention_params * self.weight_dtype_bytes

    @property
    def attention_projection_flops_per_token(self) -> int:
        """FLOPs of the attention projections of a layer on one token, output projection included."""
        return 2 * self._attention_params

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair of a layer in prefill: 2 * heads * (qk_dim + v_dim)."""
        return self.attention.flops_per_pair

    @property
    def decode_attention_flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair of a layer in decode; MLA decodes absorbed and needs more."""
        return self.attention.decode_flops_per_pair

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one token in one layer; for MLA the latent and the rotary key."""
        return self.attention.kv_size * self.kv_dtype_bytes

    @property
    def _router_params(self) -> int:
        return self.hidden_size * self.num_experts

    @property
    def router_bytes(self) -> float:
        """Weights of the router of an MoE layer."""
        return self._router_params * self.weight_dtype_bytes

    @property
    def router_flops_per_token(self) -> int:
        """FLOPs of the router of an MoE layer on one token."""
        return 2 * self._router_params

    @property
    def _lm_head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def lm_head_bytes(self) -> float:
        """Weights of the output head of the model."""
        return self._lm_head_params * self.weight_dtype_bytes

    @property
    def lm_head_flops_per_token(self) -> int:
        """FLOPs of the output head on one token."""
        return 2 * self._lm_head_params

    @property
    def embedding_bytes(self) -> float:
        """Weights of the input embedding beside the output head's: 0 where the two are tied."""
        return 0.0 if self.tie_embeddings else self.lm_head_bytes

    def _num_params(self, experts_per_layer: int) -> int:
        moe_layer = experts_per_layer * self._expert_params + self._shared_expert_params + self._router_params
        return (
            self.num_layers * self._attention_params
            + self.num_dense_layers * self._dense_ffn_params
            + len(self.moe_layer_ids) * moe_layer
            + self._lm_head_params * (1 if self.tie_embeddings else 2)
        )

    @property
    def num_params(self) -> int:
        """Parameters of the language backbone, embedding and head included, vision encoder not."""
        return self._num_params(self.num_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters of the backbone that a token uses; embedding and head count in full."""
        return self._num_params(self.topk)

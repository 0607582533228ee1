"""The backbones that epsim can run: from a model card to the config of transformers, at full and at reduced width.

`text_config` and `vlm_config` build configs. `reduced_card` and `CLIP_REDUCED` are narrow, and keep what routing
is made of: MoE layers, experts, top-k and tokens per image.
What a card does not say (router, norms, rotary base) is from the config.json of the checkpoints that the cards name.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    LlavaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from epsim.capture.models.deepseek import DeepseekConfig
from epsim.errors import InputError
from epsim.model import ModelCard
from epsim.model.attention import GroupedQueryAttention, LatentAttention
from epsim.model.card import Moe
from epsim.scenario import load_model as load_card

INITIALIZER_RANGE = 0.02  # at INITIALIZER_WIDTH, the hidden size of the four backbones of SMoES
INITIALIZER_WIDTH = 2048

# openai/clip-vit-large-patch14-336, config.json, vision_config
CLIP_VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_REDUCED = CLIP_VIT_L_14_336 | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 64,
}


def backbone_card(backbone: str, *, reduced: bool = False) -> ModelCard:
    """Return the model card of a backbone; raises InputError if it is not one of `BACKBONES`."""
    _check_backbone(backbone)
    card = ModelCard.from_mapping(load_card(backbone).model_dump())
    return reduced_card(card) if reduced else card


def _check_backbone(backbone: str) -> None:
    if backbone not in BACKBONES:
        raise InputError(f'"{backbone}" is not a backbone that can be run; write one of {", ".join(BACKBONES)}')


def text_config(backbone: str, card: ModelCard) -> PreTrainedConfig:
    """Return the config of the language model of `card`, whose family is that of the preset `backbone`.

    Raises InputError for a backbone that is not one of `BACKBONES`.
    """
    _check_backbone(backbone)
    config: PreTrainedConfig = BACKBONES[backbone](card)
    return config


def vlm_config(text: PreTrainedConfig, vision: dict[str, Any], image_token_id: int) -> LlavaConfig:
    """Return LLaVA-1.5's config around a language model: CLIP's last layer but one, Linear-GELU-Linear.

    SMoES, supplement 1.1: CLIP ViT-L/14-336 and a two-layer MLP projector on every backbone.
    """
    return LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**vision),
        image_token_id=image_token_id,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )


def reduced_card(card: ModelCard, *, hidden_size: int = 64, num_heads: int = 4, expert_ffn_size: int = 32) -> ModelCard:
    """Return `card` at a small width with the routing of the full model: its MoE layers, experts and top-k."""
    moe, head_dim = card.moe, hidden_size // num_heads
    assert moe is not None
    attention: GroupedQueryAttention | LatentAttention
    if isinstance(card.attention, LatentAttention):
        attention = LatentAttention(
            num_heads=num_heads,
            kv_lora_rank=hidden_size // 2,
            qk_nope_head_dim=head_dim,
            qk_rope_head_dim=head_dim // 2,
            v_head_dim=head_dim,
        )
    else:
        num_kv_heads = num_heads // (2 if card.attention.kind == "gqa" else 1)
        attention = GroupedQueryAttention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    return replace(
        card,
        name=f"{card.name} reduced",
        hidden_size=hidden_size,
        vocab_size=512,
        attention=attention,
        dense_ffn_size=None if card.dense_ffn_size is None else 4 * expert_ffn_size,
        moe=replace(moe, expert_ffn_size=expert_ffn_size, shared_expert_ffn_size=None),
        vision=None,
    )


def _common(card: ModelCard) -> dict[str, Any]:
    """What all configs call the same."""
    return {
        "vocab_size": card.vocab_size,
        "hidden_size": card.hidden_size,
        "num_hidden_layers": card.num_layers,
        "num_attention_heads": card.attention.num_heads,
        "num_key_value_heads": getattr(card.attention, "num_kv_heads", card.attention.num_heads),
        "num_experts_per_tok": _moe(card).topk,
        "tie_word_embeddings": card.tie_embeddings,
        # The logits of a narrow random router spread as those of a full one: they grow with the root of the width.
        "initializer_range": INITIALIZER_RANGE * (INITIALIZER_WIDTH / card.hidden_size) ** 0.5,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,  # random weights do not know when to stop
    }


def _moe(card: ModelCard) -> Moe:
    if card.moe is None:
        raise InputError(f"{card.name}: has no experts to route to; write a Mixture-of-Experts model")
    return card.moe


def _deepseek(card: ModelCard) -> dict[str, Any]:
    """What the configs of DeepSeekMoE and DeepSeek-V3 call the same."""
    moe = _moe(card)
    return _common(card) | {
        "intermediate_size": card.dense_ffn_size,
        "moe_intermediate_size": moe.expert_ffn_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "first_k_dense_replace": moe.num_dense_layers,
    }


def _rotary(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


def _head_dim(card: ModelCard) -> int:
    assert isinstance(card.attention, GroupedQueryAttention)
    return card.attention.head_dim


def _olmoe(card: ModelCard) -> PreTrainedConfig:
    moe = _moe(card)
    return OlmoeConfig(
        **_common(card),
        intermediate_size=moe.expert_ffn_size,
        num_experts=moe.num_experts,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        rope_parameters=_rotary(10000.0),
        rms_norm_eps=1e-5,
    )


def _deepseekmoe(card: ModelCard) -> PreTrainedConfig:
    return DeepseekConfig(
        **_deepseek(card),
        max_position_embeddings=4096,
        rope_parameters=_rotary(10000.0),
        rms_norm_eps=1e-6,
    )


def _moonlight(card: ModelCard) -> PreTrainedConfig:
    attention = card.attention
    assert isinstance(attention, LatentAttention)
    return DeepseekV3Config(
        **_deepseek(card),
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.446,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=attention.q_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        max_position_embeddings=8192,
        rope_parameters=_rotary(50000.0),
        rms_norm_eps=1e-5,
    )


def _qwen3_moe(card: ModelCard) -> PreTrainedConfig:
    moe = _moe(card)
    return Qwen3MoeConfig(
        **_common(card),
        head_dim=_head_dim(card),
        intermediate_size=4 * moe.expert_ffn_size,  # of dense layers, of which there are none
        moe_intermediate_size=moe.expert_ffn_size,
        num_experts=moe.num_experts,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        rope_parameters=_rotary(1000000.0),
        rms_norm_eps=1e-6,
    )


def _mixtral(card: ModelCard) -> PreTrainedConfig:
    moe = _moe(card)
    return MixtralConfig(
        **_common(card),
        head_dim=_head_dim(card),
        intermediate_size=moe.expert_ffn_size,
        num_local_experts=moe.num_experts,
        sliding_window=None,
        max_position_embeddings=32768,
        rope_parameters=_rotary(1000000.0),
        rms_norm_eps=1e-5,
    )


BACKBONES: dict[str, Callable[[ModelCard], PreTrainedConfig]] = {
    "olmoe": _olmoe,
    "deepseekmoe": _deepseekmoe,
    "moonlight": _moonlight,
    "qwen3-moe": _qwen3_moe,
    "mixtral": _mixtral,
}

"""The model that a training run begins with: `build_model`, from `DrawnModelSpec` or `CheckpointSpec`."""

from dataclasses import replace
from typing import Any

import torch
from transformers import LlavaConfig

from epsim.capture.modality_gate import FILE_NAME as MODALITY_GATE
from epsim.capture.model import MoeModel
from epsim.capture.models import deepseek
from epsim.capture.models.backbones import CLIP_VIT_L_14_336, backbone_card, reduced_card, text_config, vlm_config
from epsim.capture.models.byte_tokenizer import EOS_ID
from epsim.capture.models.device import check_memory, quiet, resolve_device, weight_bytes
from epsim.capture.models.load import load_model
from epsim.capture.models.random_init import draw_weights
from epsim.capture.models.source import ModelSource
from epsim.errors import InputError
from epsim.model import ModelCard
from epsim.scenario.train import DrawnModelSpec, TrainSpec, VisionSpec

TRAINING_DTYPE = torch.float32  # of weights and optimizer; on CUDA layers compute in bfloat16 under autocast
BYTES_PER_WEIGHT_BYTE = 4  # the weight, its gradient, AdamW's two moments
BYTE_VOCABULARY = EOS_ID + 1


def build_model(spec: TrainSpec, device: str) -> MoeModel:
    """Return the model in float32 on a device, with gradients off; same spec and seed, same weights.

    Raises InputError for a backbone, sizes or a checkpoint that cannot be trained, CapacityError if what is drawn does
    not fit into the device's memory with gradients and optimizer, or if the weights of a checkpoint alone do not.
    """
    if isinstance(spec.model, DrawnModelSpec):
        return _drawn(spec.model, spec.seed, resolve_device(device))
    model = load_model(ModelSource(checkpoint=spec.model.checkpoint, dtype="float32", device=device))
    if not model.is_vlm:
        raise InputError(f"model.checkpoint: {model.name} reads text only; write a vision-language model")
    if model.modality_gate is not None:
        raise InputError(
            f"model.checkpoint: {model.name} has biases or masks of experts, and training begins with plain routers; "
            f"write a checkpoint without {MODALITY_GATE}"
        )
    return model


def _drawn(spec: DrawnModelSpec, seed: int, device: torch.device) -> MoeModel:
    deepseek.register()
    config, name = _config(spec)
    with quiet():
        size = weight_bytes(draw_weights(config, TRAINING_DTYPE, torch.device("meta"), 0))
        check_memory(
            BYTES_PER_WEIGHT_BYTE * size,
            device,
            name,
            "smaller sizes in model, or another --device",
            needed_for="weights, gradients and AdamW's moments",
        )
        module = draw_weights(config, TRAINING_DTYPE, device, seed)
    return MoeModel(
        name=name,
        module=module.requires_grad_(False),
        random_weights=True,
        source={"random_init": spec.backbone, "seed": seed},
    )


def _config(spec: DrawnModelSpec) -> tuple[LlavaConfig, str]:
    card = backbone_card(spec.backbone)
    if spec.full_size:
        vision = CLIP_VIT_L_14_336
    else:
        card, vision = _small_card(card, spec), _small_vision(spec.vision)
    text = text_config(spec.backbone, replace(card, vocab_size=card.vocab_size + 1))
    return vlm_config(text, vision, image_token_id=card.vocab_size), card.name


def _small_card(card: ModelCard, spec: DrawnModelSpec) -> ModelCard:
    """Return the card at these sizes, with as many dense layers in front as the full one."""
    small = reduced_card(
        card, hidden_size=spec.hidden_size, num_heads=spec.num_heads, expert_ffn_size=spec.expert_ffn_size
    )
    assert small.moe is not None
    if spec.num_layers <= small.num_dense_layers:
        raise InputError(
            f"model.num_layers: {spec.num_layers} leaves no MoE layer behind the {small.num_dense_layers} dense one of "
            f"{spec.backbone}; write at least {small.num_dense_layers + 1}"
        )
    moe = replace(small.moe, num_experts=spec.num_experts, topk=spec.topk)
    return replace(
        small,
        name=f"{spec.backbone}, {spec.num_layers} layers, {spec.hidden_size} wide",
        num_layers=spec.num_layers,
        vocab_size=BYTE_VOCABULARY,
        moe=moe,
    )


def _small_vision(spec: VisionSpec) -> dict[str, Any]:
    return CLIP_VIT_L_14_336 | {
        "hidden_size": spec.hidden_size,
        "intermediate_size": 2 * spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "projection_dim": spec.hidden_size,
    }

"""Random models of every backbone, small enough for a test: `small_model`, and a padded batch for it, `small_batch`."""

import os
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from epsim.capture.model import MoeModel
from epsim.capture.models import deepseek
from epsim.capture.models.backbones import BACKBONES, CLIP_REDUCED, reduced_card, text_config, vlm_config
from epsim.model import ModelCard
from epsim.scenario import load_model

BACKBONE_NAMES = tuple(BACKBONES)
IMAGE_TOKEN_ID = 500
TOKENS_PER_IMAGE = 16
SMALL_VISION: dict[str, Any] = CLIP_REDUCED | {"image_size": 56, "hidden_size": 32, "intermediate_size": 64}


def small_card(backbone: str, num_moe_layers: int = 2, num_experts: int = 8) -> ModelCard:
    """Return the backbone's card at width 64 with few layers (first layers dense as in the full one) and experts."""
    card = reduced_card(ModelCard.from_mapping(load_model(backbone).model_dump()))
    assert card.moe is not None
    moe = replace(card.moe, num_experts=num_experts, topk=min(card.moe.topk, 3))
    return replace(card, num_layers=card.num_dense_layers + num_moe_layers, moe=moe)


def small_model(
    backbone: str, *, vlm: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: int
) -> MoeModel:
    """Return a random model on the CPU, or where EPSIM_TEST_DEVICE says, with the same weights.

    A prompt's image is `TOKENS_PER_IMAGE` times `IMAGE_TOKEN_ID`.
    """
    deepseek.register()
    torch.manual_seed(seed)
    config = text_config(backbone, small_card(backbone, **sizes))
    if vlm:
        module = LlavaForConditionalGeneration(vlm_config(config, SMALL_VISION, IMAGE_TOKEN_ID))
    else:
        module = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.1)
        for parameter in module.parameters():  # buffers stay float32, as in a model that is loaded
            parameter.data = parameter.data.to(dtype)
    module = module.eval().to(os.environ.get("EPSIM_TEST_DEVICE", "cpu"))
    return MoeModel(name=f"small {backbone}", module=module, random_weights=True)


def small_batch(seed: int = 0, lengths: tuple[int, ...] = (29, 22), vlm: bool = True) -> dict[str, torch.Tensor]:
    """Return a batch padded on the left: token_ids_BS, is_token_BS, is_text_BS, pixel_values (one image each).

    Each prompt is three text tokens, its image, text.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    token_ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    is_token = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids = torch.randint(1, 400, (length,), generator=generator)
        if vlm:
            ids[3 : 3 + TOKENS_PER_IMAGE] = IMAGE_TOKEN_ID
        token_ids[row, longest - length :] = ids
        is_token[row, longest - length :] = True
    return {
        "token_ids_BS": token_ids,
        "is_token_BS": is_token,
        "is_text_BS": token_ids != IMAGE_TOKEN_ID,
        "pixel_values": torch.randn(len(lengths), 3, 56, 56, generator=generator),
    }

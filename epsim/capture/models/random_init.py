"""Models with random weights in the shapes of a model card: `random_config` and `draw_weights`."""

from copy import deepcopy
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from epsim.capture.models.backbones import (
    CLIP_REDUCED,
    CLIP_VIT_L_14_336,
    backbone_card,
    text_config,
    vlm_config,
)
from epsim.errors import CapacityError


def random_config(backbone: str, *, reduced: bool = False, text_only: bool = False) -> PreTrainedConfig:
    """Return the config of a backbone, and unless `text_only` of LLaVA-1.5 around it with CLIP ViT-L/14-336.

    As in LLaVA, the image token is one token more than the language model has: its id is the vocabulary's size, and
    the embedding and the output head get one more row. Raises InputError for an unknown backbone.
    """
    card = backbone_card(backbone, reduced=reduced)
    if text_only:
        return text_config(backbone, card)
    text = text_config(backbone, replace(card, vocab_size=card.vocab_size + 1))
    vision = CLIP_REDUCED if reduced else CLIP_VIT_L_14_336
    return vlm_config(text, vision, image_token_id=card.vocab_size)


def draw_weights(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """Return a model whose weights are drawn in `dtype` on `device` itself; device "meta" draws and allocates nothing.

    Same seed, same kind of device and same torch: same weights. The state of torch's generators is left as it was.
    Raises CapacityError if the device's memory does not suffice.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    vlm = hasattr(config, "vision_config")
    build = LlavaForConditionalGeneration._from_config if vlm else AutoModelForCausalLM.from_config
    try:
        with torch.random.fork_rng(devices=devices), torch.device(device):
            torch.default_generator.manual_seed(seed)
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(seed)
            module: PreTrainedModel = build(deepcopy(config), dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"--random-init: does not fit into the memory of {device}; write --reduced") from error
    for layer in module.modules():
        if hasattr(layer, "e_score_correction_bias"):  # in float32, as in a model that is loaded
            layer.e_score_correction_bias = layer.e_score_correction_bias.float()
    return module

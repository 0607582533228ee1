"""DeepSeekMoE-16B for transformers, without remote code: `DeepseekConfig`, `DeepseekModel`, `DeepseekForCausalLM`.

transformers has no native model type "deepseek", and its DeepSeek-V2 is always MLA. The text model of DeepSeek-OCR-2 is
the exact architecture: MHA, softmax router whose top-k weights are not normalised, ungated shared experts, dense first
layers. `register` puts it under the model type of the public checkpoint.
Source: deepseek-ai/deepseek-moe-16b-base, config.json and modeling_deepseek.py; arXiv:2401.06066.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)

from epsim.errors import InputError

MODEL_TYPE = "deepseek"

# Fields of config.json, and the only value of each that the architecture can express.
_FIXED = {"norm_topk_prob": False, "moe_layer_freq": 1, "scoring_func": "softmax", "topk_method": "greedy"}


class DeepseekConfig(DeepseekOcr2TextConfig):
    """The config.json of DeepSeekMoE-16B: `first_k_dense_replace` leading layers are dense."""

    model_type = MODEL_TYPE

    mlp_layer_types: list[str] | None = None
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mlp_layer_types is None:
            dense = min(self.first_k_dense_replace, self.num_hidden_layers)
            self.mlp_layer_types = ["dense"] * dense + ["sparse"] * (self.num_hidden_layers - dense)
        super().__post_init__(**kwargs)


class DeepseekModel(DeepseekOcr2TextModel):
    """The decoder stack."""

    config_class = DeepseekConfig
    # Found by a look into the source of the class's module, where a subclass has nothing to find.
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """The decoder stack and its output head, with the weight names of the public checkpoint."""

    config_class = DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _can_set_experts_implementation_cached_value = True
    _can_set_attn_implementation_cached_value = True

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> MoeCausalLMOutputWithPast:
        """Return the logits of every position; the arguments are those of `DeepseekModel`."""
        outputs = self.model(input_ids=input_ids, **inputs)
        return MoeCausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state), past_key_values=outputs.past_key_values
        )


def check_expressible(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError if a config.json asks for what `DeepseekModel` does not do; `where` begins the message."""
    for name, value in _FIXED.items():
        found = config.get(name)
        if found is not None and found != value:
            raise InputError(f"{where}{name}: {found!r} is not what DeepSeekMoE-16B has; only {value!r} can be run")
    for name in ("num_experts_per_tok", "n_routed_experts", "n_shared_experts"):
        found = config.get(name)
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise InputError(f"{where}{name}: {found!r} is not a count of experts; write 1 or more, as in DeepSeekMoE")


def register() -> None:
    """Make the auto classes of transformers know the model type "deepseek"; a second call changes nothing."""
    if get_checkpoint_conversion_mapping(MODEL_TYPE) is not None:
        return
    register_checkpoint_conversion_mapping(MODEL_TYPE, get_checkpoint_conversion_mapping("qwen2_moe"))
    AutoConfig.register(MODEL_TYPE, DeepseekConfig)
    AutoModel.register(DeepseekConfig, DeepseekModel)
    AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)

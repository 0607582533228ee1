"""A model ready to be traced: `MoeModel`, and `ForwardPass`, one run of its decoder stack.

Shapes: B requests of a batch, S columns (positions, padding on the left), D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from epsim.errors import InputError
from epsim.trace.meta import Phase, TraceShape

if TYPE_CHECKING:
    from epsim.capture.modality_gate import ModalityGate


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """What the decoder stack is about to run: a prefill, a chunk of one, or a decode step of a batch.

    Attributes:
        phase: prefill or decode.
        step: 0 in prefill, else the decode step 1, 2, …
        is_text_BS: bool [B, S], of the tokens of this pass: text rather than vision; padding counts as text.
        is_token_BS: bool [B, S], of the tokens of this pass: False for padding, and for a request that has ended.
        is_key_BP: bool [B, P + S], of everything in the KV cache and then this pass: False for padding.
    """

    phase: Phase
    step: int
    is_text_BS: Tensor
    is_token_BS: Tensor
    is_key_BP: Tensor

    @property
    def num_past(self) -> int:
        """Columns in the KV cache before this pass, P."""
        return self.is_key_BP.shape[1] - self.is_text_BS.shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeModel:
    """A causal MoE language model, or a LLaVA-style model around one, in evaluation mode on one device.

    Attributes:
        name: of the model card or the checkpoint, for `TraceMeta.model`.
        module: the whole model: a `...ForCausalLM` or a `LlavaForConditionalGeneration`.
        random_weights: the weights were drawn and not trained.
        source: what is needed to get the same model again; goes into the trace.
        folder: of the checkpoint on this disk, with its tokenizer; None if the weights were drawn.
        modality_gate: attached to the routers, which then must be told of every pass; None for plain routers.
    """

    name: str
    module: PreTrainedModel
    random_weights: bool
    source: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    modality_gate: "ModalityGate | None" = None

    @property
    def is_vlm(self) -> bool:
        """Whether it takes images."""
        return hasattr(self.module.model, "language_model")

    @property
    def decoder(self) -> PreTrainedModel:
        """The decoder stack: embeddings in, last hidden states out."""
        inner = self.module.model
        decoder: PreTrainedModel = inner.language_model if self.is_vlm else inner
        return decoder

    @property
    def layers(self) -> list[Any]:
        """All decoder layers in order, dense ones too; each has `self_attn` and `mlp`."""
        return list(self.decoder.layers)

    @cached_property
    def layer_ids(self) -> tuple[int, ...]:
        """Indices into `layers` of the MoE layers, ascending; theirs have `mlp.gate` and `mlp.experts`."""
        found = tuple(i for i, layer in enumerate(self.layers) if hasattr(layer.mlp, "experts"))
        if not found:
            raise InputError(f"{self.name}: has no experts to route to; name a Mixture-of-Experts model")
        return found

    @property
    def shape(self) -> TraceShape:
        """MoE layers, logical experts, top-k."""
        gate = self.layers[self.layer_ids[0]].mlp.gate
        return TraceShape(layer_ids=self.layer_ids, num_experts=gate.num_experts, topk=gate.top_k)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, D."""
        return int(self.decoder.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.module.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in and layers compute in."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for an image patch in a prompt; None for a text model."""
        return int(self.module.config.image_token_id) if self.is_vlm else None

    @property
    def suppressed_token_ids(self) -> tuple[int, ...]:
        """Ids that greedy decoding must never choose: the image token, which only stands in prompts."""
        return () if self.image_token_id is None else (self.image_token_id,)

    def embed(self, token_ids_BS: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Return the decoder's input [B, S, D]: token embeddings, with image features where image tokens stand.

        Args:
            token_ids_BS: int64 [B, S] on the model's device.
            pixel_values: [images, 3, height, width], in the order of the image tokens, or None without images.
        """
        embeddings: Tensor = self.decoder.get_input_embeddings()(token_ids_BS)
        if pixel_values is None or self.image_token_id is None:
            return embeddings
        features = self.module.get_image_features(
            pixel_values=pixel_values.to(self.device, self.dtype), return_dict=True
        )
        image_features = torch.cat(list(features.pooler_output)).to(embeddings.dtype)
        mask = token_ids_BS.eq(self.image_token_id).unsqueeze(-1).expand_as(embeddings)
        return embeddings.masked_scatter(mask, image_features)

"""The attention-accumulated modality score of SMoES (arXiv 2604.23996, eq. 2-4): `AttentionScore`.

The attention call of the model carries the scores along: its values get one more channel, the layer-input score of
every key, so that the same softmax(q k) that mixes the values mixes the scores (eq. 3). The paths to that are
`attention_with_scores` and `attention_of_scores`.

Shapes: B requests of a batch, S columns of this pass, P all columns up to and with this pass, H query heads, D head
size, L MoE layers. A score is the share of text, from 0 to 1; that of vision is what is left to 1.
"""

from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from epsim.capture.model import ForwardPass, MoeModel
from epsim.errors import InputError

IMPLEMENTATION = "epsim_attention_score"
BASE_IMPLEMENTATION = "sdpa"
ALIGNMENT = 8  # the fused CUDA kernels want head sizes that are a multiple of it

_SCORE_OF_MODULE: "WeakKeyDictionary[nn.Module, ReferenceType[AttentionScore]]" = WeakKeyDictionary()


class AttentionScore:
    """The score after the attention of each MoE layer: `ScoreEstimator` "attention".

    M^(0) is the hard label (eq. 2). In every decoder layer, dense ones too, M~ is the mean over the query heads of
    attention times M^(l) (eq. 3), and M^(l+1) weights it by the norms in the residual sum (eq. 4): ||x_attn|| of
    what `self_attn` returns, after its output projection, and ||x|| of the residual stream that enters the layer.
    The paper leaves open which M a layer's router sees. Here MoE layer l gets M^(l+1), the score after its
    attention, as that is what the input of its experts is made of.

    Scores and norms are float32; the channel has the type of the model's values, and so have the heads' M~. In small
    models of 26 MoE layers that moved a score by at most 1.2e-3 in bfloat16 and 1.4e-4 in float16. But for
    rounding, scores do not depend on how the columns were cut into passes. Padding, and requests that have ended, keep
    their hard label.
    """

    name = "attention"

    def __init__(self) -> None:
        self._model: MoeModel | None = None
        self._handles: list[RemovableHandle] = []
        self.start_batch()

    def attach(self, model: MoeModel) -> None:
        """Switch the attention of the language model to one that carries scores, and hook its layers.

        Raises InputError if this estimator is attached already, or the model's attention is not SDPA.
        """
        if self._model is not None:
            raise InputError(f"{self.name} score: it is attached to {self._model.name}; detach it first")
        found = model.decoder.config._attn_implementation
        if found != BASE_IMPLEMENTATION:
            raise InputError(
                f'{model.name}: the attention score runs through the attention implementation "{BASE_IMPLEMENTATION}", '
                f'not "{found}"; load the model with attn_implementation="{BASE_IMPLEMENTATION}"'
            )
        self._model = model
        model.decoder.set_attn_implementation(IMPLEMENTATION)
        for index, layer in enumerate(model.layers):
            _SCORE_OF_MODULE[layer.self_attn] = ref(self)
            self._handles += [
                layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
                layer.self_attn.register_forward_hook(
                    lambda _module, _args, output, index=index: self._leave_attention(index, output[0])
                ),
            ]
        self.start_batch()

    def detach(self) -> None:
        """Take the hooks off and put the model's own attention back; without an attached model nothing happens."""
        if self._model is None:
            return
        for handle in self._handles:
            handle.remove()
        for layer in self._model.layers:
            _SCORE_OF_MODULE.pop(layer.self_attn, None)
        self._model.decoder.set_attn_implementation(BASE_IMPLEMENTATION)
        self._model, self._handles = None, []
        self.start_batch()

    def start_batch(self) -> None:
        """Forget the keys' scores: the next pass begins the prefill of other requests."""
        num_layers = len(self._model.layers) if self._model else 0
        self._keys_BP: list[Tensor | None] = [None] * num_layers
        self._after_BS: list[Tensor] = []
        self._score_BS: Tensor | None = None

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Take the hard labels of the columns that the decoder runs next.

        Raises RuntimeError if the KV cache holds other columns than this estimator has seen since `start_batch`.
        """
        seen = self._keys_BP[0].shape[1] if self._keys_BP and self._keys_BP[0] is not None else 0
        if seen != forward_pass.num_past:
            raise RuntimeError(f"attention score: {seen} columns seen, {forward_pass.num_past} in the KV cache")
        self._is_token_BS = forward_pass.is_token_BS
        labels_BS = forward_pass.is_text_BS | ~forward_pass.is_token_BS
        self._score_BS = labels_BS.to(torch.float32)
        self._after_BS = []

    def scores_BSL(self) -> Tensor:
        """Return the scores of the pass that just ran: float32 [B, S, L]; at padding the label 1."""
        if self._model is None or len(self._after_BS) != len(self._model.layers):
            raise RuntimeError("attention score: no pass has run since start_pass")
        return torch.stack([self._after_BS[layer_id] for layer_id in self._model.layer_ids], dim=-1)

    def _keys(self, layer_index: int) -> Tensor:
        """Return the layer-input score of every key, float32 [B, P], and keep it for the next pass."""
        past_BP, score_BS = self._keys_BP[layer_index], self._score_BS
        assert score_BS is not None
        keys_BP = score_BS if past_BP is None else torch.cat((past_BP, score_BS), dim=1)
        self._keys_BP[layer_index] = keys_BP
        return keys_BP

    def _enter_layer(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._residual_norm_BS = _norm(args[0] if args else kwargs["hidden_states"])

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention's output [B, S, H, D] and keep the score of what each column attended to, M~ (eq. 3).

        The arguments are those of an attention function of transformers.
        """
        if self._score_BS is None or len(self._after_BS) == len(self._keys_BP):
            raise RuntimeError("attention score: start_pass must come before the decoder runs")
        keys_BP = self._keys(len(self._after_BS))
        if query.shape[2] > 1:
            output, heads_BSH = attention_with_scores(module, query, key, value, keys_BP, *args, **kwargs)
        else:
            output = sdpa_attention_forward(module, query, key, value, *args, **kwargs)[0]
            heads_BSH = attention_of_scores(module, query, key, value, keys_BP, *args, **kwargs)
        self._attended_BS = heads_BSH.detach().mean(dim=-1, dtype=torch.float32)
        return output

    @torch.no_grad()
    def _leave_attention(self, layer_index: int, output: Tensor) -> None:
        assert self._score_BS is not None
        assert len(self._after_BS) == layer_index
        score_BS = combine(self._score_BS, self._attended_BS, self._residual_norm_BS, _norm(output))
        self._score_BS = torch.where(self._is_token_BS, score_BS, self._score_BS)
        self._after_BS.append(self._score_BS)


def combine(score: Tensor, attended: Tensor, residual_norm: Tensor, attention_norm: Tensor) -> Tensor:
    """Return M^(l+1) from M^(l), M~ and the norms of x and x_attn, all of one shape (SMoES, eq. 4).

    Where both norms are 0, M^(l+1) is M^(l). The result is kept in [0, 1] against rounding.
    """
    weight = attention_norm / (attention_norm + residual_norm).clamp_min(torch.finfo(torch.float32).tiny)
    return (score + weight * (attended - score)).clamp(0.0, 1.0)


def attention_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_BP: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Return the output of SDPA [B, S, H, D] and attention times scores of each head [B, S, H], in one call.

    The values get zeros up to the next multiple of 8, and the channel. Queries and keys of the same size get zeros
    too: with unequal sizes flash attention and grouped queries would be lost. Where values are smaller from the start
    (latent attention) queries and keys stay: flash attention takes no unequal sizes, with scores or without.

    Args:
        module: the attention module, which knows its number of query heads per key head.
        query: [B, H, S, head size]; key and value: [B, key heads, P, head size].
        scores_BP: [B, P], of every key, finite also at padding.
        attention_mask: of `sdpa_mask`: bool [B, 1, S, P], or None for a causal or no mask.
        scaling: of the logits; None for one over the root of the head size.
    """
    head_size, value_size = query.shape[-1], value.shape[-1]
    width = value_size + ALIGNMENT - value_size % ALIGNMENT
    scaling = head_size**-0.5 if scaling is None else scaling
    if width == head_size:
        width += ALIGNMENT  # sizes that differ stay different
    if head_size == value_size:
        query, key = (F.pad(tensor, (0, width - head_size)) for tensor in (query, key))
    value = F.pad(value, (0, width - value_size))
    value[..., value_size] = scores_BP[:, None].to(value.dtype)
    mixed = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)[0]
    return mixed[..., :value_size], mixed[..., value_size]


def attention_of_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores_BP: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Return attention times scores of each head [B, S, H] in a call of its own, beside that of the model.

    The arguments are those of `attention_with_scores`. The values are the scores and zeros up to the size of the keys,
    the same for all heads, so that flash attention takes them. It reads the keys once more, but copies nothing: for
    one query (a decode step) that is less than the other way, which copies all keys and values of the cache.
    """
    channel = F.pad(scores_BP[:, None, :, None].to(value.dtype), (0, key.shape[-1] - 1))
    channel = channel.expand(-1, key.shape[1], -1, -1)
    mixed: Tensor = sdpa_attention_forward(module, query, key, channel, attention_mask, scaling=scaling, **kwargs)[0]
    return mixed[..., 0]


def _norm(hidden: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=torch.float32)
    return norm


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    score = _SCORE_OF_MODULE[module]()
    assert score is not None  # the module's hook holds it
    return score.attend(module, query, key, value, attention_mask, **kwargs), None


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)

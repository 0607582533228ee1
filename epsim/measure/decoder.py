"""`Decoder`: a MoE decoder with random weights whose experts are those of one rank, for inference on any device.

It has the shapes of a model card and no router of its own to decide: experts of each token are given, as a trace has
them. What it leaves out of a real model: norms of queries and keys, biases, and the choice of the top k.

Shapes: T tokens of a step on a rank, H hidden size, K top-k, E logical experts, L MoE layers, X slots of this rank,
V vectors, N (vector, slot) pairs, Q requests.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from epsim.errors import InputError
from epsim.measure.attention import Rotary, attention_layer, rms_norm, rotary_size
from epsim.measure.feed_forward import GatedFfn, RoutedExperts
from epsim.measure.kv_cache import AttentionBatch, KvCache
from epsim.measure.vision import VisionTower
from epsim.measure.weights import NO_LAYER, Weights
from epsim.model import ModelCard

IntArray = npt.NDArray[np.int32]
__all__ = ["AttentionBatch", "Decoder", "KvCache"]


class Decoder:
    """Parts of the forward pass, to be called in order with an exchange of vectors in between.

    Callers hold torch.inference_mode. A layer is: attend, route, experts (wherever they are) and shared, and the sum
    of hidden_TH and what these return.

    Args:
        experts_LX: int32 [L, X], logical expert in each of this rank's slots, -1 for an empty one. Any two decoders
            of the same seed, device kind and dtype have the same weights in an expert, and in all that is not routed.

    Raises:
        InputError: The card is of a dense model.
    """

    def __init__(
        self, card: ModelCard, *, experts_LX: IntArray, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if card.moe is None:
            raise InputError(f"model: {card.name} has no experts to spread over ranks; name a MoE model")
        if experts_LX.ndim != 2 or len(experts_LX) != len(card.moe_layer_ids):
            raise ValueError(f"experts_LX has shape {experts_LX.shape}, the model {len(card.moe_layer_ids)} MoE layers")
        if experts_LX.size and not -1 <= experts_LX.min() <= experts_LX.max() < card.num_experts:
            raise ValueError(f"experts_LX names experts outside -1..{card.num_experts - 1}")
        self.card = card
        self.num_layers = len(card.moe_layer_ids)
        weights = Weights(seed=seed, device=device, dtype=dtype)
        size, moe = card.hidden_size, card.moe
        rotary = Rotary(rotary_size(card), device, dtype)
        layers = range(card.num_layers)
        self._attention_norms = [weights.norm(layer, "attention norm", size) for layer in layers]
        self._ffn_norms = [weights.norm(layer, "ffn norm", size) for layer in layers]
        self._attention = [attention_layer(card, weights, layer, rotary) for layer in layers]
        dense = range(card.num_dense_layers)
        self._dense = [GatedFfn(weights, layer, "dense", size, card.dense_ffn_size or 0) for layer in dense]
        routed = card.moe_layer_ids
        self._routers = [weights.matrix(layer, "router", card.num_experts, size, fan_in=size) for layer in routed]
        width = moe.shared_ffn_size
        self._shared = [GatedFfn(weights, layer, "shared", size, width) if width else None for layer in routed]
        self._experts = [
            RoutedExperts(weights, layer, expert_X, size, moe.expert_ffn_size)
            for layer, expert_X in zip(routed, experts_LX, strict=True)
        ]
        self._vision = None if card.vision is None else VisionTower(card.vision, weights)
        self._embedding = weights.matrix(NO_LAYER, "embedding", card.vocab_size, size, fan_in=1)
        self._final_norm = weights.norm(NO_LAYER, "final norm", size)
        self._head = self._embedding
        if not card.tie_embeddings:
            self._head = weights.matrix(NO_LAYER, "head", card.vocab_size, size, fan_in=size)

    def vision(self, num_images: int) -> Tensor:
        """Return the vision tokens of images of random pixels, [num_images * tokens_per_image, H].

        Raises InputError if the model has no vision encoder.
        """
        if self._vision is None:
            raise InputError(f"model: {self.card.name} has no vision encoder; add model.vision")
        return self._vision(num_images)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return the embedding of tokens, [T, H]; ids are taken modulo the vocabulary."""
        return embedding(token_ids_T % self.card.vocab_size, self._embedding)

    def attend(self, layer: int, hidden_TH: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return hidden_TH after the attention of MoE layer `layer`; for layer 0 after the dense layers before it."""
        if layer == 0:
            for dense_layer in range(self.card.num_dense_layers):
                hidden_TH = self.attention(dense_layer, hidden_TH, batch, cache)
                hidden_TH = self.dense_ffn(dense_layer, hidden_TH)
        return self.attention(self.card.num_dense_layers + layer, hidden_TH, batch, cache)

    def attention(self, decoder_layer: int, hidden_TH: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return hidden_TH after the attention of a decoder layer, dense ones counted."""
        if not len(hidden_TH):
            return hidden_TH
        normed_TH = rms_norm(hidden_TH, self._attention_norms[decoder_layer])
        return hidden_TH + self._attention[decoder_layer](normed_TH, batch, cache)

    def dense_ffn(self, decoder_layer: int, hidden_TH: Tensor) -> Tensor:
        """Return hidden_TH after the FFN of a leading dense layer."""
        return hidden_TH + self._dense[decoder_layer](rms_norm(hidden_TH, self._ffn_norms[decoder_layer]))

    def route(self, layer: int, hidden_TH: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed tokens, [T, H], and the weights of the given experts, float32 [T, K], which sum to 1.

        expert_ids_TK: int64, logical experts.
        """
        normed_TH = rms_norm(hidden_TH, self._ffn_norms[self.card.num_dense_layers + layer])
        scores_TE = linear(normed_TH, self._routers[layer]).softmax(dim=-1, dtype=torch.float32)
        weights_TK = scores_TE.gather(1, expert_ids_TK)
        return normed_TH, weights_TK / weights_TK.sum(dim=-1, keepdim=True)

    def shared(self, layer: int, normed_TH: Tensor) -> Tensor | None:
        """Return what the shared experts add, [T, H]; None where the model has none."""
        shared = self._shared[layer]
        return None if shared is None else shared(normed_TH)

    def experts(
        self, layer: int, vectors_VH: Tensor, vector_of_pair_N: Tensor, slot_of_pair_N: Tensor, weight_N: Tensor
    ) -> Tensor:
        """Return [V, H] in the dtype of the vectors: of each, the weighted sum over its pairs of the slots' experts.

        vector_of_pair_N, slot_of_pair_N: int64, pairs in any order. weight_N: gate weights.
        """
        return self._experts[layer](vectors_VH, vector_of_pair_N, slot_of_pair_N, weight_N)

    def head(self, hidden_QH: Tensor) -> Tensor:
        """Return the next token of each request, int64 [Q]: the largest logit."""
        return linear(rms_norm(hidden_QH, self._final_norm), self._head).argmax(dim=-1)

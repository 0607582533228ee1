"""Attention of one decoder layer with its cache: `GroupedQuery`, `Latent`; positions turned into angles by `Rotary`.

Shapes: T tokens of a step, Q requests, S cached tokens, H hidden size, A query heads, B key-value heads, G = A / B,
D size of a head, C cached elements of a token, R size of the latent, P size of the rotary part of a latent head.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from epsim.measure.kv_cache import AttentionBatch, KvCache
from epsim.measure.weights import Weights
from epsim.model import GroupedQueryAttention, LatentAttention, ModelCard

ROTARY_BASE = 10000.0


class Rotary:
    """Rotary position embedding (arXiv:2104.09864), the first half of a head rotated against the second."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = ROTARY_BASE ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
        self._dtype = dtype
        self._batch: AttentionBatch | None = None
        self._angles: tuple[Tensor, Tensor] = (self._frequencies, self._frequencies)

    def __call__(self, heads_TAD: Tensor, batch: AttentionBatch) -> Tensor:
        """Return the heads of the batch's tokens turned by their positions."""
        if self._batch is not batch:  # one step's layers share their angles
            angles_T1P = torch.outer(batch.position_T.float(), self._frequencies)[:, None]
            self._angles = angles_T1P.cos().to(self._dtype), angles_T1P.sin().to(self._dtype)
            self._batch = batch
        cos, sin = self._angles
        first, second = heads_TAD.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class AttentionLayer(Protocol):
    """Attention of one layer."""

    def __call__(self, normed_TH: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Add the tokens to the cache and return what they get from it, [T, H]."""


def attention_layer(card: ModelCard, weights: Weights, decoder_layer: int, rotary: Rotary) -> AttentionLayer:
    """Return the attention of a decoder layer, with its weights drawn."""
    if isinstance(card.attention, LatentAttention):
        return Latent(card.attention, card.hidden_size, weights, decoder_layer, rotary)
    return GroupedQuery(card.attention, card.hidden_size, weights, decoder_layer, rotary)


def rotary_size(card: ModelCard) -> int:
    """Return how many elements of a head are turned."""
    is_latent = isinstance(card.attention, LatentAttention)
    return card.attention.qk_rope_head_dim if is_latent else card.attention.head_dim  # type: ignore[union-attr]


class GroupedQuery:
    """Multi-head attention; groups of query heads may share a key and a value head."""

    def __init__(
        self, shape: GroupedQueryAttention, hidden_size: int, weights: Weights, layer: int, rotary: Rotary
    ) -> None:
        self._layer, self._rotary = layer, rotary
        self._heads, self._kv_heads, self._size = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self._q_size, self._kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        rows = self._q_size + 2 * self._kv_size
        self._qkv = weights.matrix(layer, "qkv", rows, hidden_size, fan_in=hidden_size)
        self._out = weights.matrix(layer, "attention out", hidden_size, self._q_size, fan_in=self._q_size)

    def __call__(self, normed_TH: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        num_tokens = len(normed_TH)
        q, k, v = linear(normed_TH, self._qkv).split_with_sizes([self._q_size, self._kv_size, self._kv_size], dim=-1)
        q_TAD = self._rotary(q.reshape(num_tokens, self._heads, self._size), batch)
        k_TBD = self._rotary(k.reshape(num_tokens, self._kv_heads, self._size), batch)
        rows_TC = torch.cat([k_TBD.reshape(num_tokens, -1), v], dim=-1)
        cache.append(self._layer, batch, rows_TC)
        seen = self._decode(q_TAD, batch, cache) if batch.decode else self._prefill(q_TAD, rows_TC, batch, cache)
        return linear(seen, self._out)

    def _keys_values(self, rows_xC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, [..., heads, tokens, D], views of cached rows [..., tokens, C]."""
        shape = (*rows_xC.shape[:-1], self._kv_heads, self._size)
        keys, values = rows_xC.chunk(2, dim=-1)
        return keys.view(shape).transpose(-2, -3), values.view(shape).transpose(-2, -3)

    def _prefill(self, q_TAD: Tensor, rows_TC: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return [T, A * D]: causal, request by request."""
        groups = self._heads // self._kv_heads
        seen = []
        for request, span, context in batch.spans():
            causal = _causal(span, context, rows_TC.device)
            whole = rows_TC[span] if "is_causal" in causal else cache.prompt(self._layer, request, context)
            k_BSD, v_BSD = self._keys_values(whole)
            q_BGSD = q_TAD[span].view(-1, self._kv_heads, groups, self._size).permute(1, 2, 0, 3)
            k_BGSD, v_BGSD = (part[:, None].expand(-1, groups, -1, -1) for part in (k_BSD, v_BSD))
            seen_BGSD = scaled_dot_product_attention(q_BGSD, k_BGSD, v_BGSD, **causal)
            seen.append(seen_BGSD.permute(2, 0, 1, 3).reshape(-1, self._q_size))
        return torch.cat(seen)

    def _decode(self, q_TAD: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return [T, A * D]: all requests at once; the query heads of a group are rows of one product."""
        k_QBSD, v_QBSD = self._keys_values(cache.read(self._layer, batch))
        q_QBGD = q_TAD.view(len(q_TAD), self._kv_heads, -1, self._size)
        mask = None if batch.mask_QS is None else batch.mask_QS[:, None, None, :]
        return scaled_dot_product_attention(q_QBGD, k_QBSD, v_QBSD, attn_mask=mask).reshape(-1, self._q_size)


class Latent:
    """Multi-head latent attention: prefill expands keys and values, decode works on the cached latent itself."""

    def __init__(self, shape: LatentAttention, hidden_size: int, weights: Weights, layer: int, rotary: Rotary) -> None:
        self._layer, self._rotary, self._shape = layer, rotary, shape
        heads, nope, rank = shape.num_heads, shape.qk_nope_head_dim, shape.kv_lora_rank
        self._scale = shape.qk_head_dim**-0.5
        q_in, self._q_down = hidden_size, None
        if shape.q_lora_rank is not None:
            q_in = shape.q_lora_rank
            self._q_down = weights.matrix(layer, "q down", q_in, hidden_size, fan_in=hidden_size)
            self._q_norm = weights.norm(layer, "q norm", q_in)
        self._q_up = weights.matrix(layer, "q", heads * shape.qk_head_dim, q_in, fan_in=q_in)
        kv_size = shape.kv_size
        self._kv_down = weights.matrix(layer, "kv down", kv_size, hidden_size, fan_in=hidden_size)
        self._kv_norm = weights.norm(layer, "kv norm", rank)
        self._k_up_ANR = weights.matrix(layer, "k up", heads, nope, rank, fan_in=rank)
        self._v_up_AVR = weights.matrix(layer, "v up", heads, shape.v_head_dim, rank, fan_in=rank)
        v_size = heads * shape.v_head_dim
        self._out = weights.matrix(layer, "attention out", hidden_size, v_size, fan_in=v_size)

    def __call__(self, normed_TH: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        shape = self._shape
        q_in = normed_TH if self._q_down is None else rms_norm(linear(normed_TH, self._q_down), self._q_norm)
        q_TAD = linear(q_in, self._q_up).view(-1, shape.num_heads, shape.qk_head_dim)
        q_nope, q_rope = q_TAD.split_with_sizes([shape.qk_nope_head_dim, shape.qk_rope_head_dim], dim=-1)
        latent, key = linear(normed_TH, self._kv_down).split_with_sizes(
            [shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1
        )
        key_TP = self._rotary(key[:, None], batch)[:, 0]
        rows_TC = torch.cat([rms_norm(latent, self._kv_norm), key_TP], dim=-1)
        cache.append(self._layer, batch, rows_TC)
        q_rope = self._rotary(q_rope, batch)
        if batch.decode:
            seen = self._decode(q_nope, q_rope, batch, cache)
        else:
            seen = self._prefill(torch.cat([q_nope, q_rope], dim=-1), rows_TC, batch, cache)
        return linear(seen.flatten(1), self._out)

    def _prefill(self, q_TAD: Tensor, rows_TC: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return [T, A, V]: causal, request by request, with keys and values expanded from the latent."""
        expanded = self._expanded(rows_TC)
        seen = []
        for request, span, context in batch.spans():
            causal = _causal(span, context, rows_TC.device)
            k_SAD, v_SAV = (part[span] for part in expanded)
            if "is_causal" not in causal:
                k_SAD, v_SAV = self._expanded(cache.prompt(self._layer, request, context))
            q, k, v = (part.transpose(0, 1)[None] for part in (q_TAD[span], k_SAD, v_SAV))
            seen_ASV = scaled_dot_product_attention(q, k, v, scale=self._scale, **causal)[0]
            seen.append(seen_ASV.transpose(0, 1))
        return torch.cat(seen)

    def _expanded(self, rows_SC: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [S, A, D] and values [S, A, V] of cached rows."""
        shape = self._shape
        latent_SR, key_SP = rows_SC.split_with_sizes([shape.kv_lora_rank, shape.qk_rope_head_dim], dim=-1)
        k_nope = linear(latent_SR, self._k_up_ANR.flatten(0, 1)).view(-1, shape.num_heads, shape.qk_nope_head_dim)
        k_SAD = torch.cat([k_nope, key_SP[:, None].expand(-1, shape.num_heads, -1)], dim=-1)
        return k_SAD, linear(latent_SR, self._v_up_AVR.flatten(0, 1)).view(-1, shape.num_heads, shape.v_head_dim)

    def _decode(self, q_nope_TAN: Tensor, q_rope_TAP: Tensor, batch: AttentionBatch, cache: KvCache) -> Tensor:
        """Return [T, A, V]: the expansion of keys is folded into the query, that of values into the output."""
        rows_QSC = cache.read(self._layer, batch)
        q_ATR = torch.bmm(q_nope_TAN.transpose(0, 1), self._k_up_ANR)
        q_QAC = torch.cat([q_ATR.transpose(0, 1), q_rope_TAP], dim=-1)
        scores_QAS = torch.bmm(q_QAC, rows_QSC.transpose(1, 2)) * self._scale
        if batch.mask_QS is not None:
            scores_QAS = scores_QAS.masked_fill(~batch.mask_QS[:, None, :], float("-inf"))
        share_QAS = scores_QAS.softmax(dim=-1, dtype=torch.float32).to(q_QAC.dtype)
        seen_QAR = torch.bmm(share_QAS, rows_QSC[..., : self._shape.kv_lora_rank])
        return torch.bmm(seen_QAR.transpose(0, 1), self._v_up_AVR.transpose(1, 2)).transpose(0, 1)


def _causal(span: slice, context: int, device: torch.device) -> dict[str, Any]:
    """Return how attention is told that tokens see those before them; what precedes `span` is in the cache."""
    count = span.stop - span.start
    if count == context:
        return {"is_causal": True}
    seen_SS = torch.ones(count, context, dtype=torch.bool, device=device).tril(context - count)
    return {"attn_mask": seen_SS}


def rms_norm(vectors_xH: Tensor, weight_H: Tensor) -> Tensor:
    """Return the vectors over their root mean square, times the weight."""
    return torch.nn.functional.rms_norm(vectors_xH, weight_H.shape, weight_H, eps=1e-6)

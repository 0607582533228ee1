"""`forward`: what `epsim.measure.decoder` computes, in float64, token by token, without cache, batches or groups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import erf, sqrt

import numpy as np
import numpy.typing as npt
import torch

from epsim.measure.weights import NO_LAYER, Weights
from epsim.model import LatentAttention, ModelCard, VisionEncoder

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request. experts_SLK: experts of each token. vision: the tokens in front that an image gives, [S', H]."""

    token_ids: Sequence[int]
    experts_SLK: npt.NDArray[np.int64]
    vision: Floats


class Reference:
    def __init__(self, card: ModelCard, seed: int) -> None:
        self.card = card
        self._weights = Weights(seed=seed, device=torch.device("cpu"), dtype=torch.float32)

    def matrix(self, layer: int, part: str, *shape: int, fan_in: int, expert: int = -1) -> Floats:
        return self._weights.matrix(layer, part, *shape, fan_in=fan_in, expert=expert).double().numpy()

    def norm(self, layer: int, part: str, size: int) -> Floats:
        return self._weights.norm(layer, part, size).double().numpy()

    def forward(self, request: Request) -> tuple[Floats, list[int]]:
        """Return the hidden vectors behind the last layer, [S, H], and the token that the head takes after each."""
        card, size = self.card, self.card.hidden_size
        embedding = self.matrix(NO_LAYER, "embedding", card.vocab_size, size, fan_in=1)
        hidden = [embedding[token % card.vocab_size] for token in request.token_ids]
        hidden[: len(request.vision)] = list(request.vision)
        for layer in range(card.num_layers):
            norm = self.norm(layer, "attention norm", size)
            seen = self._attention(layer, [rms(vector, norm) for vector in hidden])
            hidden = [vector + more for vector, more in zip(hidden, seen, strict=True)]
            norm = self.norm(layer, "ffn norm", size)
            hidden = [vector + self._ffn(layer, rms(vector, norm), s, request) for s, vector in enumerate(hidden)]
        head = embedding if card.tie_embeddings else self.matrix(NO_LAYER, "head", card.vocab_size, size, fan_in=size)
        norm = self.norm(NO_LAYER, "final norm", size)
        return np.array(hidden), [int(np.argmax(head @ rms(vector, norm))) for vector in hidden]

    def _ffn(self, layer: int, x: Floats, s: int, request: Request) -> Floats:
        card, size = self.card, self.card.hidden_size
        assert card.moe is not None
        if layer < card.num_dense_layers:
            return self._gated(layer, "dense", x, card.dense_ffn_size or 0)
        logits = self.matrix(layer, "router", card.num_experts, size, fan_in=size) @ x
        shares = np.exp(logits - logits.max())
        chosen = request.experts_SLK[s, layer - card.num_dense_layers]
        out = np.zeros(size)
        for expert in chosen:
            width = card.moe.expert_ffn_size
            gate_up = self.matrix(layer, "expert gate up", size, 2 * width, fan_in=size, expert=int(expert))
            down = self.matrix(layer, "expert down", width, size, fan_in=width, expert=int(expert))
            both = x @ gate_up
            weight = shares[expert] / sum(shares[e] for e in chosen)
            out += weight * ((silu(both[:width]) * both[width:]) @ down)
        if card.moe.shared_ffn_size:
            out += self._gated(layer, "shared", x, card.moe.shared_ffn_size)
        return out

    def _gated(self, layer: int, part: str, x: Floats, width: int) -> Floats:
        size = self.card.hidden_size
        both = self.matrix(layer, f"{part} gate up", 2 * width, size, fan_in=size) @ x
        return self.matrix(layer, f"{part} down", size, width, fan_in=width) @ (silu(both[:width]) * both[width:])

    def _attention(self, layer: int, normed: list[Floats]) -> list[Floats]:
        if isinstance(self.card.attention, LatentAttention):
            queries, keys, values = self._latent(layer, normed)
        else:
            queries, keys, values = self._grouped(layer, normed)
        v_size = values.shape[1] * values.shape[2]
        out = self.matrix(layer, "attention out", self.card.hidden_size, v_size, fan_in=v_size)
        seen = []
        for s, query in enumerate(queries):
            heads = []
            for head, q in enumerate(query):
                scores = np.array([q @ keys[t, head] for t in range(s + 1)]) / sqrt(len(q))
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                heads.append(sum(share * values[t, head] for t, share in enumerate(shares)))
            seen.append(out @ np.concatenate(heads))
        return seen

    def _grouped(self, layer: int, normed: list[Floats]) -> tuple[Floats, Floats, Floats]:
        """Return queries, keys and values, [S, heads, D]."""
        shape, size = self.card.attention, self.card.hidden_size
        assert not isinstance(shape, LatentAttention)
        heads, kv_heads, d = shape.num_heads, shape.num_kv_heads, shape.head_dim
        qkv = self.matrix(layer, "qkv", (heads + 2 * kv_heads) * d, size, fan_in=size)
        rows = [(qkv @ x).reshape(-1, d) for x in normed]
        of_head = [heads + head // (heads // kv_heads) for head in range(heads)]
        queries = [[turned(row[head], s) for head in range(heads)] for s, row in enumerate(rows)]
        keys = [[turned(row[at], s) for at in of_head] for s, row in enumerate(rows)]
        values = [[row[at + kv_heads] for at in of_head] for row in rows]
        return np.array(queries), np.array(keys), np.array(values)

    def _latent(self, layer: int, normed: list[Floats]) -> tuple[Floats, Floats, Floats]:
        """Return queries, keys and values, [S, heads, D or V]: everything expanded."""
        shape, size = self.card.attention, self.card.hidden_size
        assert isinstance(shape, LatentAttention)
        heads, nope, rank, lora = shape.num_heads, shape.qk_nope_head_dim, shape.kv_lora_rank, shape.q_lora_rank
        q_up = self.matrix(layer, "q", heads * shape.qk_head_dim, lora or size, fan_in=lora or size)
        kv_down = self.matrix(layer, "kv down", shape.kv_size, size, fan_in=size)
        kv_norm = self.norm(layer, "kv norm", rank)
        k_up = self.matrix(layer, "k up", heads, nope, rank, fan_in=rank)
        v_up = self.matrix(layer, "v up", heads, shape.v_head_dim, rank, fan_in=rank)
        queries, keys, values = [], [], []
        for s, x in enumerate(normed):
            q_in = x
            if lora is not None:
                q_in = rms(self.matrix(layer, "q down", lora, size, fan_in=size) @ x, self.norm(layer, "q norm", lora))
            q = (q_up @ q_in).reshape(heads, -1)
            down = kv_down @ x
            latent, shared_key = rms(down[:rank], kv_norm), turned(down[rank:], s)
            queries.append([np.concatenate([row[:nope], turned(row[nope:], s)]) for row in q])
            keys.append([np.concatenate([k_up[head] @ latent, shared_key]) for head in range(heads)])
            values.append([v_up[head] @ latent for head in range(heads)])
        return np.array(queries), np.array(keys), np.array(values)

    def vision(self, image: int, num_heads: int) -> Floats:
        """Return the vision tokens of an image, [tokens_per_image, H]."""
        shape = self.card.vision
        assert shape is not None
        width, patch, side = shape.hidden_size, shape.patch_size, shape.image_size // shape.patch_size
        pixels = self.matrix(NO_LAYER, "pixels", 3, shape.image_size, shape.image_size, fan_in=1, expert=image)
        kernel = self.matrix(NO_LAYER, "patches", width, 3, patch, patch, fan_in=3 * patch**2)
        rows = list(self.matrix(NO_LAYER, "class tokens", shape.num_class_tokens, width, fan_in=1))
        for y in range(side):
            for x in range(side):
                square = pixels[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                rows.append(np.array([np.sum(kernel[w] * square) for w in range(width)]))
        hidden = np.array(rows) + self.matrix(NO_LAYER, "positions", len(rows), width, fan_in=1)
        for layer in range(shape.num_layers):
            hidden = self._vision_layer(shape, layer, hidden, num_heads)
        grid = hidden[shape.num_class_tokens :].reshape(side, side, width)
        f = shape.pixel_shuffle_factor
        wide, out = width * f * f, shape.output_size
        first = self.matrix(NO_LAYER, "projector in", out, wide, fan_in=wide)
        second = self.matrix(NO_LAYER, "projector out", out, out, fan_in=out)
        merged = [grid[y : y + f, x : x + f].reshape(-1) for y in range(0, side, f) for x in range(0, side, f)]
        return np.array([second @ gelu(first @ token) for token in merged])

    def _vision_layer(self, shape: VisionEncoder, layer: int, hidden: Floats, num_heads: int) -> Floats:
        width, ffn = shape.hidden_size, shape.ffn_size
        d = width // num_heads
        qkv = self.matrix(layer, "vision qkv", 3 * width, width, fan_in=width)
        out = self.matrix(layer, "vision out", width, width, fan_in=width)
        rows = [qkv @ centred(x, self.norm(layer, "vision norm 0", width)) for x in hidden]
        after = []
        for x, row in zip(hidden, rows, strict=True):
            heads = []
            for head in range(num_heads):
                at = slice(head * d, (head + 1) * d)
                scores = np.array([row[:width][at] @ other[width : 2 * width][at] for other in rows]) / sqrt(d)
                shares = np.exp(scores - scores.max())
                shares /= shares.sum()
                heads.append(sum(share * other[2 * width :][at] for share, other in zip(shares, rows, strict=True)))
            after.append(x + out @ np.concatenate(heads))
        up = self.matrix(layer, "vision up", ffn, width, fan_in=width)
        down = self.matrix(layer, "vision down", width, ffn, fan_in=ffn)
        norm = self.norm(layer, "vision norm 1", width)
        return np.array([x + down @ gelu(up @ centred(x, norm)) for x in after])


def rms(x: Floats, weight: Floats) -> Floats:
    return x / np.sqrt(np.mean(x * x) + 1e-6) * weight


def centred(x: Floats, weight: Floats) -> Floats:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


_erf: Callable[[Floats], Floats] = np.vectorize(erf)


def gelu(x: Floats) -> Floats:
    return x * (1 + _erf(x / sqrt(2))) / 2


def turned(x: Floats, position: int) -> Floats:
    """Rotate the pairs (i, i + half) of a head by position * 10000^(-2 i / size)."""
    half = len(x) // 2
    angles = position * 10000.0 ** (-2 * np.arange(half) / len(x))
    first, second = x[:half], x[half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
    )

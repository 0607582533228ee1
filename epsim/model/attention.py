"""Attention of a model card: `GroupedQueryAttention`, `LatentAttention`, and `attention_from_mapping`.

Both say how many weights their projections have, how many elements a token leaves in the KV cache, and what a
(query, key) pair costs. Sizes are elements; one multiply-add is 2 FLOPs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from epsim.errors import ScenarioError
from epsim.model._sizes import check_sizes


@dataclass(frozen=True, kw_only=True)
class GroupedQueryAttention:
    """Query heads that share key and value heads in equal groups; plain multi-head where groups are one."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        check_sizes(self, "model.attention.")
        if self.num_heads % self.num_kv_heads:
            raise ScenarioError(
                f"model.attention.num_kv_heads: {self.num_kv_heads} does not divide "
                f"num_heads {self.num_heads}; write a divisor"
            )

    @property
    def kind(self) -> str:
        """`mha` or `gqa`."""
        return "mha" if self.num_kv_heads == self.num_heads else "gqa"

    def num_params(self, hidden_size: int) -> int:
        """Weights of the q, k, v and output projections."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def kv_size(self) -> int:
        """Elements cached per token: a key and a value per key-value head."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair: q·k and the value's share of the sum, for every query head."""
        return 2 * self.num_heads * 2 * self.head_dim

    @property
    def decode_flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair in decode: the same as in prefill."""
        return self.flops_per_pair

    def uneven(self, size: int) -> str | None:
        """Return the field that `size` devices cannot share evenly, with its value; None if there is none."""
        if self.num_heads % size:
            return f"num_heads {self.num_heads}"
        if self.num_kv_heads % size and size % self.num_kv_heads:
            return f"num_kv_heads {self.num_kv_heads}"
        return None

    def shard(self, size: int) -> Self:
        """Return one device's part of the heads; key-value heads are copied where there are fewer than devices."""
        return replace(self, num_heads=self.num_heads // size, num_kv_heads=max(1, self.num_kv_heads // size))


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), which caches a latent and a rotary key."""

    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, "model.attention.")

    @property
    def kind(self) -> str:
        """`mla`."""
        return "mla"

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head: the part without and the part with rotary embedding."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def num_params(self, hidden_size: int) -> int:
        """Weights of the query (one or two steps), kv down, kv up and output projections."""
        q_size = self.num_heads * self.qk_head_dim
        q = hidden_size * q_size
        if self.q_lora_rank is not None:
            q = self.q_lora_rank * (hidden_size + q_size)
        kv_down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv_down + kv_up + self.num_heads * self.v_head_dim * hidden_size

    @property
    def kv_size(self) -> int:
        """Elements cached per token: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair with keys and values expanded from the latent, as in prefill."""
        return 2 * self.num_heads * (self.qk_head_dim + self.v_head_dim)

    @property
    def decode_flops_per_pair(self) -> int:
        """FLOPs per (query, key) pair with the up-projection absorbed into query and output, as in decode.

        Attention then runs on the latent itself: scores over latent + rotary key, sums over the latent. The
        projections of a token cost the same absorbed or not.
        """
        return 2 * self.num_heads * (self.kv_size + self.kv_lora_rank)

    def uneven(self, size: int) -> str | None:
        """Return the field that `size` devices cannot share evenly, with its value; None if there is none."""
        return f"num_heads {self.num_heads}" if self.num_heads % size else None

    def shard(self, size: int) -> Self:
        """Return one device's part of the heads; the projections to the latent and the cache are copied."""
        return replace(self, num_heads=self.num_heads // size)


def _multi_head(*, num_heads: int, head_dim: int) -> GroupedQueryAttention:
    return GroupedQueryAttention(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim)


Attention = GroupedQueryAttention | LatentAttention

_KINDS: dict[str, Callable[..., Attention]] = {
    "mha": _multi_head,
    "gqa": GroupedQueryAttention,
    "mla": LatentAttention,
}


def attention_from_mapping(values: Mapping[str, Any]) -> Attention:
    """Build an attention from its `kind` and the shapes of that kind.

    Raises ScenarioError on a kind that is not known, TypeError on shapes that the kind does not have.
    """
    shapes = dict(values)
    kind = shapes.pop("kind", None)
    if kind not in _KINDS:
        raise ScenarioError(f'model.attention.kind: "{kind}" is not known; write one of {", ".join(_KINDS)}')
    return _KINDS[kind](**shapes)

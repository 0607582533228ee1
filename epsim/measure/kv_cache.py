"""What a step's tokens are to attention, `AttentionBatch`, and the keys and values of one rank's requests, `KvCache`.

Shapes: T tokens of a step on a rank, Q requests among them, N decoder layers, S tokens of a request, C cached elements
of a token in a layer (`Attention.kv_size`: keys, then values; of latent attention the latent, then the rotary key).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from epsim.model import ModelCard


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionBatch:
    """The tokens of a step whose home a rank is.

    Attributes:
        request_T: int64 [T], row of the cache of each token's request; ascending, each request's tokens together.
        position_T: int64 [T], place of each token in its request; in prefill without gaps.
        decode: one token of each request; else prompts, or the part of a prompt that follows what is cached.
        requests: the rows of the cache, one per request, ascending.
        num_tokens: tokens of each request in this step.
        contexts: tokens of each request that are cached when this step's have been added.
        mask_QS: bool [Q, max context], what each request may look at in decode; None where that is everything.
    """

    request_T: Tensor
    position_T: Tensor
    decode: bool
    requests: tuple[int, ...] = field(init=False)
    num_tokens: tuple[int, ...] = field(init=False)
    contexts: tuple[int, ...] = field(init=False)
    mask_QS: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        if self.request_T.shape != self.position_T.shape or self.request_T.ndim != 1:
            raise ValueError("request_T and position_T must be vectors of the same length")
        requests, counts = torch.unique_consecutive(self.request_T, return_counts=True)
        values = {"requests": requests, "num_tokens": counts}
        for name, tensor in values.items():
            object.__setattr__(self, name, tuple(tensor.tolist()))
        if list(self.requests) != sorted(set(self.requests)):
            raise ValueError(f"request_T names the requests {self.requests}, which do not ascend")
        if self.decode and any(count != 1 for count in self.num_tokens):
            raise ValueError("a decode step has one token of each request")
        ends = self.position_T[counts.cumsum(0) - 1]
        object.__setattr__(self, "contexts", tuple((ends + 1).tolist()))
        within = torch.arange(len(self.position_T), device=ends.device) - (counts.cumsum(0) - counts).repeat_interleave(
            counts
        )
        firsts = (ends + 1 - counts).repeat_interleave(counts)
        if not torch.equal(self.position_T, firsts + within):
            raise ValueError("the tokens of a request follow one another: positions without gaps")
        object.__setattr__(self, "mask_QS", self._mask() if self.decode else None)

    def _mask(self) -> Tensor | None:
        if len(set(self.contexts)) < 2:
            return None
        contexts_Q = self.position_T + 1
        positions_S = torch.arange(max(self.contexts), device=contexts_Q.device)
        return positions_S[None, :] < contexts_Q[:, None]

    def spans(self) -> Iterator[tuple[int, slice, int]]:
        """Yield each request's row of the cache, where its tokens are in the step, and how many it then has cached."""
        start = 0
        for request, count, context in zip(self.requests, self.num_tokens, self.contexts, strict=True):
            yield request, slice(start, start + count), context
            start += count


class KvCache:
    """The cache of one rank, allocated in advance.

    Args:
        num_requests: rows; a batch's request may have the same row on every rank.
        max_tokens: the most tokens of a request, prompt and output.
    """

    def __init__(
        self, card: ModelCard, *, num_requests: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (card.num_layers, num_requests, max_tokens, card.attention.kv_size)
        self._rows_NQSC = torch.zeros(shape, device=device, dtype=dtype)
        self._num_dense_layers = card.num_dense_layers

    def append(self, decoder_layer: int, batch: AttentionBatch, rows_TC: Tensor) -> None:
        """Keep what the step's tokens leave in a decoder layer."""
        rows_QSC = self._rows_NQSC[decoder_layer]
        if batch.decode:
            rows_QSC.index_put_((batch.request_T, batch.position_T), rows_TC)
            return
        for request, span, context in batch.spans():
            rows_QSC[request, context - (span.stop - span.start) : context] = rows_TC[span]

    def prompt(self, decoder_layer: int, request: int, context: int) -> Tensor:
        """Return a view [context, C] of what a request has cached."""
        return self._rows_NQSC[decoder_layer, request, :context]

    def read(self, decoder_layer: int, batch: AttentionBatch) -> Tensor:
        """Return [Q, max context, C] of a batch's requests: a view if their rows are evenly spaced, else a copy."""
        rows_QSC = self._rows_NQSC[decoder_layer, :, : max(batch.contexts)]
        rows = batch.requests
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        if rows == tuple(range(rows[0], rows[-1] + 1, step)):
            return rows_QSC[rows[0] : rows[-1] + 1 : step]
        return rows_QSC.index_select(0, torch.tensor(rows, device=rows_QSC.device))

    def rows(self, layer: int, requests: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Return, as one vector, what requests have in the cache of a MoE layer; layer 0: and of the dense ones."""
        parts = [part.reshape(-1) for part in self._parts(layer, requests, lengths)]
        return torch.cat(parts) if parts else self._rows_NQSC.new_zeros(0)

    def load(self, layer: int, requests: Sequence[int], lengths: Sequence[int], flat: Tensor) -> None:
        """Put back what `rows` of another rank's cache returned for the same arguments.

        Raises ValueError if `flat` has another number of elements.
        """
        parts = list(self._parts(layer, requests, lengths))
        sizes = [part.numel() for part in parts]
        if flat.shape != (sum(sizes),):
            raise ValueError(f"{tuple(flat.shape)} elements for {sum(sizes)} of the cache")
        for part, piece in zip(parts, flat.split_with_sizes(sizes), strict=True):
            part.copy_(piece.view(part.shape))

    def _parts(self, layer: int, requests: Sequence[int], lengths: Sequence[int]) -> Iterator[Tensor]:
        first = 0 if layer == 0 else self._num_dense_layers + layer
        for decoder_layer in range(first, self._num_dense_layers + layer + 1):
            for request, length in zip(requests, lengths, strict=True):
                yield self._rows_NQSC[decoder_layer, request, :length]

    def reset(self) -> None:
        """Forget everything."""
        self._rows_NQSC.zero_()

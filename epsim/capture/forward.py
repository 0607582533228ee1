"""Prefill and greedy decode of a batch with phases and steps made explicit: `run_batch`, whose passes are `PassTokens`.

Shapes: B requests, S columns of a pass (padding on the left), P columns in the KV cache before it, D hidden size.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.prompts.batches import Batch, moved
from epsim.trace.meta import Phase


class Watcher(Protocol):
    """Something with hooks on the model that wants to know what the model is about to run."""

    def start_batch(self) -> None:
        """Forget what is known of the last batch."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Get ready for this pass of the decoder stack."""


@dataclass(frozen=True, kw_only=True)
class PassTokens:
    """A pass that the decoder stack has run, and its tokens.

    Attributes:
        forward_pass: phase, step, masks.
        token_ids_BS: int64 [B, S], what was fed.
        positions_BS: int64 [B, S], places in the requests; 0 for padding.
        num_tokens: without padding; an end-of-sequence token that came early is not subtracted, for only the device
            knows of it.
        ends_prefill: whether the whole prompts are in the KV cache now.
    """

    forward_pass: ForwardPass
    token_ids_BS: Tensor
    positions_BS: Tensor
    num_tokens: int
    ends_prefill: bool


@torch.inference_mode()
def run_batch(
    model: MoeModel,
    batch: Batch,
    *,
    watchers: Sequence[Watcher] = (),
    chunk_size: int | None = None,
    eos_token_ids: Set[int] = frozenset(),
    decode: bool = True,
) -> Iterator[PassTokens]:
    """Run a batch of requests, a pass at a time; yields each pass after it has run.

    A request ends with its first token of `eos_token_ids`, or with `max_new_tokens` of them. The image token is never
    generated. As in serving, the last generated token is not routed: n output tokens take n - 1 decode steps.

    Args:
        batch: on the model's device.
        chunk_size: columns of a prefill that are run at once; None for all.
        decode: False to stop after prefill.
    """
    told = watchers if model.modality_gate is None else (model.modality_gate, *watchers)
    for watcher in told:
        watcher.start_batch()
    run = _Run(model, batch, told)
    yield from run.prefill(chunk_size)
    if decode:
        yield from run.decode(eos_token_ids)


class _Run:
    def __init__(self, model: MoeModel, batch: Batch, watchers: Sequence[Watcher]) -> None:
        self.model = model
        self.batch = batch
        self.watchers = watchers
        self.cache: Any = DynamicCache(config=model.decoder.config)
        self.num_prompt_tokens_B = batch.is_token_BS.sum(1)
        self.last_hidden_BD: Tensor | None = None

    def prefill(self, chunk_size: int | None) -> Iterator[PassTokens]:
        batch = self.batch
        embeddings_BSD = self.model.embed(batch.token_ids_BS, batch.pixel_values)
        positions_BS = (batch.is_token_BS.cumsum(1) - 1).clamp(min=0)
        num_columns = batch.token_ids_BS.shape[1]
        for start in range(0, num_columns, chunk_size or num_columns):
            end = min(start + (chunk_size or num_columns), num_columns)
            columns = slice(start, end)
            forward_pass = ForwardPass(
                phase=Phase.PREFILL,
                step=0,
                is_text_BS=batch.is_text_BS[:, columns],
                is_token_BS=batch.is_token_BS[:, columns],
                is_key_BP=batch.is_token_BS[:, :end],
            )
            self._forward(forward_pass, embeddings_BSD[:, columns], positions_BS[:, columns])
            yield PassTokens(
                forward_pass=forward_pass,
                token_ids_BS=batch.token_ids_BS[:, columns],
                positions_BS=positions_BS[:, columns],
                num_tokens=self._num_prompt_tokens(start, end),
                ends_prefill=end == num_columns,
            )

    def decode(self, eos_token_ids: Set[int]) -> Iterator[PassTokens]:
        eos = moved(torch.tensor(sorted(eos_token_ids), dtype=torch.int64), self.model.device)
        num_steps = int(self.batch.max_new_tokens_B.max()) - 1
        num_wanted_B = moved(self.batch.max_new_tokens_B, self.model.device)
        is_alive_B = torch.ones_like(num_wanted_B, dtype=torch.bool)
        is_key_BP = self.batch.is_token_BS
        for step in range(1, num_steps + 1):
            token_ids_B1 = self._next_tokens_B().unsqueeze(1)
            is_alive_B = is_alive_B & (num_wanted_B > step) & ~torch.isin(token_ids_B1.squeeze(1), eos)
            if len(eos) and not is_alive_B.any():  # the host waits for the device
                return
            is_key_BP = torch.cat([is_key_BP, torch.ones_like(token_ids_B1, dtype=torch.bool)], 1)
            positions_B1 = (self.num_prompt_tokens_B + step - 1).unsqueeze(1)
            forward_pass = ForwardPass(
                phase=Phase.DECODE,
                step=step,
                is_text_BS=torch.ones_like(token_ids_B1, dtype=torch.bool),
                is_token_BS=is_alive_B.unsqueeze(1),
                is_key_BP=is_key_BP,
            )
            embeddings_B1D = self.model.embed(token_ids_B1, None)
            self._forward(forward_pass, embeddings_B1D, positions_B1)
            yield PassTokens(
                forward_pass=forward_pass,
                token_ids_BS=token_ids_B1,
                positions_BS=positions_B1,
                num_tokens=int((self.batch.max_new_tokens_B > step).sum()),
                ends_prefill=False,
            )

    def _num_prompt_tokens(self, start: int, end: int) -> int:
        """Return the tokens in these columns of the prompts, padded on the left, without asking the device."""
        first_B = self.batch.token_ids_BS.shape[1] - self.batch.num_prompt_tokens_B
        return int((end - first_B.clamp(min=start)).clamp(min=0).sum())

    def _forward(self, forward_pass: ForwardPass, embeddings_BSD: Tensor, positions_BS: Tensor) -> None:
        """Run the decoder. With a mask, transformers asks the device whether there is padding: one wait per pass."""
        for watcher in self.watchers:
            watcher.start_pass(forward_pass)
        outputs = self.model.decoder(
            inputs_embeds=embeddings_BSD,
            attention_mask=forward_pass.is_key_BP.long() if self.batch.has_padding else None,
            position_ids=positions_BS,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.last_hidden_BD = outputs.last_hidden_state[:, -1]

    def _next_tokens_B(self) -> Tensor:
        assert self.last_hidden_BD is not None
        logits_BV: Tensor = self.model.module.lm_head(self.last_hidden_BD)
        for token_id in self.model.suppressed_token_ids:  # a list of them would be copied, and waited for
            logits_BV[:, token_id].fill_(-torch.inf)
        return logits_BV.argmax(1)

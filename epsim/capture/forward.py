"""Prefill and greedy decode of a batch with phases and steps made explicit: `run_batch`, whose passes are `PassTokens`.

Shapes: B requests, S columns of a pass (padding on the left), P columns in the KV cache before it, D hidden size.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from epsim.capture.batches import Batch
from epsim.capture.model import ForwardPass, MoeModel
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
        ends_prefill: whether the whole prompts are in the KV cache now.
    """

    forward_pass: ForwardPass
    token_ids_BS: Tensor
    positions_BS: Tensor
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
    for watcher in watchers:
        watcher.start_batch()
    run = _Run(model, batch, watchers)
    yield from run.prefill(chunk_size)
    if decode:
        yield from run.decode(eos_token_ids)


class _Run:
    def __init__(self, model: MoeModel, batch: Batch, watchers: Sequence[Watcher]) -> None:
        self.model = model
        self.batch = batch
        self.watchers = watchers
        self.cache: Any = DynamicCache(config=model.decoder.config)
        self.is_key_BP = batch.is_token_BS
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
                ends_prefill=end == num_columns,
            )

    def decode(self, eos_token_ids: Set[int]) -> Iterator[PassTokens]:
        device = self.model.device
        eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
        num_wanted_B = self.batch.max_new_tokens_B
        num_steps = int(num_wanted_B.max()) - 1
        num_wanted_B = num_wanted_B.to(device)
        is_alive_B = torch.ones_like(num_wanted_B, dtype=torch.bool)
        is_key_BP = self.is_key_BP
        for step in range(1, num_steps + 1):
            token_ids_B1 = self._next_tokens_B().unsqueeze(1)
            is_alive_B = is_alive_B & (num_wanted_B > step) & ~torch.isin(token_ids_B1.squeeze(1), eos)
            if len(eos) and not is_alive_B.any():  # the only place where the host waits for the device
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
                forward_pass=forward_pass, token_ids_BS=token_ids_B1, positions_BS=positions_B1, ends_prefill=False
            )

    def _forward(self, forward_pass: ForwardPass, embeddings_BSD: Tensor, positions_BS: Tensor) -> None:
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
        logits_BV[:, list(self.model.suppressed_token_ids)] = -torch.inf
        return logits_BV.argmax(1)

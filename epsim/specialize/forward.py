"""A forward pass over training examples: `run_examples`, whose result is a `Predicted`.

Shapes: B samples, S columns (padding on the left), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from epsim.capture.forward import Watcher
from epsim.capture.model import ForwardPass, MoeModel
from epsim.specialize.examples import ExampleBatch
from epsim.trace.meta import Phase

IGNORED = -100


@dataclass(frozen=True, kw_only=True, eq=False)
class Predicted:
    """What the model says of each answer token, given all tokens before it.

    Attributes:
        logits_BSV: float, of the token in the next column.
        labels_BS: int64, that token; IGNORED where it is no answer.
    """

    logits_BSV: Tensor
    labels_BS: Tensor

    def loss(self) -> Tensor:
        """Return the cross-entropy in nats, a float32 scalar: the mean over samples of the mean over answer tokens.

        So a long text does not outweigh many short answers.
        """
        loss_BS = F.cross_entropy(
            self.logits_BSV.movedim(-1, 1).float(), self.labels_BS, ignore_index=IGNORED, reduction="none"
        )
        num_answer_B = (self.labels_BS != IGNORED).sum(dim=1)
        return (loss_BS.sum(dim=1) / num_answer_B.clamp_min(1)).mean()

    def is_right_B(self) -> Tensor:
        """Return bool [B]: greedy decoding would give exactly the answer.

        It would if and only if each answer token is the likeliest after the prompt and the answer so far.
        """
        found_BS = self.logits_BSV.argmax(dim=-1)
        return ((found_BS == self.labels_BS) | (self.labels_BS == IGNORED)).all(dim=1)


def run_examples(model: MoeModel, batch: ExampleBatch, watchers: Sequence[Watcher] = ()) -> Predicted:
    """Run prompts with their answers through the model, in one pass, with gradients if they are enabled."""
    forward_pass = ForwardPass(
        phase=Phase.PREFILL,
        step=0,
        is_text_BS=batch.is_text_BS,
        is_token_BS=batch.is_token_BS,
        is_key_BP=batch.is_token_BS,
    )
    for watcher in watchers:
        watcher.start_batch()
        watcher.start_pass(forward_pass)
    device_type = model.device.type
    with torch.autocast(device_type, dtype=torch.bfloat16, enabled=device_type == "cuda"):
        outputs = model.decoder(
            inputs_embeds=model.embed(batch.token_ids_BS, batch.pixel_values),
            attention_mask=batch.is_token_BS.long(),
            position_ids=(batch.is_token_BS.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        logits_BSV = model.module.lm_head(outputs.last_hidden_state[:, :-1])
    labels_BS = batch.token_ids_BS[:, 1:].masked_fill(~batch.is_answer_BS[:, 1:], IGNORED)
    return Predicted(logits_BSV=logits_BSV, labels_BS=labels_BS)

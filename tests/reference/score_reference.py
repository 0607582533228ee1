"""Modality scores written out in float64 NumPy, and the loop that runs a small model pass by pass.

`run_passes` is the caller's loop; `record` runs it and keeps what the model did, from its own queries, keys and hidden
vectors; `attention_scores`, `ema_statistics` and `gaussian_scores` are eq. 2-9 of SMoES with nothing made fast.

Shapes: B requests, S columns of all passes, L MoE layers, N all layers, T tokens, D hidden size, H heads, C components.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from epsim.capture.model import ForwardPass, MoeModel
from epsim.trace.meta import Phase

TEXT, VISION = 0, 1


@dataclass
class Run:
    """What came out of all passes of a batch: scores [B, S, L] by name, hidden [B, S, D], experts [L][B*S, K]."""

    scores: dict[str, Tensor]
    hidden: Tensor
    experts: list[Tensor]
    is_text_BS: Tensor
    is_token_BS: Tensor
    is_key_BS: Tensor


def run_passes(
    model: MoeModel,
    batch: dict[str, Tensor],
    cuts: Sequence[int] = (),
    num_decode: int = 0,
    estimators: Sequence[Any] = (),
    ended_at: int | None = None,
    begin: bool = True,
) -> Run:
    """Run a prefill, cut at columns `cuts`, and decode steps of made-up tokens; request 0 ends at step `ended_at`."""
    if begin:
        for estimator in estimators:
            estimator.start_batch()
    parts, columns = _inputs(model, batch, num_decode, ended_at)
    experts: list[list[Tensor]] = [[] for _ in model.layer_ids]
    num_requests = len(parts)
    handles = [
        model.layers[layer_id].mlp.experts.register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[1].view(num_requests, -1, args[1].shape[-1]).clone())
        )
        for layer_id, kept in zip(model.layer_ids, experts, strict=True)
    ]
    num_prompt = batch["token_ids_BS"].shape[1]
    bounds = [0, *cuts, num_prompt, *range(num_prompt + 1, num_prompt + num_decode + 1)]
    cache, hidden = DynamicCache(config=model.decoder.config), []
    scores: dict[str, list[Tensor]] = {estimator.name: [] for estimator in estimators}
    for first, last in pairwise(bounds):
        forward_pass = ForwardPass(
            phase=Phase.PREFILL if last <= num_prompt else Phase.DECODE,
            step=max(last - num_prompt, 0),
            is_text_BS=columns["is_text_BS"][:, first:last],
            is_token_BS=columns["is_token_BS"][:, first:last],
            is_key_BP=columns["is_key_BS"][:, :last],
        )
        for estimator in estimators:
            estimator.start_pass(forward_pass)
        with torch.inference_mode():
            output = model.decoder(
                inputs_embeds=parts[:, first:last],
                attention_mask=forward_pass.is_key_BP,
                position_ids=(columns["is_key_BS"].cumsum(1) - 1).clamp_min(0)[:, first:last],
                past_key_values=cache,
                use_cache=True,
            )
        hidden.append(output.last_hidden_state)
        for estimator in estimators:
            if hasattr(estimator, "scores_BSL"):
                scores[estimator.name].append(estimator.scores_BSL())
    for handle in handles:
        handle.remove()
    return Run(
        scores={name: torch.cat(found, dim=1) for name, found in scores.items() if found},
        hidden=torch.cat(hidden, dim=1),
        experts=[torch.cat(found, dim=1) for found in experts],
        **columns,
    )


def _inputs(
    model: MoeModel, batch: dict[str, Tensor], num_decode: int, ended_at: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    token_ids_BS, is_token_BS = batch["token_ids_BS"], batch["is_token_BS"]
    more = torch.randint(1, 400, (len(token_ids_BS), num_decode), generator=torch.Generator().manual_seed(7))
    prompt = model.embed(token_ids_BS, batch["pixel_values"] if model.is_vlm else None)
    is_live = torch.ones_like(more, dtype=torch.bool)
    if ended_at is not None:
        is_live[0, ended_at - 1 :] = False
    columns = {
        "is_text_BS": torch.cat((batch["is_text_BS"], torch.ones_like(is_live)), dim=1),
        "is_token_BS": torch.cat((is_token_BS, is_live), dim=1),
        "is_key_BS": torch.cat((is_token_BS, torch.ones_like(is_live)), dim=1),
    }
    return torch.cat((prompt, model.embed(more, None)), dim=1), columns


@dataclass
class Record:
    """What the model did, float64: per layer of all N attention [B, S, S] (mean over heads) and the two norms [B, S];
    per MoE layer x [B, S, D]."""

    attention_NBSS: list[np.ndarray] = field(default_factory=list)
    residual_norm_NBS: list[np.ndarray] = field(default_factory=list)
    attention_norm_NBS: list[np.ndarray] = field(default_factory=list)
    x_LBSD: list[np.ndarray] = field(default_factory=list)
    run: Run | None = None


def record(model: MoeModel, batch: dict[str, Tensor], **passes: Any) -> Record:
    """Run the model with its own SDPA and write down attention, norms and the experts' inputs."""
    notes: dict[tuple[str, int], list[np.ndarray]] = {}
    _, columns = _inputs(model, batch, passes.get("num_decode", 0), passes.get("ended_at"))
    is_key_BS = columns["is_key_BS"].numpy()

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        rows = explicit_attention(query, key, kwargs["scaling"], is_key_BS)
        _note(
            notes,
            ("attention", module.layer_idx),
            np.pad(rows, ((0, 0), (0, 0), (0, is_key_BS.shape[1] - key.shape[2]))),
        )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("score_reference", attend)
    AttentionMaskInterface.register("score_reference", sdpa_mask)
    handles = _notes_by_hooks(model, notes)
    model.decoder.set_attn_implementation("score_reference")
    run = run_passes(model, batch, **passes)
    model.decoder.set_attn_implementation("sdpa")
    for handle in handles:
        handle.remove()
    every = range(len(model.layers))
    return Record(
        attention_NBSS=[np.concatenate(notes["attention", i], axis=1) for i in every],
        residual_norm_NBS=[np.concatenate(notes["residual", i], axis=1) for i in every],
        attention_norm_NBS=[np.concatenate(notes["attn_out", i], axis=1) for i in every],
        x_LBSD=[np.concatenate(notes["x", i], axis=1) for i in model.layer_ids],
        run=run,
    )


def _notes_by_hooks(model: MoeModel, notes: dict[tuple[str, int], list[np.ndarray]]) -> list[RemovableHandle]:
    def before(module: Any, name: str, index: int, read: Any) -> RemovableHandle:
        return module.register_forward_pre_hook(lambda _module, args: _note(notes, (name, index), read(args[0])))

    def norm(tensor: Tensor) -> np.ndarray:
        return np.asarray(np.linalg.norm(_numpy(tensor), axis=-1))

    handles = [before(model.layers[i].mlp, "x", i, _numpy) for i in model.layer_ids]
    for index, layer in enumerate(model.layers):
        handles.append(before(layer, "residual", index, norm))
        handles.append(
            layer.self_attn.register_forward_hook(
                lambda _module, _args, output, i=index: _note(notes, ("attn_out", i), norm(output[0]))
            )
        )
    return handles


def explicit_attention(query: Tensor, key: Tensor, scaling: float, is_key_BS: np.ndarray) -> np.ndarray:
    """Return softmax(q k scaling) [B, S, P], causal and without padded keys, averaged over heads; 0 where no key is."""
    query_BHSD, key_BHPD = _numpy(query), _numpy(key)
    key_BHPD = np.repeat(key_BHPD, query_BHSD.shape[1] // key_BHPD.shape[1], axis=1)
    num_queries, num_keys = query_BHSD.shape[2], key_BHPD.shape[2]
    logits = np.einsum("bhsd,bhpd->bhsp", query_BHSD, key_BHPD) * scaling
    column_S = np.arange(num_keys - num_queries, num_keys)
    is_seen = (np.arange(num_keys) <= column_S[:, None])[None, None] & is_key_BS[:, None, None, :num_keys]
    weights = np.where(is_seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0).mean(axis=1)


def attention_scores(found: Record, layer_ids: Sequence[int]) -> np.ndarray:
    """Return the share of text after the attention of each MoE layer, [B, S, L]: SMoES eq. 2-4."""
    assert found.run is not None
    score_BS = found.run.is_text_BS.numpy().astype(np.float64)
    after = []
    for attention_BSS, norm_x, norm_attn in zip(
        found.attention_NBSS, found.residual_norm_NBS, found.attention_norm_NBS, strict=True
    ):
        attended_BS = np.einsum("bsp,bp->bs", attention_BSS, score_BS)
        score_BS = (norm_attn * attended_BS + norm_x * score_BS) / (norm_attn + norm_x)
        after.append(score_BS)
    return np.stack([after[i] for i in layer_ids], axis=-1)


def ema_statistics(batches: Sequence[tuple[np.ndarray, np.ndarray]], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance [2, D] after batches of (x_TD, is_text_T): SMoES eq. 5-7, one modality at a time."""
    means, variances = [], []
    for modality in (TEXT, VISION):
        count, sum_mean, sum_square = 0.0, 0.0, 0.0
        for x_TD, is_text_T in batches:
            members = x_TD[is_text_T == (modality == TEXT)]
            if len(members) == 0:
                count, sum_mean, sum_square = beta * count, beta * sum_mean, beta * sum_square
                continue
            batch_mean = members.mean(axis=0)
            within = ((members - batch_mean) ** 2).sum(axis=0)
            between = 0.0
            if count:
                between = (batch_mean - sum_mean / count) ** 2 * (
                    beta * count * len(members) / (beta * count + len(members))
                )
            sum_square = beta * sum_square + within + between
            sum_mean = beta * sum_mean + len(members) * batch_mean
            count = beta * count + len(members)
        means.append(sum_mean / count)
        variances.append(sum_square / count)
    return np.stack(means), np.stack(variances)


def gaussian_scores(
    x_TD: np.ndarray, mean_MCD: np.ndarray, variance_MCD: np.ndarray, weight_MC: np.ndarray, tau: float
) -> np.ndarray:
    """Return the share of text [T]: eq. 8 of each component, log of the weighted sum over components, eq. 9."""
    apart = (x_TD[:, None, None] - mean_MCD) ** 2 / variance_MCD
    likelihood_TMC = -0.5 * (np.log(variance_MCD) + apart).sum(axis=-1)
    with np.errstate(divide="ignore"):
        terms = likelihood_TMC + np.log(weight_MC)
    peak = terms.max(axis=-1, keepdims=True)
    likelihood_TM = peak[..., 0] + np.log(np.exp(terms - peak).sum(axis=-1))
    return 1.0 / (1.0 + np.exp(-(likelihood_TM[:, TEXT] - likelihood_TM[:, VISION]) / tau))


def _numpy(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().to(torch.float64).numpy()
    return found


def _note(notes: dict[tuple[str, int], list[np.ndarray]], key: tuple[str, int], value: np.ndarray) -> None:
    notes.setdefault(key, []).append(value)

"""What the home tokens of a step are to one rank, as tensors: `HomeStep`, made by `home_step`; `dtype_of` a scenario.

Letters: T home tokens, L MoE layers, K top-k, Q requests, B micro-batches.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epsim.errors import InputError
from epsim.measure.decoder import AttentionBatch
from epsim.measure.layout import StepLayout
from epsim.scenario.spec import ScenarioSpec
from epsim.trace import Modality

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def to_tensor(values: Any, device: torch.device) -> Tensor:
    """Return a NumPy array as a tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def token_ids(request_T: Any, position_T: Any) -> Any:
    """Return the tokens of requests at positions: a hash, so that every run, on however many ranks, has the same."""
    return request_T * 7919 + position_T * 104729 + 17


@dataclass(frozen=True, kw_only=True)
class HomeStep:
    """What the home tokens of a step are to this rank. spans_B, attention_B: by micro-batch.

    vision_rows, vision_places: which tokens are of images, and which of its request's vision tokens each is. All
    requests show the same random pictures.
    """

    layout: StepLayout
    token_ids_T: Tensor
    vision_rows: Tensor
    vision_places: Tensor
    num_images: int
    expert_ids_LTK: Tensor
    spans_B: list[slice]
    attention_B: list[AttentionBatch | None]
    last_rows_Q: Tensor
    requests_Q: tuple[int, ...]


def home_step(
    layout: StepLayout, rank: int, *, num_batches: int, tokens_per_image: int, device: torch.device
) -> HomeStep:
    """Return what a step's home tokens are to a rank."""
    tokens, own = layout.tokens, layout.own(rank)
    request_T, position_T = tokens.request_T[own], tokens.position_T[own].astype(np.int64)
    chunk_T = layout.chunk_T[own] if num_batches > 1 else np.zeros(len(request_T), np.int64)
    bounds = np.searchsorted(chunk_T, np.arange(num_batches + 1))
    spans = [slice(int(a), int(b)) for a, b in pairwise(bounds)]
    decode = tokens.step > 0
    is_vision_T = (tokens.modality_T[own] == Modality.VISION) & (not decode)
    vision_Q = np.bincount(request_T[is_vision_T]) if is_vision_T.any() else np.zeros(0, np.int64)
    last_rows = np.flatnonzero(np.diff(request_T, append=-1))
    return HomeStep(
        layout=layout,
        token_ids_T=to_tensor(token_ids(request_T, position_T), device),
        vision_rows=to_tensor(np.flatnonzero(is_vision_T), device),
        vision_places=to_tensor(_places_within(request_T[is_vision_T]), device),
        num_images=int((-(-vision_Q // tokens_per_image)).sum()) if tokens_per_image else 0,
        expert_ids_LTK=to_tensor(tokens.topk_expert_ids_TLK[own].astype(np.int64).transpose(1, 0, 2), device),
        spans_B=spans,
        attention_B=[_attention(request_T[span], position_T[span], decode, device) for span in spans],
        last_rows_Q=to_tensor(last_rows, device),
        requests_Q=tuple(int(q) for q in request_T[last_rows]),
    )


def _attention(request_T: Any, position_T: Any, decode: bool, device: torch.device) -> AttentionBatch | None:
    if not len(request_T):
        return None
    return AttentionBatch(
        request_T=to_tensor(request_T, device), position_T=to_tensor(position_T, device), decode=decode
    )


def _places_within(request_T: Any) -> Any:
    """Return the place of each token among those of its request, which stand together."""
    starts = np.flatnonzero(np.diff(request_T, prepend=-1))
    return np.arange(len(request_T)) - np.repeat(starts, np.diff(np.append(starts, len(request_T))))


def dtype_of(spec: ScenarioSpec) -> torch.dtype:
    """Return the dtype that a scenario's model computes in; InputError where its bytes say otherwise."""
    model = spec.model
    if model.compute_dtype not in DTYPES:
        raise InputError(f'model.compute_dtype: "{model.compute_dtype}" cannot be run; write {" or ".join(DTYPES)}')
    dtype = DTYPES[model.compute_dtype]
    for field in ("weight_dtype_bytes", "activation_dtype_bytes", "kv_dtype_bytes"):
        found = getattr(model, field)
        if found != dtype.itemsize:
            raise InputError(
                f"model.{field}: {found:g} is not what {model.compute_dtype} takes; write {dtype.itemsize} to run it"
            )
    return dtype

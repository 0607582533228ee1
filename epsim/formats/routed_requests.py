"""From requests of another system to a routing trace: `RoutedRequest`, `write_requests`.

Letters: T tokens of a request in the order of their positions, L MoE layers, K top-k.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsim import __version__
from epsim.errors import FormatError
from epsim.formats.options import Options
from epsim.formats.reading import Ints, in_range
from epsim.trace import Modality, Phase, RoutingTrace, TraceMeta, TraceShape
from epsim.trace.file import TraceWriter


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedRequest:
    """where: file and place, for messages. ids_TLK: logical experts. num_prompt: tokens of the prompt; the rest decode.

    token_id_T: ids in the vocabulary, -1 for none, or None. gate_weights_TLK: float16 or None.
    """

    where: str
    ids_TLK: Ints
    num_prompt: int
    token_id_T: Ints | None = None
    gate_weights_TLK: NDArray[np.float16] | None = None


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What all requests of a recording share; `about` goes into the description of the trace."""

    layer_ids: tuple[int, ...]
    num_experts: int
    topk: int
    with_token_ids: bool
    about: dict[str, Any]


def write_requests(
    output: Path, recording: Recording, requests: Iterable[RoutedRequest], options: Options
) -> list[str]:
    """Write requests as a routing trace, numbered from 0, each after the other; return a line about it.

    Raises FormatError for experts that are not among `num_experts`, or of which a token has one twice in a layer.
    """
    if options.vision_token_ids and not recording.with_token_ids:
        raise FormatError("--vision-token-id: there are no token ids in the file to look for it; leave it out")
    meta = _meta(recording, options)
    num_requests = num_tokens = num_vision = 0
    with TraceWriter(output, meta) as writer:
        for request in requests:
            piece = _piece(meta, num_requests, request, recording.with_token_ids, options)
            writer.write(piece)
            num_requests += 1
            num_tokens += piece.num_tokens
            num_vision += int((piece.modality_T == Modality.VISION).sum())
    modality = f"{num_vision} of vision" if options.vision_token_ids else "all taken as text"
    return [
        f"wrote {output}: a routing trace, {num_requests} requests, {num_tokens} tokens ({modality}), "
        f"{meta.num_layers} layers, top-{meta.topk} of {meta.num_experts} experts"
    ]


def _meta(recording: Recording, options: Options) -> TraceMeta:
    about = {**recording.about}
    if options.vision_token_ids:
        about["vision_token_ids"] = ", ".join(map(str, options.vision_token_ids))
    return TraceMeta.of(
        TraceShape(layer_ids=recording.layer_ids, num_experts=recording.num_experts, topk=recording.topk),
        model=options.model.name if options.model is not None else "",
        origin="imported",
        description=json.dumps(about),
        software=f"epsim {__version__}",
    )


def _piece(
    meta: TraceMeta, request_id: int, request: RoutedRequest, with_token_ids: bool, options: Options
) -> RoutingTrace:
    """Return the rows of a request."""
    _check_ids(request, meta)
    num_tokens = len(request.ids_TLK)
    position_T = np.arange(num_tokens, dtype=np.int32)
    decode_T = position_T >= request.num_prompt
    token_id_T = np.full(num_tokens, -1, dtype=np.int64) if request.token_id_T is None else request.token_id_T
    in_range(token_id_T, -1, 2**31 - 1, f"{request.where}: token ids", "write ids of the vocabulary, -1 for none")
    vision_T = np.isin(token_id_T, options.vision_token_ids) & ~decode_T
    return RoutingTrace(
        meta=meta,
        request_id_T=np.full(num_tokens, request_id, dtype=np.int32),
        position_T=position_T,
        step_T=np.maximum(position_T - request.num_prompt + 1, 0).astype(np.int32),
        phase_T=np.where(decode_T, Phase.DECODE, Phase.PREFILL).astype(np.uint8),
        modality_T=np.where(vision_T, Modality.VISION, Modality.TEXT).astype(np.uint8),
        topk_expert_ids_TLK=request.ids_TLK.astype(meta.expert_id_dtype),
        gate_weights_TLK=request.gate_weights_TLK,
        token_id_T=token_id_T.astype(np.int32) if with_token_ids else None,
    )


def _check_ids(request: RoutedRequest, meta: TraceMeta) -> None:
    ids_TLK = request.ids_TLK
    if ids_TLK.shape[1:] != (meta.num_layers, meta.topk):
        raise FormatError(
            f"{request.where}: has {ids_TLK.shape[1]} layers and top-{ids_TLK.shape[2]}, others {meta.num_layers} and "
            f"top-{meta.topk}; import recordings of one model at a time"
        )
    if not 1 <= request.num_prompt <= len(ids_TLK):
        raise FormatError(f"{request.where}: has no token of the prompt; a request begins with one at least")
    wrong_TLK = (ids_TLK < 0) | (ids_TLK >= meta.num_experts)
    if wrong_TLK.any():
        t, layer, k = np.argwhere(wrong_TLK)[0]
        raise FormatError(
            f"{request.where}: token {t}, layer {meta.layer_ids[layer]}: expert {ids_TLK[t, layer, k]} is not from 0 "
            f"to {meta.num_experts - 1}; write another --num-experts or --model if there are more"
        )
    sorted_TLK = np.sort(ids_TLK, axis=2)
    twice_TL = (sorted_TLK[:, :, 1:] == sorted_TLK[:, :, :-1]).any(axis=2)
    if twice_TL.any():
        t, layer = np.argwhere(twice_TL)[0]
        raise FormatError(
            f"{request.where}: token {t}, layer {meta.layer_ids[layer]}: experts {ids_TLK[t, layer].tolist()} are not "
            f"{meta.topk} different ones; a token chooses each once"
        )

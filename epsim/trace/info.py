"""What a trace file holds, in words and numbers: `summarise`."""

import numpy as np

from epsim.trace.file import TraceFile
from epsim.units import format_size


def summarise(trace: TraceFile) -> dict[str, str]:
    """Return what there is to know without reading the routing: shape, origin, requests, tokens by kind, columns."""
    meta, table = trace.meta, trace.requests
    prefill, vision, decode = (
        int(column_Q.sum())
        for column_Q in (table.num_prefill_tokens_Q, table.num_vision_tokens_Q, table.num_decode_tokens_Q)
    )
    return {
        "file": f"{trace.name} ({format_size(trace.path.stat().st_size)}, format {meta.format_version})",
        "origin": meta.origin + (", from mock tokens" if meta.mock else ""),
        "description": meta.description,
        "seed": "-" if meta.seed is None else str(meta.seed),
        "software": meta.software,
        "model": meta.model or "-",
        "routing": f"{meta.num_layers} MoE layers x top-{meta.topk} of {meta.num_experts} experts, layer ids {_ids(meta.layer_ids)}",
        "requests": f"{len(table.request_id_Q)}, prompt {_range(table.num_prefill_tokens_Q)} tokens, decode {_range(table.num_decode_tokens_Q)}",
        "tokens": f"{trace.num_tokens}: prefill vision {vision}, prefill text {prefill - vision}, decode {decode}",
        "columns": ", ".join(trace.columns),
    }


def _ids(layer_ids: tuple[int, ...]) -> str:
    contiguous = list(layer_ids) == list(range(layer_ids[0], layer_ids[-1] + 1))
    return f"{layer_ids[0]} to {layer_ids[-1]}" if contiguous else ", ".join(map(str, layer_ids))


def _range(values_Q: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    low, high = int(values_Q.min()), int(values_Q.max())
    return str(low) if low == high else f"{low} to {high}"

"""What a trace file holds, in words and numbers: `summarise`."""

import numpy as np
import numpy.typing as npt

from epsim.trace.file import TraceFile
from epsim.units import format_size


def summarise(trace: TraceFile) -> dict[str, str]:
    """Return what there is to know without reading the routing: shape, origin, requests, tokens by kind, columns."""
    meta, table = trace.meta, trace.requests
    prefill = int(table.num_prefill_tokens_Q.sum())
    vision = int(table.num_vision_tokens_Q.sum())
    shape = f"{meta.num_layers} MoE layers x top-{meta.topk} of {meta.num_experts} experts"
    lengths = f"prompt {_range(table.num_prefill_tokens_Q)} tokens, decode {_range(table.num_decode_tokens_Q)}"
    kinds = f"prefill vision {vision}, prefill text {prefill - vision}, decode {trace.num_tokens - prefill}"
    asked = meta.num_requests_asked
    cut = f" of {asked} asked for" if asked is not None and asked != len(table) else ""
    return {
        "file": f"{trace.name} ({format_size(trace.path.stat().st_size)}, format {meta.format_version})",
        "origin": meta.kind + (": random weights or tokens" if meta.mock else ""),
        "description": meta.words,
        "seed": "-" if meta.seed is None else str(meta.seed),
        "software": meta.software,
        "model": meta.model or "-",
        "routing": f"{shape}, layer ids {_ids(meta.layer_ids)}",
        "requests": f"{len(table)}{cut}, {lengths}",
        "tokens": f"{trace.num_tokens}: {kinds}",
        "columns": ", ".join(trace.columns),
    }


def _ids(layer_ids: tuple[int, ...]) -> str:
    contiguous = list(layer_ids) == list(range(layer_ids[0], layer_ids[-1] + 1))
    return f"{layer_ids[0]} to {layer_ids[-1]}" if contiguous else ", ".join(map(str, layer_ids))


def _range(values_Q: npt.NDArray[np.integer]) -> str:
    low, high = int(values_Q.min()), int(values_Q.max())
    return str(low) if low == high else f"{low} to {high}"

"""Statistics of a routing trace over all its batches: `expert_load`. Letters: L MoE layers, E experts, K top-k."""

import numba
import numpy as np
import numpy.typing as npt

from epsim.trace.routing import TraceSource


def expert_load(source: TraceSource) -> npt.NDArray[np.int64]:
    """Return how often each modality chose each expert: int64 [modality (text, vision), L, E]."""
    shape = source.meta
    load_MLE = np.zeros((2, shape.num_layers, shape.num_experts), np.int64)
    for batch in source.batches():
        _add_load(batch.topk_expert_ids_TLK, batch.modality_T, load_MLE)
    return load_MLE


@numba.njit(cache=True)
def _add_load(topk_expert_ids_TLK, modality_T, load_MLE):  # type: ignore[no-untyped-def]
    num_tokens, num_layers, topk = topk_expert_ids_TLK.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for k in range(topk):
                load_MLE[modality_T[t], layer, topk_expert_ids_TLK[t, layer, k]] += 1

"""How often experts were chosen, over all batches of a routing trace: `expert_load`, `add_load` for one batch.

Letters: P phase (prefill, decode), M modality (text, vision), L MoE layers, E experts, T tokens, K top-k.
"""

import numba
import numpy as np
import numpy.typing as npt

from epsim.trace.meta import Modality, Phase, TraceShape
from epsim.trace.routing import RoutingTrace, TraceSource


def expert_load(source: TraceSource) -> npt.NDArray[np.int64]:
    """Return how often each modality chose each expert: int64 [modality (text, vision), L, E]."""
    return np.asarray(expert_load_by_phase(source).sum(axis=0))


def expert_load_by_phase(source: TraceSource) -> npt.NDArray[np.int64]:
    """Return the same apart for each phase: int64 [phase (prefill, decode), modality (text, vision), L, E]."""
    load_PMLE = no_load(source.meta)
    for batch in source.batches():
        add_load(batch, load_PMLE)
    return load_PMLE


def no_load(shape: TraceShape) -> npt.NDArray[np.int64]:
    """Return zeros to add to, int64 [phase (prefill, decode), modality (text, vision), L, E]."""
    return np.zeros((len(Phase), len(Modality), shape.num_layers, shape.num_experts), np.int64)


def add_load(batch: RoutingTrace, load_PMLE: npt.NDArray[np.int64]) -> None:
    """Add to `load_PMLE` how often the tokens of the batch chose each expert."""
    _add_load(batch.topk_expert_ids_TLK, batch.phase_T, batch.modality_T, load_PMLE)


@numba.njit(cache=True)
def _add_load(topk_expert_ids_TLK, phase_T, modality_T, load_PMLE):  # type: ignore[no-untyped-def]
    num_tokens, num_layers, topk = topk_expert_ids_TLK.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for k in range(topk):
                load_PMLE[phase_T[t], modality_T[t], layer, topk_expert_ids_TLK[t, layer, k]] += 1

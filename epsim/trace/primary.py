"""Which of a token's experts is its first: `primary_first`. Letters: T tokens, L MoE layers, K top-k."""

import numpy as np

from epsim.trace.meta import ExpertIds
from epsim.trace.routing import RoutingTrace


def primary_first(rows: RoutingTrace) -> ExpertIds:
    """Return the expert ids of all tokens, [T, L, K], with each token's primary expert at k = 0.

    The primary expert is the one with the largest gate weight, the first of equals; without gate weights the first in
    the order of the trace. It changes places with the one that was at 0; the others keep theirs.
    """
    ids_TLK = rows.topk_expert_ids_TLK
    if rows.gate_weights_TLK is None:
        return ids_TLK
    primary_TL1 = rows.gate_weights_TLK.argmax(axis=2)[..., None]
    ordered_TLK = ids_TLK.copy()
    np.put_along_axis(ordered_TLK, primary_TL1, ids_TLK[..., :1], axis=2)
    ordered_TLK[..., :1] = np.take_along_axis(ids_TLK, primary_TL1, axis=2)
    return ordered_TLK

"""Tokens that migrate, said slowly: `count_migration`. Letters as in `epsim.migration`."""

import numpy as np
from numpy.typing import NDArray
from reference.traffic import slots_of

from epsim.migration import MigrationTraffic
from epsim.placement import Placement


def count_migration(ids_TLK: NDArray[np.integer], home_T: NDArray[np.int32], placement: Placement) -> MigrationTraffic:
    """Return what `migration_traffic(ids_TLK, home_T, placement)` must return."""
    traffic = MigrationTraffic.none(ids_TLK.shape[1], placement.num_devices)
    find_slot = slots_of(placement)
    for here, ids_LK in zip(home_T.tolist(), ids_TLK.tolist(), strict=True):
        for layer, ids_K in enumerate(ids_LK):
            traffic.tokens_at_LR[layer, here] += 1
            devices = [find_slot(here, layer, expert) // placement.slots_per_device for expert in ids_K]
            onward = devices[0]
            for device in devices:
                traffic.dispatch_pairs_LRR[layer, here, device] += 1
            for device in set(devices):
                traffic.dispatch_tokens_LRR[layer, here, device] += 1
                traffic.combine_tokens_LRR[layer, device, onward] += 1
            here = onward
        traffic.tokens_at_LR[-1, here] += 1
    return traffic

"""NCCL's collectives as messages between the GPUs of a node: `collective_load`.

What leaves each of n GPUs for a message of S bytes, as nccl-tests counts S: all-to-all S / n to each other GPU;
all-gather and reduce-scatter n - 1 steps of S / n around a ring; all-reduce both. So time = S (n - 1) / n / rate at
best, twice that for all-reduce, which is nccl-tests' bus bandwidth.
"""

from functools import cache

import numpy as np

from epsim.errors import InputError
from epsim.validate.exchange_cluster import exchange_cluster
from epsim.validate.exchange_data import Measured
from epsim.validate.exchange_load import Load, load_of

_RINGS = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
COLLECTIVES = ("alltoall", *_RINGS)


@cache
def collective_load(row: Measured) -> Load:
    """Return the load of a row of the table nccl; InputError for a collective that is not one of COLLECTIVES."""
    cluster, num_ranks = exchange_cluster(row.device, row.num_ranks), row.num_ranks
    part_bytes = row.num_bytes / num_ranks
    if row.kind == "alltoall":
        return load_of(cluster, np.full((num_ranks, num_ranks), part_bytes))
    if row.kind not in _RINGS:
        raise InputError(f"nccl: {row.kind} is not a known collective; write one of {', '.join(COLLECTIVES)}")
    num_steps = _RINGS[row.kind] * (num_ranks - 1)
    ring_RR = np.roll(np.eye(num_ranks), 1, axis=1)
    return load_of(cluster, num_steps * part_bytes * ring_RR, num_rounds=num_steps)

"""The closed form's recursions for layers that are each a step by itself, compiled: a loop around each mode's.

Letters as in `epsim.sim.closed_form`. after_s_LR: what devices do after a layer.
"""

import numba
import numpy as np

from epsim.sim.closed_form import asynchronous, sync, two_batch


@numba.njit(cache=True)
def _own(exchange, layer):  # type: ignore[no-untyped-def]
    """Return the exchange of one layer."""
    out_LFC, back_LFC, node_out_LFC, node_back_LFC = exchange
    own = slice(layer, layer + 1)
    return out_LFC[own], back_LFC[own], node_out_LFC[own], node_back_LFC[own]


@numba.njit(cache=True)
def sync_layers(front_s_LR, host_s_LR, shared_s_LR, experts_s_LR, exchange, network, after_s_LR):  # type: ignore[no-untyped-def]
    """Return when each layer and what comes after it ends on the last device, if the layer is all there is: [L]."""
    ends_s_L = np.empty(len(front_s_LR))
    for layer in range(len(ends_s_L)):
        own = slice(layer, layer + 1)
        times = sync(
            front_s_LR[own], host_s_LR[own], shared_s_LR[own], experts_s_LR[own], _own(exchange, layer), network
        )
        ends_s_L[layer] = (times[5] + after_s_LR[layer]).max()
    return ends_s_L


@numba.njit(cache=True)
def asynchronous_layers(front_s_LR, host_s_LR, local_s_LR, remote_s_LFC, exchange, network, after_s_LR):  # type: ignore[no-untyped-def]
    """As `sync_layers`, in mode async."""
    ends_s_L = np.empty(len(front_s_LR))
    for layer in range(len(ends_s_L)):
        own = slice(layer, layer + 1)
        times = asynchronous(
            front_s_LR[own], host_s_LR[own], local_s_LR[own], remote_s_LFC[own], _own(exchange, layer), network
        )
        ends_s_L[layer] = (times[5] + after_s_LR[layer]).max()
    return ends_s_L


@numba.njit(cache=True)
def two_batch_layers(front_s_CLR, host_s_LR, shared_s_CLR, experts_s_CLR, exchange, network, after_s_LR):  # type: ignore[no-untyped-def]
    """As `sync_layers`, in mode two_batch; C are the two micro-batches."""
    ends_s_L = np.empty(len(host_s_LR))
    for layer in range(len(ends_s_L)):
        own = slice(layer, layer + 1)
        front_s_C1R = np.ascontiguousarray(front_s_CLR[:, own])
        shared_s_C1R = np.ascontiguousarray(shared_s_CLR[:, own])
        experts_s_C1R = np.ascontiguousarray(experts_s_CLR[:, own])
        times = two_batch(front_s_C1R, host_s_LR[own], shared_s_C1R, experts_s_C1R, _own(exchange, layer), network)
        ends_s_L[layer] = (times[5] + after_s_LR[layer]).max()
    return ends_s_L

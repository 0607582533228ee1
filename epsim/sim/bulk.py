"""Steps without work: `idle_plan`, in which nothing happens, and `bulk_plan`, of transfers alone.

Letters: R devices (sender, then receiver).
"""

from dataclasses import replace

import numpy as np

from epsim.cluster import Cluster
from epsim.sim.messaging import MessageCosts
from epsim.sim.step import Floats, StepPlan


def bulk_plan(bytes_RR: Floats, cluster: Cluster) -> StepPlan:
    """Return the step in which every device sends what bytes_RR says at once, one message for each receiver.

    They travel as KV caches do, over the routes of the cluster with contention: `StepResult.kv_end_s` is when the last
    has arrived, and what messages cost the two ends is counted. bytes_RR: float64 [R, R], 0 on the diagonal.
    """
    num_devices = cluster.num_devices
    if bytes_RR.shape != (num_devices, num_devices) or bytes_RR.diagonal().any():
        raise ValueError(f"bytes_RR must have the shape ({num_devices}, {num_devices}) and zeros on its diagonal")
    idle = idle_plan(cluster)
    return replace(idle, kv_bytes_LRR=bytes_RR[None], message_costs=MessageCosts.of(cluster))


def idle_plan(cluster: Cluster) -> StepPlan:
    """Return the step of one layer, in mode sync, in which no device computes or sends anything."""
    num_devices, num_nodes = cluster.num_devices, cluster.num_nodes
    none_R, none_LR = np.zeros(num_devices), np.zeros((1, num_devices))
    none_LCRR, none_LCRN = np.zeros((1, 1, num_devices, num_devices)), np.zeros((1, 1, num_devices, num_nodes))
    return StepPlan(
        mode="sync",
        vision_s_R=none_R,
        attention_s_LR=none_LR,
        dense_ffn_s_LR=none_LR,
        router_s_LR=none_LR,
        home_experts_s_LR=none_LR,
        shared_s_LR=none_LR,
        host_s_LR=none_LR,
        copy_s_LR=none_LR,
        pack_s_LR=none_LR,
        reduce_s_LR=none_LR,
        experts_s_LR=none_LR,
        local_s_LR=none_LR,
        remote_s_LCRR=none_LCRR,
        head_s_R=none_R,
        dispatch_bytes_LCRR=none_LCRR,
        combine_bytes_LCRR=none_LCRR,
        node_dispatch_bytes_LCRN=none_LCRN,
        node_combine_bytes_LCRN=none_LCRN,
        gateway_RN=None,
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
        kv_bytes_LRR=np.zeros((1, num_devices, num_devices)),
        overlap_kv=False,
    )

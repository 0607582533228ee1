"""Clusters of the published exchanges, made from epsim's presets: `exchange_cluster`."""

from functools import cache
from typing import Any

from epsim.cluster import Cluster, build_cluster
from epsim.scenario import load_cluster
from epsim.validate.exchange_data import GPUS_PER_NODE

_PRESET = "h100-2x8"
# NVLink in each direction: data sheets of H100, H200 (900 GB/s, both directions together), A100 (600), H800 (400).
NVLINK_BYTES_PER_S = {"H100": 450e9, "H200": 450e9, "A100": 300e9, "H800": 200e9}


@cache
def exchange_cluster(device: str, num_ranks: int, rdma_only: bool = False) -> Cluster:
    """Return the first num_ranks GPUs of as many nodes of `h100-2x8` as needed, with the NVLink rate of the device.

    The network is the preset's: a port of 400 Gbit/s per GPU, one switch. rdma_only: without NVLink, so that the GPUs
    of a node meet over the network too. Messages are not cut: only loads and latencies are asked of this cluster.
    """
    num_nodes = -(-num_ranks // GPUS_PER_NODE)
    spec = load_cluster(_PRESET).model_dump()
    for section in ("devices", "nics", "switches", "links"):
        for entry in spec[section]:
            _resize(entry["each"], num_nodes, min(num_ranks, GPUS_PER_NODE))
    for link in spec["links"]:
        if link["name"] == "nvlink":
            link["bandwidth"] = NVLINK_BYTES_PER_S[device]
    if rdma_only:
        spec["links"] = [link for link in spec["links"] if link["name"] != "nvlink"]
    return build_cluster(spec | {"name": f"{device} x {num_ranks}", "segment": 1e15})


def _resize(each: dict[str, Any], num_nodes: int, gpus_per_node: int) -> None:
    """Set the number of nodes {i} and of GPUs in a node {j} of an entry, in place."""
    for variable, count in (("i", num_nodes), ("j", gpus_per_node)):
        if variable in each:
            each[variable] = count

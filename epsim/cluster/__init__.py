"""The hardware: devices in nodes, links between them, a route for every pair (`Cluster`, `build_cluster`)."""

from epsim.cluster.builder import build_cluster
from epsim.cluster.cluster import Cluster, Device, Link

__all__ = ["Cluster", "Device", "Link", "build_cluster"]

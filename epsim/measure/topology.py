"""From the links of a cluster to shaped interfaces: `Topology`, which lays itself out in `Namespaces`.

A device is a host (network namespace), a switch or nic a bridge, a link a pair of interfaces, each shaped by a token
bucket (tbf) to the link's bandwidth on its way out. So clusters whose links form a tree with the devices at its ends
can be built: two devices on a cable, hosts on a switch, nodes with switches joined by a slow link.
"""

import math
from dataclasses import dataclass

import networkx as nx

from epsim.cluster import Cluster
from epsim.errors import ClusterError
from epsim.measure.namespaces import Namespaces

INTERFACE = "ep0"  # of every host
_LIMIT_BYTES = 16 * 2**20  # queue in front of a shaper: what does not fit is lost
_SMALLEST_GSO, _LARGEST_GSO = 4096, 65536


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A token bucket: bytes/s, its burst, and the largest packet that TCP hands to the interface, in bytes.

    The burst is larger than a packet, or tbf would cut it up, and small, as messages below it are not slowed at all.
    """

    bytes_per_s: float
    burst_bytes: int
    packet_bytes: int


def shape_of(bytes_per_s: float) -> Shape:
    """Return the shape for a bandwidth: packets of 8 KiB at 100 Mbit/s, growing with its root, burst 1.25 packets."""
    packet_bytes = 8192 * math.sqrt(bytes_per_s * 8 / 1e8)
    packet = min(max(2 ** round(math.log2(packet_bytes)), _SMALLEST_GSO), _LARGEST_GSO)
    return Shape(bytes_per_s=bytes_per_s, burst_bytes=packet * 5 // 4, packet_bytes=packet)


@dataclass(frozen=True, kw_only=True)
class Cable:
    """A link between two vertices with the bytes/s out of either end."""

    ends: tuple[str, str]
    bytes_per_s: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """hosts: the devices in rank order. bridges: the other vertices."""

    hosts: tuple[str, ...]
    bridges: tuple[str, ...]
    cables: tuple[Cable, ...]

    def address(self, rank: int) -> str:
        """Return the IPv4 address of a rank's host."""
        return f"10.77.{(rank + 1) // 250}.{(rank + 1) % 250}"

    def lay_out(self, inside: Namespaces) -> None:
        """Make hosts, bridges and cables."""
        host_of = {name: f"rank{rank}" for rank, name in enumerate(self.hosts)}
        bridge_of = {name: f"br{number}" for number, name in enumerate(self.bridges)}
        for name in host_of.values():
            inside.add_host(name)
        for bridge in bridge_of.values():
            inside.run(["ip", "link", "add", bridge, "type", "bridge"])
            inside.run(["ip", "link", "set", bridge, "up"])
        shapes = [[shape_of(bytes_per_s) for bytes_per_s in cable.bytes_per_s] for cable in self.cables]
        packet_bytes = min(shape.packet_bytes for pair in shapes for shape in pair)  # fits through every bucket
        for number, cable in enumerate(self.cables):
            names = (f"cable{number}a", f"cable{number}b")
            inside.run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]])
            for name, end, shape in zip(names, cable.ends, shapes[number], strict=True):
                host: str | None = host_of.get(end)
                if host is None:
                    inside.run(["ip", "link", "set", name, "master", bridge_of[end]])
                else:
                    inside.run(["ip", "link", "set", name, "netns", host])
                    inside.run(["ip", "link", "set", name, "name", INTERFACE], host)
                    address = f"{self.address(self.hosts.index(end))}/16"
                    inside.run(["ip", "addr", "add", address, "dev", INTERFACE], host)
                _shape(inside, host, name if host is None else INTERFACE, shape, packet_bytes)


def _shape(inside: Namespaces, host: str | None, name: str, shape: Shape, packet_bytes: int) -> None:
    inside.run(["ip", "link", "set", "dev", name, "gso_max_size", str(packet_bytes)], host)
    inside.run(["ip", "link", "set", name, "up"], host)
    bucket = ["rate", f"{round(shape.bytes_per_s * 8)}bit", "burst", str(shape.burst_bytes), "limit", str(_LIMIT_BYTES)]
    inside.run(["tc", "qdisc", "replace", "dev", name, "root", "tbf", *bucket], host)


def topology_of(cluster: Cluster) -> Topology:
    """Return the topology of a cluster; ClusterError, with the mend, where namespaces cannot stand in for it."""
    for link in cluster.links:
        if link.is_staging:
            raise ClusterError(
                f"cluster: {link.source} has host staging, which a testbed does not imitate; leave staging out"
            )
    names = tuple(device.name for device in cluster.devices)
    graph = nx.Graph(cluster.graph)
    num_links = sum(not link.is_staging for link in cluster.links)
    one_way = [(a, b) for a, b in cluster.graph.edges() if not cluster.graph.has_edge(b, a)]
    if one_way or num_links != 2 * graph.number_of_edges():
        raise ClusterError(
            "cluster.links: a testbed needs one duplex link between two neighbours; write each link once"
        )
    if not nx.is_tree(graph):
        raise ClusterError(
            "cluster.links: a testbed is built from links that form a tree; leave out links that close a loop"
        )
    for name in names:
        if graph.degree[name] > 1:
            raise ClusterError(
                f"cluster.links: {name} has {graph.degree[name]} links; in a testbed a device has one, e.g. to a switch"
            )
    cables = tuple(
        Cable(ends=(a, b), bytes_per_s=(_rate(cluster, a, b), _rate(cluster, b, a))) for a, b in graph.edges()
    )
    bridges = tuple(name for name in graph if name not in names)
    return Topology(hosts=names, bridges=bridges, cables=cables)


def _rate(cluster: Cluster, source: str, target: str) -> float:
    (edge,) = cluster.graph.get_edge_data(source, target).values()
    return float(cluster.links[edge["link"]].bytes_per_s)

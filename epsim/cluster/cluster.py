"""The hardware that a deployment runs on: `Device`, `Link` and the `Cluster` of both with its routes.

Shape suffixes: R ranks (= devices), X directed links (real ones first, then host staging), H hops of the
longest route. Everything is in SI units: bytes, seconds, bytes/s, FLOP/s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from epsim.errors import ClusterError


def _require(holds: bool, path: str, value: object, rule: str) -> None:
    if not holds:
        raise ClusterError(f"{path}: {value!r} {rule}")


def _require_at_least_0(holder: object, path: str, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(holder, name)
        _require(value >= 0, f"{path}.{name}", value, "must not be below 0")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator with its memory; one rank runs on it.

    Args:
        name: Unique among devices, nics and switches.
        node: Name of the node (host) that it is in.
        type_name: Key of its device type in the YAML.
        memory_bytes, memory_usable_frac: Capacity, and the part of it that weights and KV cache may fill.
        memory_bytes_per_s, memory_efficiency_frac: Peak bandwidth, and the part of it that kernels reach.
        flops_per_s, compute_efficiency_frac: Dense peak rate per dtype ("bf16" always), and the part reached by
            a kernel of 1024 rows (tokens). efficiency_exponent: the part grows with rows^exponent, up to 1.
        launch_overhead_s: Time per launched operator. expert_overhead_s: time per activated expert and layer.
        layer_overhead_s: The least that a layer takes, because the host launches its operators one by one.
        request_overhead_s: Time per request and layer, at the request's home.
        barrier_slowdown_frac: In mode sync, by what share a barrier stretches the work in front of it (stragglers).
        transfer_overlap_frac: In mode async, the share of a transfer that runs beside this device's kernels; the
            rest is taken from its compute.
        staging_bytes_per_s: Bandwidth of the copy between device and host that every message of this device
            takes, or None where the network reaches device memory itself.
        staging_message_overhead_s: Time per message of that copy.
        step_overhead_s: Time at the end of every step in which the device waits for its host.
        send_overhead_s, send_bytes_per_s: Compute time before each message that the device sends, per message and
            by its bytes (None: no time). receive_overhead_s: per message that it receives.
        background_bytes_per_s: In modes async and two_batch, every byte sent or received takes 1 / this from the
            device's compute (None: nothing).

    Raises:
        ClusterError: A number is out of its range or "bf16" is missing.
    """

    name: str
    node: str
    type_name: str
    memory_bytes: float
    memory_usable_frac: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    compute_efficiency_frac: float
    efficiency_exponent: float
    memory_efficiency_frac: float
    launch_overhead_s: float
    layer_overhead_s: float
    request_overhead_s: float
    expert_overhead_s: float
    barrier_slowdown_frac: float
    transfer_overlap_frac: float
    staging_bytes_per_s: float | None
    staging_message_overhead_s: float
    step_overhead_s: float = 0.0
    send_overhead_s: float = 0.0
    send_bytes_per_s: float | None = None
    receive_overhead_s: float = 0.0
    background_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        path = f"device {self.name}"
        _require("bf16" in self.flops_per_s, f"{path}.flops_per_s", sorted(self.flops_per_s), "lacks bf16")
        for dtype, rate in self.flops_per_s.items():
            _require(rate > 0, f"{path}.flops_per_s.{dtype}", rate, "must be above 0")
        for name in ("memory_bytes", "memory_bytes_per_s"):
            _require(getattr(self, name) > 0, f"{path}.{name}", getattr(self, name), "must be above 0")
        for name in ("memory_usable_frac", "compute_efficiency_frac", "memory_efficiency_frac"):
            frac = getattr(self, name)
            _require(0 < frac <= 1, f"{path}.{name}", frac, "must be above 0 and at most 1")
        for name in ("efficiency_exponent", "transfer_overlap_frac"):
            share = getattr(self, name)
            _require(0 <= share <= 1, f"{path}.{name}", share, "must be from 0 to 1")
        overheads = ["launch_overhead_s", "layer_overhead_s", "request_overhead_s", "expert_overhead_s"]
        overheads += ["step_overhead_s", "send_overhead_s", "receive_overhead_s", "staging_message_overhead_s"]
        _require_at_least_0(self, path, [*overheads, "barrier_slowdown_frac"])
        for name in ("staging_bytes_per_s", "send_bytes_per_s", "background_bytes_per_s"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, f"{path}.{name}", rate, "must be above 0")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a link: held for message_overhead_s + wire bytes / bytes_per_s; arrival is latency_s later.

    The wire bytes of a message are its own with frame_overhead_frac on top, and message_header_bytes. burst_bytes: what
    a token bucket lets through at once. ack_overhead_frac: by what share a segment takes longer while the opposite
    direction, a link by its index, has something to send.
    A staging link (`is_staging`) is the copy between device and host memory in front of or behind a route.
    Its source and target are both the device, and it is not an edge of the graph.

    Raises:
        ClusterError: A number is out of its range.
    """

    name: str
    source: str
    target: str
    bytes_per_s: float
    latency_s: float
    message_overhead_s: float
    is_staging: bool
    message_header_bytes: float = 0.0
    frame_overhead_frac: float = 0.0
    burst_bytes: float = 0.0
    ack_overhead_frac: float = 0.0
    opposite: int | None = None

    def __post_init__(self) -> None:
        _require(self.bytes_per_s > 0, f"link {self.name}.bytes_per_s", self.bytes_per_s, "must be above 0")
        overheads = ("message_overhead_s", "message_header_bytes", "frame_overhead_frac", "ack_overhead_frac")
        _require_at_least_0(self, f"link {self.name}", ("latency_s", *overheads, "burst_bytes"))


def _frozen(array: NDArray[np.generic]) -> None:
    array.setflags(write=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cluster:
    """Devices, directed links, and the one route that each ordered pair of devices takes.

    Args:
        name: For people.
        devices: R devices; rank r runs on devices[r].
        links: X directed links.
        segment_bytes: Messages cross the network in equal segments of at most this size.
        graph: The topology: vertices are device, nic and switch names with attribute `kind`; each edge has
            the attributes `link`, an index into `links`, and `name`. Staging links are not in it.
        routes_RRH: int32 (R, R, H): indices into `links` from source to destination, padded with -1; the
            diagonal is all -1. Made read-only.

    Raises:
        ClusterError: A shape or an index is wrong, or a pair has no route.
    """

    name: str
    devices: tuple[Device, ...] = field(repr=False)
    links: tuple[Link, ...] = field(repr=False)
    segment_bytes: float
    graph: nx.MultiDiGraph = field(repr=False)
    routes_RRH: NDArray[np.int32] = field(repr=False)

    def __post_init__(self) -> None:
        routes, num_devices = self.routes_RRH, len(self.devices)
        _require(num_devices > 0, "cluster.devices", self.devices, "is empty")
        _require(self.segment_bytes > 0, "cluster.segment_bytes", self.segment_bytes, "must be above 0")
        fits = routes.ndim == 3 and routes.shape[:2] == (num_devices, num_devices) and routes.shape[2] > 0
        _require(fits, "cluster.routes_RRH", routes.shape, f"is not ({num_devices}, {num_devices}, H)")
        _require(routes.dtype == np.int32, "cluster.routes_RRH", routes.dtype, "is not int32")
        in_range = bool(np.all((routes >= -1) & (routes < len(self.links))))
        _require(in_range, "cluster.routes_RRH", len(self.links), "links, but a route names another")
        has_route_RR = routes[:, :, 0] >= 0
        right = bool(np.array_equal(has_route_RR, ~np.eye(num_devices, dtype=bool)))
        _require(right, "cluster.routes_RRH", self.name, "lacks a route, or has one from a device to itself")
        _frozen(routes)

    @property
    def num_devices(self) -> int:
        """R."""
        return len(self.devices)

    @property
    def num_nodes(self) -> int:
        """Number of different `Device.node` names."""
        return len(self.node_names)

    @cached_property
    def node_names(self) -> tuple[str, ...]:
        """Names of the nodes, numbered in the order in which the devices first mention them."""
        return tuple(dict.fromkeys(device.node for device in self.devices))

    @cached_property
    def node_of_device_R(self) -> NDArray[np.int64]:
        """Return the node number of each device, int64 (R,), read-only."""
        number = {name: index for index, name in enumerate(self.node_names)}
        node_R = np.array([number[device.node] for device in self.devices], dtype=np.int64)
        _frozen(node_R)
        return node_R

    @cached_property
    def devices_of_node(self) -> tuple[tuple[int, ...], ...]:
        """Device indices of each node, in device order."""
        node_R = self.node_of_device_R
        return tuple(tuple(np.flatnonzero(node_R == node).tolist()) for node in range(self.num_nodes))

    @cached_property
    def index_in_node_R(self) -> NDArray[np.int64]:
        """Return each device's position among the devices of its node, int64 (R,), read-only."""
        index_R = np.empty(self.num_devices, dtype=np.int64)
        for devices in self.devices_of_node:
            index_R[list(devices)] = np.arange(len(devices))
        _frozen(index_R)
        return index_R

    def gateway(self, src_device: int, node: int) -> int:
        """Return the device of `node` that src_device sends to when a message goes once to each node.

        It is the one with src_device's index in its node, modulo the size of `node`: the same rail where
        there are rails, and src_device itself for its own node.
        """
        devices = self.devices_of_node[node]
        return devices[int(self.index_in_node_R[src_device]) % len(devices)]

    @cached_property
    def gateway_RN(self) -> NDArray[np.int32]:
        """Return `gateway` of every device and node, int32 (R, N), read-only."""
        nodes = range(self.num_nodes)
        gateways = [[self.gateway(device, node) for node in nodes] for device in range(self.num_devices)]
        gateway_RN = np.array(gateways, dtype=np.int32)
        _frozen(gateway_RN)
        return gateway_RN

    def route(self, src_device: int, dst_device: int) -> tuple[Link, ...]:
        """Return the links from src_device to dst_device in order; empty for a device to itself."""
        return tuple(self.links[link] for link in self.routes_RRH[src_device, dst_device] if link >= 0)

    @cached_property
    def link_bytes_per_s_X(self) -> NDArray[np.float64]:
        """Return the bandwidth of each link in bytes/s, float64 (X,), read-only."""
        return self._per_link([link.bytes_per_s for link in self.links])

    @cached_property
    def link_latency_s_X(self) -> NDArray[np.float64]:
        """Return the latency of each link in seconds, float64 (X,), read-only."""
        return self._per_link([link.latency_s for link in self.links])

    @cached_property
    def link_message_overhead_s_X(self) -> NDArray[np.float64]:
        """Return the time that each link spends per message in seconds, float64 (X,), read-only."""
        return self._per_link([link.message_overhead_s for link in self.links])

    @cached_property
    def link_payload_bytes_per_s_X(self) -> NDArray[np.float64]:
        """Return what is left of each link's bandwidth for the bytes inside the frames, float64 (X,), read-only."""
        return self._per_link([link.bytes_per_s / (1.0 + link.frame_overhead_frac) for link in self.links])

    @cached_property
    def route_s_per_byte_RR(self) -> NDArray[np.float64]:
        """Return the seconds per payload byte of the narrowest link from device to device, read-only; diagonal 0."""
        s_per_byte_X = np.append(1.0 / self.link_payload_bytes_per_s_X, 0.0)  # the last for the -1 that pads a route
        s_per_byte_RR: NDArray[np.float64] = s_per_byte_X[self.routes_RRH].max(axis=2)
        _frozen(s_per_byte_RR)
        return s_per_byte_RR

    @cached_property
    def link_message_s_X(self) -> NDArray[np.float64]:
        """Return the time that a message takes on each link beside its own bytes, float64 (X,), read-only."""
        seconds = [link.message_overhead_s + link.message_header_bytes / link.bytes_per_s for link in self.links]
        return self._per_link(seconds)

    @staticmethod
    def _per_link(values: list[float]) -> NDArray[np.float64]:
        values_X = np.array(values, dtype=np.float64)
        _frozen(values_X)
        return values_X

"""Routes over the graph of a cluster: `shortest_routes`, which shares out equal-cost paths."""

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import networkx as nx

from epsim.errors import ClusterError

_Path = tuple[int, ...]  # numbers of links in the lexicographic order of their names
_Side = tuple[str, str]  # (vertex, "out" or "in" for the two halves of a device, "" for nics and switches)


def _link_order(graph: nx.MultiDiGraph) -> list[tuple[str, str, int]]:
    """Return (source, target, link index) of all edges, ordered by source, target and link name."""
    edges = sorted((source, target, edge["name"], edge["link"]) for source, target, edge in graph.edges.data())
    return [(source, target, link) for source, target, _, link in edges]


def _halved(order: Sequence[tuple[str, str, int]], devices: set[str]) -> nx.DiGraph:
    """Return the graph with each device cut into an `out` and an `in` half, so that no path goes through it.

    Edges have the attribute `numbers`: the positions in `order` of the links that join the two vertices.
    """
    numbers: defaultdict[tuple[_Side, _Side], list[int]] = defaultdict(list)
    for number, (source, target, _) in enumerate(order):
        out_half = (source, "out" if source in devices else "")
        in_half = (target, "in" if target in devices else "")
        numbers[out_half, in_half].append(number)
    halved = nx.DiGraph()
    halved.add_nodes_from((device, half) for device in devices for half in ("out", "in"))
    halved.add_edges_from((source, target, {"numbers": found}) for (source, target), found in numbers.items())
    return halved


def _paths_from(halved: nx.DiGraph, source: str, targets: Sequence[str]) -> list[list[_Path]]:
    """Return, for each target, all shortest paths from source in lexicographic order (none: empty)."""
    start: _Side = (source, "out")
    predecessors: dict[_Side, list[_Side]] = nx.predecessor(halved, start)
    known: dict[_Side, list[_Path]] = {start: [()]}

    def paths_to(vertex: _Side) -> list[_Path]:
        if vertex not in known:
            known[vertex] = sorted(
                (*path, number)
                for before in predecessors[vertex]
                for path in paths_to(before)
                for number in halved.edges[before, vertex]["numbers"]
            )
        return known[vertex]

    return [paths_to((target, "in")) if (target, "in") in predecessors else [] for target in targets]


def _widest(paths: list[list[int]], rates: Mapping[int, float]) -> list[list[int]]:
    """Return the paths whose narrowest link is the widest, in their order."""
    widths = [min(rates[link] for link in path) for path in paths]
    return [path for path, width in zip(paths, widths, strict=True) if width == max(widths)]


def _flow_hash(source: str, destination: str) -> int:
    return zlib.crc32(f"{source}>{destination}".encode())


def shortest_routes(graph: nx.MultiDiGraph, devices: Sequence[str]) -> list[list[list[int]]]:
    """Return the link indices of the route of each ordered pair of devices: routes[src][dst].

    A route has the least number of links and passes through nics and switches only: devices do not forward.
    Of several shortest ones it has the widest narrowest link. Where n paths are equal in both (equal-cost multipath),
    they are ordered lexicographically by the names of the vertices and links on them, and a pair takes number
    crc32("source>destination") % n: a fixed hash of the flow, as switches take one, so that flows can collide as they
    do there. A device's route to itself is empty.

    Args:
        graph: Vertices are names; edges have the attributes `link` (the index to return), `name` and `bytes_per_s`.
        devices: Names of the R devices in rank order.

    Raises:
        ClusterError: A pair of devices has no route.
    """
    order = _link_order(graph)
    rates = {edge["link"]: edge["bytes_per_s"] for _, _, edge in graph.edges.data()}
    halved = _halved(order, set(devices))
    routes: list[list[list[int]]] = []
    for src, source in enumerate(devices):
        routes.append([[] for _ in devices])
        for dst, paths in enumerate(_paths_from(halved, source, devices)):
            if src == dst:
                continue
            if not paths:
                raise ClusterError(
                    f'cluster.links: no route from "{source}" to "{devices[dst]}"; devices do not forward: '
                    "write links that join the two directly or through nics and switches"
                )
            links = _widest([[order[number][2] for number in path] for path in paths], rates)
            routes[src][dst] = links[_flow_hash(source, devices[dst]) % len(links)]
    return routes

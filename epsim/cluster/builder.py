"""From the plain values of a cluster's YAML to a `Cluster`: `build_cluster` fills in, checks, routes."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from epsim.cluster.cluster import Cluster, Device, Link
from epsim.cluster.routes import shortest_routes
from epsim.errors import ScenarioError

_NUM_SUGGESTIONS = 5


def _one_of(value: str, choices: Sequence[str]) -> str:
    """Return the choices nearest to value as text for a message."""
    nearest = difflib.get_close_matches(value, choices, n=_NUM_SUGGESTIONS, cutoff=0.0)
    return ", ".join(nearest) + (", …" if len(choices) > len(nearest) else "")


def _fill(template: str, variables: Mapping[str, int], path: str) -> str:
    try:
        return template.format(**variables)
    except KeyError as error:
        wanted = error.args[0]
        raise ScenarioError(
            f'{path}: "{template}" uses {{{wanted}}}, which `each` lacks; write e.g. each: {{{wanted}: 2}}'
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError):
        raise ScenarioError(
            f'{path}: "{template}" is not a name pattern; write e.g. "gpu{{i}}" with each: {{i: 8}}'
        ) from None


def _expanded(
    entries: Sequence[Mapping[str, Any]], kind: str, fields: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], dict[str, str]]]:
    """Yield (path, entry, filled-in fields) per entry and combination of its `each`, last fastest."""
    for number, entry in enumerate(entries):
        path = f"cluster.{kind}[{number}]"
        each: Mapping[str, int] = entry["each"]
        for values in product(*(range(count) for count in each.values())):
            variables = dict(zip(each, values, strict=True))
            yield path, entry, {field: _fill(entry[field], variables, f"{path}.{field}") for field in fields}


def _device(entry: Mapping[str, Any], names: Mapping[str, str], type_spec: Mapping[str, Any]) -> Device:
    staging = type_spec["staging"]
    messaging = type_spec["messaging"] or {}
    return Device(
        name=names["name"],
        node=names["node"],
        type_name=entry["type"],
        memory_bytes=type_spec["memory"],
        memory_usable_frac=type_spec["memory_usable"],
        memory_bytes_per_s=type_spec["memory_bandwidth"],
        flops_per_s=dict(type_spec["flops"]),
        compute_efficiency_frac=type_spec["compute_efficiency"],
        efficiency_exponent=type_spec["efficiency_exponent"],
        memory_efficiency_frac=type_spec["memory_efficiency"],
        launch_overhead_s=type_spec["launch_overhead"],
        layer_overhead_s=type_spec["layer_overhead"],
        request_overhead_s=type_spec["request_overhead"],
        expert_overhead_s=type_spec["expert_overhead"],
        barrier_slowdown_frac=type_spec["barrier_slowdown"],
        transfer_overlap_frac=type_spec["transfer_overlap"],
        staging_bytes_per_s=staging["bandwidth"] if staging else None,
        staging_message_overhead_s=staging["message_overhead"] if staging else 0.0,
        step_overhead_s=type_spec["step_overhead"],
        send_overhead_s=messaging.get("send_overhead", 0.0),
        send_bytes_per_s=messaging.get("send_bandwidth"),
        receive_overhead_s=messaging.get("receive_overhead", 0.0),
        background_bytes_per_s=messaging.get("background_bandwidth"),
    )


def _add_vertex(graph: nx.MultiDiGraph, name: str, kind: str, path: str) -> None:
    if name in graph:
        raise ScenarioError(
            f'{path}.name: "{name}" is named twice; give every device, nic and switch a name of its own '
            "(with `each`, a name that contains all its variables)"
        )
    graph.add_node(name, kind=kind)


def _add_devices(graph: nx.MultiDiGraph, spec: Mapping[str, Any]) -> tuple[Device, ...]:
    types: Mapping[str, Mapping[str, Any]] = spec["device_types"]
    devices = []
    for path, entry, names in _expanded(spec["devices"], "devices", ("name", "node")):
        type_name = entry["type"]
        if type_name not in types:
            raise ScenarioError(
                f'{path}.type: "{type_name}" is not in cluster.device_types; write one of: '
                f"{_one_of(type_name, list(types))}"
            )
        _add_vertex(graph, names["name"], "device", path)
        devices.append(_device(entry, names, types[type_name]))
    used = [device.type_name for device in devices]
    for name in types:
        if name not in used:
            raise ScenarioError(
                f"cluster.device_types.{name}: no device is of this type; leave it out, or write one of: "
                f"{_one_of(name, sorted(set(used)))}"
            )
    return tuple(devices)


def _check_ends(graph: nx.MultiDiGraph, path: str, source: str, target: str) -> None:
    for field, vertex in (("from", source), ("to", target)):
        if vertex not in graph:
            raise ScenarioError(
                f'{path}.{field}: "{vertex}" is not a device, nic or switch; write one of: '
                f"{_one_of(vertex, list(graph))}"
            )
    if source == target:
        raise ScenarioError(f'{path}.to: "{target}" is also the from; write another vertex: a link joins two')


def _as_written(links: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the links with the field names of the YAML, which the messages need."""
    return [{**link, "name": link["name"] or "", "from": link["source"], "to": link["target"]} for link in links]


def _link(entry: Mapping[str, Any], name: str, source: str, target: str, opposite: int | None) -> Link:
    return Link(
        name=name,
        source=source,
        target=target,
        bytes_per_s=entry["bandwidth"],
        latency_s=entry["latency"],
        message_overhead_s=entry["message_overhead"],
        message_header_bytes=entry["message_header"],
        frame_overhead_frac=entry["frame_overhead"],
        burst_bytes=entry["burst"],
        ack_overhead_frac=entry["ack_overhead"],
        opposite=opposite,
        is_staging=False,
    )


def _add_links(graph: nx.MultiDiGraph, spec: Mapping[str, Any]) -> tuple[Link, ...]:
    links: dict[str, Link] = {}
    for path, entry, names in _expanded(_as_written(spec["links"]), "links", ("name", "from", "to")):
        _check_ends(graph, path, names["from"], names["to"])
        ends = (names["from"], names["to"])
        first = len(links)
        for source, target in (ends, ends[::-1]) if entry["duplex"] else (ends,):
            name = f"{names['name']} {source}->{target}".strip()
            if name in links:
                raise ScenarioError(
                    f'{path}.name: the link "{name}" is there twice; write it once, or give parallel links '
                    "different names"
                )
            graph.add_edge(source, target, link=len(links), name=name, bytes_per_s=entry["bandwidth"])
            opposite = first + 1 - (len(links) - first) if entry["duplex"] else None
            links[name] = _link(entry, name, source, target, opposite)
    return tuple(links.values())


def _staging_links(device: Device) -> tuple[Link, ...]:
    """Return the virtual links (out of, into) the device through host memory, or nothing without staging."""
    if device.staging_bytes_per_s is None:
        return ()
    return tuple(
        Link(
            name=f"{device.name} host {way}",
            source=device.name,
            target=device.name,
            bytes_per_s=device.staging_bytes_per_s,
            latency_s=0.0,
            message_overhead_s=device.staging_message_overhead_s,
            is_staging=True,
        )
        for way in ("tx", "rx")
    )


def _add_staging(
    devices: Sequence[Device], links: tuple[Link, ...], routes: Sequence[Sequence[list[int]]]
) -> tuple[Link, ...]:
    """Put staging links in front of and behind the routes (changed in place); return all links."""
    for rank, device in enumerate(devices):
        staging = _staging_links(device)
        if not staging:
            continue
        tx, rx = len(links), len(links) + 1
        links += staging
        for other in range(len(devices)):
            if other != rank:
                routes[rank][other].insert(0, tx)
                routes[other][rank].append(rx)
    return links


def _padded(routes: Sequence[Sequence[list[int]]]) -> NDArray[np.int32]:
    num_hops = max(1, max(len(route) for row in routes for route in row))
    routes_RRH = np.full((len(routes), len(routes), num_hops), -1, dtype=np.int32)
    for src, row in enumerate(routes):
        for dst, route in enumerate(row):
            routes_RRH[src, dst, : len(route)] = route
    return routes_RRH


def build_cluster(spec: Mapping[str, Any]) -> Cluster:
    """Return the cluster that a checked YAML describes.

    Ranks, nodes and links are numbered in the order of the YAML, `each` with its last variable fastest.

    Args:
        spec: `epsim.scenario.cluster.ClusterSpec(...).model_dump()`: plain values in SI units.

    Raises:
        ScenarioError: An unknown device type or vertex, a name twice, a variable missing in `each`, or a link
            from a vertex to itself; the message has the path of the field.
        ClusterError: Two devices have no route.
    """
    graph = nx.MultiDiGraph()
    devices = _add_devices(graph, spec)
    for kind, noun in (("nics", "nic"), ("switches", "switch")):
        for path, _, names in _expanded(spec[kind], kind, ("name",)):
            _add_vertex(graph, names["name"], noun, path)
    links = _add_links(graph, spec)
    routes = shortest_routes(graph, [device.name for device in devices])
    links = _add_staging(devices, links, routes)
    return Cluster(
        name=spec["name"],
        devices=devices,
        links=links,
        segment_bytes=spec["segment"],
        graph=graph,
        routes_RRH=_padded(routes),
    )

"""Clusters: the YAML, the presets, routes worked out by hand, and one message per mistake."""

import re
import time
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from reference.tiny import device_type

import epsim
from epsim.cluster import Cluster, Link, build_cluster
from epsim.errors import ClusterError, InputError, ScenarioError
from epsim.scenario.cluster import ClusterSpec

PRESETS = Path(epsim.__file__).parent / "presets" / "clusters"
PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
DOCS = Path(__file__).parent.parent / "docs" / "clusters.md"
DEVICE_TYPE = {"memory": "64 GB", "memory_bandwidth": "200 GB/s", "flops": {"bf16": "40 TFLOP/s"}}


def build(spec: dict[str, Any]) -> Cluster:
    return build_cluster(ClusterSpec.model_validate(spec).model_dump())


def preset(name: str) -> Cluster:
    return build(yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))


def two_devices(**changes: Any) -> dict[str, Any]:
    """Return devices a0 and a1 on a cable; `changes` replace top-level fields."""
    spec: dict[str, Any] = {
        "name": "two",
        "device_types": {"t": DEVICE_TYPE},
        "devices": [{"name": "a{i}", "type": "t", "node": "n{i}", "each": {"i": 2}}],
        "links": [{"from": "a0", "to": "a1", "bandwidth": "10 Gbit/s", "latency": "50 us"}],
    }
    return {**spec, **changes}


def fat_tree(num_devices: int, num_spines: int, devices_per_leaf: int) -> dict[str, Any]:
    """Return devices under leaves, every leaf joined to every spine."""
    num_leaves = num_devices // devices_per_leaf
    link = {"bandwidth": "50 GB/s", "latency": "1 us"}
    leaves = {"i": num_leaves}
    return two_devices(
        devices=[{"name": "d{i}.{j}", "type": "t", "node": "n{i}", "each": {**leaves, "j": devices_per_leaf}}],
        switches=[{"name": "leaf{i}", "each": leaves}, {"name": "spine{s}", "each": {"s": num_spines}}],
        links=[
            {"from": "d{i}.{j}", "to": "leaf{i}", "each": {**leaves, "j": devices_per_leaf}, **link},
            {"from": "leaf{i}", "to": "spine{s}", "each": {**leaves, "s": num_spines}, **link},
        ],
    )


def hops(cluster: Cluster, src: int, dst: int) -> list[str]:
    """Return the names of the vertices on a route."""
    route = cluster.route(src, dst)
    return [route[0].source, *(link.target for link in route)]


def assert_sound(cluster: Cluster) -> None:
    num_devices, names = cluster.num_devices, [device.name for device in cluster.devices]
    assert cluster.routes_RRH.shape[:2] == (num_devices, num_devices)
    assert cluster.routes_RRH.dtype == np.int32
    for src in range(num_devices):
        for dst in range(num_devices):
            route = cluster.route(src, dst)
            row = cluster.routes_RRH[src, dst]
            assert np.array_equal(row >= 0, np.arange(len(row)) < len(route))  # padding only at the end
            if src == dst:
                assert route == ()
                continue
            assert (route[0].source, route[-1].target) == (names[src], names[dst])
            assert all(left.target == right.source for left, right in pairwise(route))
            wire = [link for link in route if not link.is_staging]
            assert not {link.target for link in wire[:-1]} & set(names)  # devices do not forward


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_builds_and_is_sound(name: str) -> None:
    cluster = preset(name)
    assert cluster.name == name
    assert_sound(cluster)


def test_presets_are_the_promised_ones() -> None:
    assert PRESET_NAMES == ["a800-2x8", "h100-2x8", "h200-1x8", "orin-2x-10gbe"]
    shapes = {name: (preset(name).num_nodes, preset(name).num_devices) for name in PRESET_NAMES}
    assert shapes == {"a800-2x8": (2, 16), "h100-2x8": (2, 16), "h200-1x8": (1, 8), "orin-2x-10gbe": (2, 2)}


def test_only_hopper_has_fp8() -> None:
    has_fp8 = {name for name in PRESET_NAMES if "fp8" in preset(name).devices[0].flops_per_s}
    assert has_fp8 == {"h100-2x8", "h200-1x8"}


def test_orin_in_si_units() -> None:
    cluster = preset("orin-2x-10gbe")
    orin = cluster.devices[1]
    assert (orin.name, orin.node, orin.type_name) == ("orin1", "orin1", "orin")
    assert orin.memory_bytes == 64e9
    assert orin.flops_per_s["bf16"] == 42.5e12
    assert orin.staging_bytes_per_s is None
    (link,) = cluster.route(0, 1)
    assert link.bytes_per_s == pytest.approx(9.41e9 / 8)
    assert link.latency_s == 50e-6
    assert cluster.segment_bytes == 65536


def test_h100_routes_by_hand() -> None:
    cluster = preset("h100-2x8")  # ranks 0-7 in node0, 8-15 in node1
    assert hops(cluster, 0, 3) == ["node0.gpu0", "node0.nvswitch", "node0.gpu3"]
    assert hops(cluster, 1, 14) == ["node0.gpu1", "node0.nic1", "infiniband", "node1.nic6", "node1.gpu6"]
    # 16 x (nvlink, pcie, ndr) in both directions
    assert len(cluster.links) == 96
    assert {link.bytes_per_s for link in cluster.route(1, 14)} == {63e9, 50e9}
    assert sum(link.latency_s for link in cluster.route(1, 14)) == pytest.approx(2.7e-6)
    assert sum(link.latency_s for link in cluster.route(0, 3)) == pytest.approx(0.47e-6)


def test_two_gpus_share_a_nic_on_a800() -> None:
    cluster = preset("a800-2x8")
    to_other_node = [cluster.routes_RRH[gpu, 8] for gpu in range(3)]
    assert to_other_node[0][1] == to_other_node[1][1]  # gpus 0 and 1: the same hdr port
    assert to_other_node[0][0] != to_other_node[1][0]  # each its own pcie link
    assert to_other_node[2][1] != to_other_node[1][1]
    shared = cluster.links[to_other_node[0][1]]
    assert shared.name == "hdr node0.pcie0.nic->infiniband"
    assert shared.bytes_per_s == 25e9


def test_duplex_makes_a_link_each_way() -> None:
    cluster = build(two_devices())
    assert [link.name for link in cluster.links] == ["a0->a1", "a1->a0"]
    assert cluster.links[0].bytes_per_s == cluster.links[1].bytes_per_s == 1.25e9
    assert cluster.routes_RRH.tolist() == [[[-1], [0]], [[1], [-1]]]


def test_simplex_is_one_direction() -> None:
    there = {"name": "up", "from": "a0", "to": "a1", "bandwidth": "10 Gbit/s", "duplex": False}
    back = {"from": "a1", "to": "a0", "bandwidth": "1 Gbit/s", "duplex": False}
    cluster = build(two_devices(links=[there, back]))
    assert [link.name for link in cluster.links] == ["up a0->a1", "a1->a0"]
    assert cluster.link_bytes_per_s_X.tolist() == [1.25e9, 0.125e9]


def test_staging_is_in_front_of_and_behind_every_route() -> None:
    staging = {"bandwidth": "10 GB/s", "message_overhead": "20 us"}
    types = {"t": {**DEVICE_TYPE, "staging": staging}, "plain": DEVICE_TYPE}
    devices = [{"name": f"a{i}", "type": kind, "node": "n"} for i, kind in enumerate(("t", "plain", "t"))]
    links = [{"from": f"a{i}", "to": "switch", "bandwidth": "10 Gbit/s", "latency": "1 us"} for i in range(3)]
    cluster = build(two_devices(device_types=types, devices=devices, switches=[{"name": "switch"}], links=links))
    assert_sound(cluster)
    wire = ["a0->switch", "switch->a2"]
    assert [link.name for link in cluster.route(0, 2)] == ["a0 host tx", *wire, "a2 host rx"]
    assert [link.name for link in cluster.route(0, 1)] == ["a0 host tx", "a0->switch", "switch->a1"]
    assert [link.name for link in cluster.route(1, 2)] == ["a1->switch", "switch->a2", "a2 host rx"]
    assert [link.is_staging for link in cluster.links] == [False] * 6 + [True] * 4
    tx = cluster.route(0, 2)[0]
    assert (tx.bytes_per_s, tx.latency_s, tx.message_overhead_s) == (10e9, 0.0, 20e-6)
    assert cluster.link_message_overhead_s_X.tolist() == [0.0] * 6 + [20e-6] * 4
    assert cluster.link_latency_s_X.tolist() == [1e-6] * 6 + [0.0] * 4
    assert cluster.graph.number_of_edges() == 6


def test_equal_cost_paths_are_chosen_by_the_hash_of_the_flow() -> None:
    cluster = build(fat_tree(num_devices=8, num_spines=2, devices_per_leaf=2))
    assert_sound(cluster)
    for target in ("d1.0", "d1.1", "d2.0", "d2.1", "d3.0", "d3.1"):
        spine = f"spine{zlib.crc32(f'd0.0>{target}'.encode()) % 2}"
        dst = [device.name for device in cluster.devices].index(target)
        assert hops(cluster, 0, dst) == ["d0.0", "leaf0", spine, f"leaf{target[1]}", target]
    assert hops(cluster, 0, 1) == ["d0.0", "leaf0", "d0.1"]
    far = [(src, dst) for src in range(8) for dst in range(8) if src // 2 != dst // 2]
    used = Counter(hops(cluster, *pair)[2] for pair in far)
    assert set(used) == {"spine0", "spine1"}
    assert min(used.values()) > 12  # of 48: a hash does not balance exactly, but uses both


def test_parallel_links_are_equal_cost_paths() -> None:
    cable = {"from": "a0", "to": "a1", "bandwidth": "10 Gbit/s"}
    cluster = build(two_devices(links=[{**cable, "name": "y"}, {**cable, "name": "x"}]))
    assert cluster.route(0, 1)[0].name == f"{'xy'[zlib.crc32(b'a0>a1') % 2]} a0->a1"


def test_order_of_links_in_the_yaml_does_not_change_routes() -> None:
    spec = fat_tree(num_devices=8, num_spines=3, devices_per_leaf=2)
    one, other = (
        build(spec),
        build({**spec, "links": spec["links"][::-1], "switches": spec["switches"][::-1]}),
    )
    pairs = [(src, dst) for src in range(8) for dst in range(8) if src != dst]
    assert [hops(one, *pair) for pair in pairs] == [hops(other, *pair) for pair in pairs]


def test_routes_agree_with_a_slow_search() -> None:
    cluster = preset("a800-2x8")
    names = {device.name for device in cluster.devices}

    def distance(src: str, dst: str) -> int:  # breadth first, one frontier at a time
        frontier, steps = {src}, 0
        while dst not in frontier:
            passing = {vertex for vertex in frontier if vertex == src or vertex not in names}
            frontier, steps = (
                {after for vertex in passing for after in cluster.graph.successors(vertex)},
                steps + 1,
            )
        return steps

    for src, device in enumerate(cluster.devices):
        for dst, other in enumerate(cluster.devices):
            if src != dst:
                assert len(cluster.route(src, dst)) == distance(device.name, other.name)


def test_nodes_are_numbered_by_first_appearance() -> None:
    nodes = ["z", "a", "z", "z", "a"]
    devices = [{"name": f"g{i}", "type": "t", "node": node} for i, node in enumerate(nodes)]
    links = [{"from": "g{i}", "to": "hub", "bandwidth": "1 GB/s", "each": {"i": 5}}]
    cluster = build(two_devices(devices=devices, switches=[{"name": "hub"}], links=links))
    assert cluster.node_names == ("z", "a")
    assert cluster.node_of_device_R.tolist() == [0, 1, 0, 0, 1]
    assert cluster.index_in_node_R.tolist() == [0, 0, 1, 2, 1]
    assert cluster.devices_of_node == ((0, 2, 3), (1, 4))
    # gateway into node 1 = devices (1, 4): index 0 -> 1, index 1 -> 4, index 2 -> 2 % 2 = 0 -> 1
    assert [cluster.gateway(src, 1) for src in range(5)] == [1, 1, 4, 1, 4]
    assert [cluster.gateway(src, int(cluster.node_of_device_R[src])) for src in range(5)] == list(range(5))


def test_each_runs_with_the_last_variable_fastest() -> None:
    names = [device.name for device in preset("a800-2x8").devices]
    assert names[:3] == ["node0.pcie0.gpu0", "node0.pcie0.gpu1", "node0.pcie1.gpu0"]
    assert names[8] == "node1.pcie0.gpu0"


def test_one_device_needs_no_links() -> None:
    cluster = build(two_devices(devices=[{"name": "solo", "type": "t", "node": "n"}], links=[]))
    assert cluster.routes_RRH.tolist() == [[[-1]]]
    assert cluster.route(0, 0) == ()


def test_arrays_are_read_only() -> None:
    cluster = build(two_devices())
    arrays: list[NDArray[Any]] = [
        cluster.routes_RRH,
        cluster.node_of_device_R,
        cluster.index_in_node_R,
        cluster.link_latency_s_X,
    ]
    assert not any(array.flags.writeable for array in arrays)


def test_defaults_are_neutral() -> None:
    device = build(two_devices()).devices[0]
    assert (device.compute_efficiency_frac, device.memory_efficiency_frac, device.memory_usable_frac) == (
        1,
        1,
        1,
    )
    assert (device.launch_overhead_s, device.expert_overhead_s, device.staging_message_overhead_s) == (
        0,
        0,
        0,
    )


CABLE = {"from": "a0", "to": "a1", "bandwidth": "1 GB/s"}
TEMPLATE = {"name": "a{i}", "type": "t", "node": "n"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": (
        {"devices": [{"name": "a0", "type": "orni", "node": "n"}]},
        'cluster.devices[0].type: "orni" is not in cluster.device_types; write one of: t',
    ),
    "unknown target": (
        {"links": [CABLE, {**CABLE, "to": "a7"}]},
        'cluster.links[1].to: "a7" is not a device, nic or switch; write one of: ',
    ),
    "unknown source": (
        {"links": [{**CABLE, "from": "b"}]},
        'cluster.links[0].from: "b" is not a device, nic or',
    ),
    "link to itself": ({"links": [{**CABLE, "to": "a0"}]}, 'cluster.links[0].to: "a0" is also the from'),
    "link twice": ({"links": [CABLE, CABLE]}, 'cluster.links[1].name: the link "a0->a1" is there twice'),
    "link both ways twice": (
        {"links": [CABLE, {**CABLE, "from": "a1", "to": "a0"}]},
        'cluster.links[1].name: the link "a1->a0" is there twice',
    ),
    "name without variable": (
        {"devices": [{"name": "a", "type": "t", "node": "n", "each": {"i": 2}}]},
        'cluster.devices[0].name: "a" is named twice',
    ),
    "nic named as a device": ({"nics": [{"name": "a1"}]}, 'cluster.nics[0].name: "a1" is named twice'),
    "switch named as a nic": (
        {"nics": [{"name": "x"}], "switches": [{"name": "y"}, {"name": "x"}]},
        'cluster.switches[1].name: "x" is named twice',
    ),
    "variable missing": (
        {"devices": [{**TEMPLATE, "each": {"j": 2}}]},
        'cluster.devices[0].name: "a{i}" uses {i}, which `each` lacks; write e.g. each: {i: 2}',
    ),
    "variable missing in a link": (
        {"links": [{**CABLE, "to": "a{k}"}]},
        'cluster.links[0].to: "a{k}" uses {k}, which `each` lacks',
    ),
    "broken pattern": ({"devices": [{**TEMPLATE, "node": "n{"}]}, "cluster.devices[0].name: "),
    "broken node pattern": (
        {"devices": [{"name": "a", "type": "t", "node": "n{"}]},
        'cluster.devices[0].node: "n{" is not a name pattern; write e.g. "gpu{i}" with each: {i: 8}',
    ),
    "positional pattern": ({"nics": [{"name": "x{}"}]}, 'cluster.nics[0].name: "x{}" is not a name pattern'),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_path(case: str) -> None:
    changes, message = MISTAKES[case]
    with pytest.raises(ScenarioError, match=f"^{re.escape(message)}") as raised:
        build(two_devices(**changes))
    assert "\n" not in str(raised.value)


def test_nearest_names_come_first() -> None:
    spec = yaml.safe_load((PRESETS / "h100-2x8.yaml").read_text())
    spec["links"][0]["to"] = "node{i}.nvswich"
    with pytest.raises(ScenarioError, match=re.escape("write one of: node0.nvswitch, node1.nvswitch, ")):
        build(spec)


def test_unreachable_pair_is_named() -> None:
    message = 'cluster.links: no route from "a0" to "a1"; devices do not forward'
    with pytest.raises(ClusterError, match=f"^{re.escape(message)}"):
        build(two_devices(links=[]))


def test_one_way_only_is_unreachable_on_the_way_back() -> None:
    with pytest.raises(ClusterError, match='no route from "a1" to "a0"'):
        build(two_devices(links=[{**CABLE, "duplex": False}]))


def test_devices_do_not_forward() -> None:
    chain = [{**CABLE, "from": f"a{i}", "to": f"a{i + 1}"} for i in range(2)]
    with pytest.raises(ClusterError, match='no route from "a0" to "a2"'):
        build(two_devices(devices=[{**TEMPLATE, "each": {"i": 3}}], links=chain))


@pytest.mark.parametrize(
    ("changes", "path", "message"),
    [
        ({"links": [{**CABLE, "bandwidth": "10 GB"}]}, ("links", 0, "bandwidth"), '"10 GB" is not a rate'),
        ({"links": [{**CABLE, "bandwidth": 10}]}, ("links", 0, "bandwidth"), "10 is not a rate"),
        ({"links": [{**CABLE, "latency": "-1 us"}]}, ("links", 0, "latency"), "is not from 0 s"),
        ({"links": [{**CABLE, "speed": "1 GB/s"}]}, ("links", 0, "speed"), "Extra inputs"),
        ({"segment": "0 B"}, ("segment",), "is not from 1 B"),
        ({"devices": []}, ("devices",), "at least 1 item"),
        ({"nics": [{"name": "x", "each": {"i": 0}}]}, ("nics", 0, "each", "i"), "greater than 0"),
        ({"nics": [{"name": "x", "each": {"1": 2}}]}, ("nics", 0, "each", "1", "[key]"), "pattern"),
        (
            {"device_types": {"t": {**DEVICE_TYPE, "flops": {"fp16": "1 TFLOP/s"}}}},
            ("device_types", "t", "flops"),
            "['fp16'] lacks bf16; write e.g. \"bf16: 312 TFLOP/s\"",
        ),
        (
            {"device_types": {"t": {**DEVICE_TYPE, "memory_efficiency": 1.5}}},
            ("device_types", "t", "memory_efficiency"),
            "less than or equal to 1",
        ),
    ],
)
def test_a_field_of_the_wrong_shape(changes: dict[str, Any], path: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        ClusterSpec.model_validate(two_devices(**changes))
    (error,) = raised.value.errors()
    assert error["loc"] == path
    assert message in error["msg"]


def test_domain_objects_check_themselves() -> None:
    good = build(two_devices())
    with pytest.raises(ClusterError, match="bytes_per_s: 0 must be above 0"):
        Link(
            name="l",
            source="a",
            target="b",
            bytes_per_s=0,
            latency_s=0,
            message_overhead_s=0,
            is_staging=False,
        )
    parts = {name: getattr(good, name) for name in ("name", "devices", "links", "segment_bytes", "graph")}
    wrong: list[tuple[Any, str]] = [
        (np.zeros((2, 1), np.int32), "is not"),
        (good.routes_RRH.astype(np.int64), "is not int32"),
        (good.routes_RRH[::-1], "lacks a route"),
        (good.routes_RRH * np.int32(9), "another"),
    ]
    for routes_RRH, rule in wrong:
        with pytest.raises(InputError, match=rule):
            Cluster(**parts, routes_RRH=routes_RRH)


def test_building_is_quick() -> None:
    specs = {
        16: yaml.safe_load((PRESETS / "h100-2x8.yaml").read_text()),
        256: fat_tree(num_devices=256, num_spines=8, devices_per_leaf=8),
    }
    seconds = {}
    for size, spec in specs.items():
        start = time.perf_counter()
        cluster = build(spec)
        seconds[size] = time.perf_counter() - start
        assert cluster.num_devices == size
    assert seconds[16] < 0.5  # ten times what is wanted, for busy machines
    assert seconds[256] < 20


def test_example_in_the_docs_builds() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    clusters = [build(yaml.safe_load(block)) for block in blocks]
    assert clusters
    for cluster in clusters:
        assert_sound(cluster)


@pytest.mark.parametrize("name", ["a800-2x8", "h100-2x8", "h200-1x8"])
def test_devices_of_a_node_reach_each_other_over_nvlink(name: str) -> None:
    cluster = preset(name)
    for src in range(cluster.num_devices):
        for dst in cluster.devices_of_node[cluster.node_of_device_R[src]]:
            assert src == dst or {link.name.split()[0] for link in cluster.route(src, dst)} == {"nvlink"}


def test_of_equally_short_paths_the_widest_is_taken() -> None:
    # By way of x the narrowest link has 1 GB/s, by way of y 2 GB/s.
    links = [
        {"from": "a0", "to": "x", "bandwidth": "9 GB/s"},
        {"from": "x", "to": "a1", "bandwidth": "1 GB/s"},
        {"from": "a0", "to": "y", "bandwidth": "2 GB/s"},
        {"from": "y", "to": "a1", "bandwidth": "3 GB/s"},
    ]
    cluster = build(two_devices(links=links, switches=[{"name": "x"}, {"name": "y"}]))
    assert hops(cluster, 0, 1) == ["a0", "y", "a1"]
    assert hops(cluster, 1, 0) == ["a1", "y", "a0"]


def test_a_device_type_without_a_device_is_a_mistake() -> None:
    spec = {
        "name": "test", "segment": 10.0, "device_types": {"orin": device_type(), "orni": device_type()},
        "devices": [{"name": "d0", "node": "n0", "type": "orin", "each": {}}], "nics": [], "switches": [], "links": [],
    }  # fmt: skip
    message = r"^cluster\.device_types\.orni: no device is of this type; leave it out, or write one of: orin$"
    with pytest.raises(ScenarioError, match=message):
        build_cluster(spec)

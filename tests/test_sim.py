"""The simulator: steps by hand, the event engine against closed form, SimPy twin, queueing theory and conservation."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from reference.graphs import released_messages
from reference.scenarios import Shape, fabric, gateways, mesh, random_plan, routed_plan
from reference.sent import bytes_between, bytes_on_links, flows_meet
from reference.tiny import device_type, link, make_cluster, star, tiny_model

from epsim.cluster import Cluster
from epsim.cost import HomeWork, RooflineCost
from epsim.model import Moe
from epsim.placement import Placement
from epsim.sim import (
    PARTS,
    Fidelity,
    StepPlan,
    StepPlanner,
    StepResult,
    Transmission,
    event,
    simpy_engine,
    simulate_step,
)
from epsim.sim.engine import Execution
from epsim.sim.slices import slices_of
from epsim.sim.step import Mode
from epsim.sim.task_graph import Kind
from epsim.traffic import Dedup, MessageFormat, TrafficCounter

FIDELITIES: tuple[Fidelity, ...] = ("event", "simpy", "analytic")
MODES: tuple[Mode, ...] = ("sync", "async", "two_batch")
DEDUPS: tuple[Dedup, ...] = ("none", "device", "node")
PLANNERS: dict[str, Callable[[np.random.Generator, Cluster, Shape], StepPlan]] = {
    "random": random_plan,
    "routed": routed_plan,
}
seeds = st.integers(0, 2**32 - 1)


def assert_close(actual: Any, expected: Any, name: str = "") -> None:
    assert_allclose(actual, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def property_of(max_examples: int) -> settings:
    return settings(max_examples=max_examples, deadline=None, derandomize=True)


@st.composite
def sizes(draw: st.DrawFn, max_devices: int, min_devices: int = 1) -> tuple[int, int]:
    """Draw numbers of devices and nodes."""
    num_devices = draw(st.integers(min_devices, max_devices))
    return num_devices, draw(st.integers(1, min(3, num_devices)))


@st.composite
def shapes(draw: st.DrawFn, mode: Mode, dedup: Dedup, num_devices: int, densities: tuple[float, ...]) -> Shape:
    return Shape(
        mode=mode,
        dedup=dedup,
        num_layers=draw(st.integers(1, 3)),
        num_chunks=draw(st.integers(1, 5)) if mode == "async" else 1,
        num_homes=draw(st.sampled_from(sorted({1, min(2, num_devices), num_devices}))),
        density=draw(st.sampled_from(densities)),
        kv=draw(st.booleans()),
        overlap_kv=draw(st.booleans()),
        some_zeros=draw(st.booleans()),
        overlap_shared=draw(st.booleans()),
    )


def parts_of(result: StepResult, device: int) -> dict[str, Any]:
    """Return the parts of a device that are not 0."""
    return {name: pytest.approx(s) for name, s in zip(PARTS, result.parts_s_PR[:, device], strict=True) if s != 0}


# Steps by hand.


def make_plan(mode: Mode, num_devices: int = 2, **changes: Any) -> StepPlan:
    """Return a plan of one layer and one chunk without durations and bytes; `changes` replace fields."""
    r = num_devices
    vectors = {name: np.zeros(r) for name in ("vision_s_R", "head_s_R")}
    by_layer = ("attention_s_LR", "dense_ffn_s_LR", "router_s_LR", "home_experts_s_LR", "shared_s_LR", "host_s_LR")
    by_layer += ("copy_s_LR", "experts_s_LR", "local_s_LR")
    per_layer = {name: np.zeros((1, r)) for name in by_layer}
    by_pair = ("remote_s_LCRR", "dispatch_bytes_LCRR", "combine_bytes_LCRR")
    per_pair = {name: np.zeros((1, 1, r, r)) for name in by_pair}
    by_node = ("node_dispatch_bytes_LCRN", "node_combine_bytes_LCRN")
    per_node = {name: np.zeros((1, 1, r, 1)) for name in by_node}
    fields: dict[str, Any] = {
        "mode": mode,
        **vectors,
        **per_layer,
        **per_pair,
        **per_node,
        "gateway_RN": None,
        "node_of_device_R": np.zeros(r, np.int32),
        "kv_bytes_LRR": np.zeros((1, r, r)),
        "overlap_kv": True,
    }
    arrays = {k: np.array(v, float) if isinstance(v, list) else v for k, v in changes.items()}
    num_layers = len(arrays.get("dispatch_bytes_LCRR", [0]))
    more = {name: np.zeros((num_layers, r)) for name in ("pack_s_LR", "reduce_s_LR")}
    return StepPlan(**{**fields, **more, **arrays})


def two_devices(bandwidth: float = 10.0, latency: float = 0.5, **link_changes: Any) -> Cluster:
    return make_cluster([device_type()] * 2, [link("d0", "d1", bandwidth, latency, **link_changes)])


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_two_batches_by_hand(fidelity: Fidelity) -> None:
    # Device 0: fronts 0-1 and 1-2. Dispatches of 10 bytes at 10 B/s, 0.5 s latency: sent 1-2 and 2-3, there at 2.5 and
    # 3.5. Device 1: experts 2.5-4.5 and 4.5-6.5. Results of 10 bytes back at 6 and at 8. Head 8-9.
    fields: dict[str, Any] = {
        "attention_s_LR": [[1.0, 0.0]],
        "experts_s_LR": [[0.0, 2.0]],
        "dispatch_bytes_LCRR": [[[[0.0, 10.0], [0.0, 0.0]]]],
        "combine_bytes_LCRR": [[[[0.0, 10.0], [0.0, 0.0]]]],
    }
    plan = make_plan("two_batch", head_s_R=[1.0, 0.0], second=make_plan("two_batch", **fields), **fields)
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(9.0)
    assert parts_of(result, 0) == {"attention": 2.0, "head": 1.0, "combine": 6.0}
    assert parts_of(result, 1) == {"experts": 4.0, "dispatch": 2.5, "waiting": 2.5}
    # In mode sync, both at once: front 0-2, dispatch until 4.5, experts until 8.5, combine until 11, head until 12.
    whole = {
        name: [[2 * x for x in values[0]]] if "_s_" in name else 2 * np.array(values) for name, values in fields.items()
    }
    assert simulate_step(make_plan("sync", head_s_R=[1.0, 0.0], **whole), two_devices(), fidelity)[0].end_s == 12.0


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_shared_experts_while_the_dispatch_travels(fidelity: Fidelity) -> None:
    # Front until 1; dispatch of 20 bytes until 3.5; meanwhile shared experts until 3 on device 0 (2 s) and until 4 on
    # device 1 (3 s): routed experts 3.5-4.5 and 4-6. Back (10 bytes) at 7.5. Not overlapped: 3.5-6.5 and 3.5-8.5; 10.
    fields: dict[str, Any] = {
        "attention_s_LR": [[1.0, 1.0]],
        "shared_s_LR": [[2.0, 3.0]],
        "experts_s_LR": [[1.0, 2.0]],
        "dispatch_bytes_LCRR": [[[[0.0, 20.0], [0.0, 0.0]]]],
        "combine_bytes_LCRR": [[[[0.0, 10.0], [0.0, 0.0]]]],
    }
    result, _ = simulate_step(make_plan("sync", overlap_shared=True, **fields), two_devices(), fidelity)
    assert result.end_s == pytest.approx(7.5)
    assert parts_of(result, 0) == {"attention": 1.0, "experts": 3.0, "dispatch": 0.5, "waiting": 1.5, "combine": 1.5}
    assert parts_of(result, 1) == {"attention": 1.0, "experts": 5.0, "combine": 1.5}
    assert simulate_step(make_plan("sync", **fields), two_devices(), fidelity)[0].end_s == pytest.approx(10.0)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_layer_takes_as_long_as_its_host_needs(fidelity: Fidelity, mode: Mode) -> None:
    # Device 0 computes 1 s and device 1 2 s in each of two layers. Host 0 needs 5 s for layer 0 and 1 s for layer 1,
    # host 1 3 s and 1 s. Alone, device 0 is done with layer 0 at 5 and with layer 1 at 6, device 1 at 3 and 5: async.
    # In mode sync a layer's barriers wait for both: fronts start at 0 in layer 0 (barrier at 2) and in layer 1 at 5 and
    # 3 (barrier at 6). No host holds the heads up.
    plan = make_plan(
        mode,
        attention_s_LR=[[1.0, 2.0], [1.0, 2.0]], host_s_LR=[[5.0, 3.0], [1.0, 1.0]], head_s_R=[0.0, 0.0],
        **{name: np.zeros((2, 2)) for name in ("dense_ffn_s_LR", "router_s_LR", "home_experts_s_LR", "shared_s_LR",
                                               "copy_s_LR", "experts_s_LR", "local_s_LR")},
        **{name: np.zeros((2, 1, 2, 2)) for name in ("remote_s_LCRR", "dispatch_bytes_LCRR", "combine_bytes_LCRR")},
        **{name: np.zeros((2, 1, 2, 1)) for name in ("node_dispatch_bytes_LCRN", "node_combine_bytes_LCRN")},
        kv_bytes_LRR=np.zeros((2, 2, 2)),
    )  # fmt: skip
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(6.0)
    assert parts_of(result, 0) == {"attention": 2.0, "host": 4.0 if mode == "async" else 3.0} | (
        {} if mode == "async" else {"waiting": 1.0}
    )
    assert parts_of(result, 1) == {"attention": 4.0, "host": 1.0, "waiting": 1.0}


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_copies_come_before_local_experts(fidelity: Fidelity) -> None:
    # Front 1 s; the message of 20 bytes takes 2.5 s: there at 3.5, computed until 5.5, back (10 bytes) at 7.
    # Device 0: copies until 3, local experts until 4.
    plan = make_plan(
        "async",
        attention_s_LR=[[1.0, 0.0]], copy_s_LR=[[2.0, 0.0]], local_s_LR=[[1.0, 0.0]],
        remote_s_LCRR=[[[[0.0, 2.0], [0.0, 0.0]]]],
        dispatch_bytes_LCRR=[[[[0.0, 20.0], [0.0, 0.0]]]],
        combine_bytes_LCRR=[[[[0.0, 10.0], [0.0, 0.0]]]],
    )  # fmt: skip
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(7.0)
    assert parts_of(result, 0) == {"attention": 1.0, "copy": 2.0, "experts": 1.0, "combine": 3.0}


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_sync_step_by_hand(fidelity: Fidelity) -> None:
    # Fronts end at 2 and 3 (0.5 vision + 1.5 attention; 3 attention): barrier at 3. Dispatch 0 to 1 of 20 bytes at
    # 10 B/s: 2 s + 0.5 s latency, barrier at 5.5. Experts 1 and 4 s (with shared): 9.5. Back 10 bytes: 1.5 s, 11.
    # Heads 1 and 2 s: 13.
    plan = make_plan(
        "sync",
        vision_s_R=[0.5, 0],
        attention_s_LR=[[1.5, 3]],
        experts_s_LR=[[1, 3.5]],
        shared_s_LR=[[0, 0.5]],
        head_s_R=[1, 2],
        dispatch_bytes_LCRR=[[[[0, 20], [0, 0]]]],
        combine_bytes_LCRR=[[[[0, 10], [0, 0]]]],
    )
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(13)
    assert parts_of(result, 0) == {
        "vision": 0.5, "attention": 1.5, "experts": 1, "head": 1, "dispatch": 2.5, "combine": 1.5, "waiting": 1 + 3 + 1,
    }  # fmt: skip
    assert parts_of(result, 1) == {"attention": 3, "experts": 4, "head": 2, "dispatch": 2.5, "combine": 1.5}
    assert result.delivered_bytes_RR.tolist() == [[0, 20], [10, 0]]
    assert result.link_busy_s_X.tolist() == pytest.approx([2, 1])
    assert result.contended in (False, None)
    assert result.kv_end_s == 0


ASYNC_BY_HAND: dict[str, Any] = {
    "attention_s_LR": [[1.0, 2.0]],
    "local_s_LR": [[3.0, 1.0]],
    "head_s_R": [0.5, 0.5],
}


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_async_step_by_hand(fidelity: Fidelity) -> None:
    # Device 0: front to 1, local to 4; its 20 bytes reach device 1 at 1 + 2.5 = 3.5. Device 1: front to 2, local to 3,
    # idle to 3.5, remote 2 s to 5.5; 10 bytes back at 5.5 + 1.5 = 7. Device 0 idles from 4 to 7, head to 7.5.
    # Device 1 has no token elsewhere: head from 5.5 to 6, then waits for device 0.
    plan = make_plan(
        "async",
        **ASYNC_BY_HAND,
        remote_s_LCRR=[[[[0, 2], [0, 0]]]],
        dispatch_bytes_LCRR=[[[[0, 20], [0, 0]]]],
        combine_bytes_LCRR=[[[[0, 10], [0, 0]]]],
    )
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(7.5)
    assert parts_of(result, 0) == {"attention": 1, "experts": 3, "head": 0.5, "combine": 3}
    assert parts_of(result, 1) == {"attention": 2, "experts": 3, "head": 0.5, "dispatch": 0.5, "waiting": 1.5}


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_async_chunks_by_hand(fidelity: Fidelity) -> None:
    # The same in two chunks of 10 bytes, 1 s of experts, 5 bytes back. The chunks arrive at 1 + 1 + 0.5 = 2.5 and 3.5.
    # Device 1 serves them from 3 to 4 and from 4 to 5; back at 4 + 0.5 + 0.5 = 5 and 6, one second earlier.
    plan = make_plan(
        "async",
        **ASYNC_BY_HAND,
        remote_s_LCRR=[[[[0, 1], [0, 0]], [[0, 1], [0, 0]]]],
        dispatch_bytes_LCRR=[[[[0, 10], [0, 0]], [[0, 10], [0, 0]]]],
        combine_bytes_LCRR=[[[[0, 5], [0, 0]], [[0, 5], [0, 0]]]],
        node_dispatch_bytes_LCRN=np.zeros((1, 2, 2, 1)),
        node_combine_bytes_LCRN=np.zeros((1, 2, 2, 1)),
    )
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(6.5)
    assert parts_of(result, 0) == {"attention": 1, "experts": 3, "head": 0.5, "combine": 2}
    assert parts_of(result, 1) == {"attention": 2, "experts": 3, "head": 0.5, "waiting": 1}


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize(("overlap", "kv_end_s"), [(True, 7.5), (False, 13.5)])
def test_kv_cache_by_hand(fidelity: Fidelity, overlap: bool, kv_end_s: float) -> None:
    # Two layers, attention 1 s, experts 4 s, no tokens abroad, head 0: fronts end at 1 and 6, the step at 10.
    # 20 and 10 bytes of KV: with overlap 1 + 2.5 = 3.5 and 6 + 1.5 = 7.5; else 30 bytes from 10 on, 10 + 3.5.
    plan = make_plan("sync")
    two_layers: dict[str, Any] = {
        name: np.zeros((2, *value.shape[1:]))
        for name, value in vars(plan).items()
        if "_L" in name and value is not None
    }
    two_layers["attention_s_LR"] = np.array([[1.0, 0.0]] * 2)
    two_layers["experts_s_LR"] = np.array([[4.0, 0.0]] * 2)
    two_layers["kv_bytes_LRR"] = np.array([[[0, 20.0], [0, 0]], [[0, 10.0], [0, 0]]])
    result, _ = simulate_step(replace(plan, **two_layers, overlap_kv=overlap), two_devices(), fidelity)
    assert result.end_s == pytest.approx(10)
    assert result.kv_end_s == pytest.approx(kv_end_s)


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_node_dedup_by_hand(fidelity: Fidelity) -> None:
    # Devices 0 | 1 2; device 0 sends to both. One message of 30 bytes goes to the gateway (device 1) at 10 B/s, 3 s,
    # and 20 of them onward at 20 B/s, 1 s: all there at 4. Experts 2 s. Device 2's 20 bytes are at the gateway 1 s
    # later; one reduced vector of 20 bytes goes home, 2 s: 9.
    links = [link("d0", "d1", 10.0), link("d0", "d2", 10.0), link("d1", "d2", 20.0)]
    cluster = make_cluster([device_type()] * 3, links, nodes=[0, 1, 1])
    plan = make_plan(
        "sync",
        num_devices=3,
        experts_s_LR=[[0, 2, 2]],
        dispatch_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        combine_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        node_dispatch_bytes_LCRN=[[[[0, 30], [0, 0], [0, 0]]]],
        node_combine_bytes_LCRN=[[[[0, 20], [0, 0], [0, 0]]]],
        gateway_RN=gateways(cluster),
        node_of_device_R=np.array([0, 1, 1], np.int32),
    )
    result, _ = simulate_step(plan, cluster, fidelity)
    assert result.end_s == pytest.approx(9)
    assert result.delivered_bytes_RR.tolist() == [[0, 30, 0], [20, 0, 20], [0, 20, 0]]


def test_planner_by_hand() -> None:
    # Experts 0 1 | 2 3 | 4 5; device 2 in the other node. Tokens of device 0: experts (0, 2), (4, 5), (1, 4).
    model = tiny_model(num_layers=2, moe=Moe(num_experts=6, topk=2, expert_ffn_size=1, num_dense_layers=1))
    cluster = make_cluster(
        [device_type()] * 3, [link(f"d{r}", "switch", 1.0) for r in range(3)], nodes=[0, 0, 1], switches=("switch",)
    )
    placement = Placement(
        policy="test",
        num_experts=6,
        physical_to_logical_LP=np.arange(6, dtype=np.int32)[None],
        node_of_device_R=np.array([0, 0, 1], np.int32),
    )
    ids_TLK = np.array([[[0, 2]], [[4, 5]], [[1, 4]]], np.uint8)
    traffic = TrafficCounter(placement).count(ids_TLK, np.zeros(3, np.int32))
    counts = np.array([3, 0, 0])
    work = HomeWork(
        decode=False, tokens_R=counts, requests_R=counts, kv_tokens_R=0 * counts, attention_pairs_R=2 * counts,
        images_R=0 * counts, outputs_R=counts,
    )  # fmt: skip
    form = MessageFormat(dispatch_vector_bytes=10.0, combine_vector_bytes=4.0, pair_bytes=1.0)
    kv_tokens_RR = np.array([[5, 2, 0], [0, 0, 0], [0, 0, 0]])
    plans = {}
    for dedup in DEDUPS:
        transmission = Transmission(mode="async", dedup=dedup, num_chunks=1, message_format=form, overlap_kv=True)
        planner = StepPlanner(model, cluster, RooflineCost(model, cluster), transmission)
        plans[dedup] = planner.plan((work,), traffic, kv_tokens_RR)
    # To device 1: 1 pair, 1 token. To device 2: 3 pairs, 2 tokens.
    assert plans["none"].dispatch_bytes_LCRR[0, 0].tolist() == [[0, 11, 33], [0, 0, 0], [0, 0, 0]]
    assert plans["none"].combine_bytes_LCRR[0, 0].tolist() == [[0, 4, 12], [0, 0, 0], [0, 0, 0]]
    for dedup in ("device", "node"):
        assert plans[dedup].dispatch_bytes_LCRR[0, 0].tolist() == [[0, 11, 23], [0, 0, 0], [0, 0, 0]]
        assert plans[dedup].combine_bytes_LCRR[0, 0].tolist() == [[0, 4, 8], [0, 0, 0], [0, 0, 0]]
    assert plans["node"].node_dispatch_bytes_LCRN[0, 0].tolist() == [[0, 23], [0, 0], [0, 0]]
    assert plans["node"].node_combine_bytes_LCRN[0, 0].tolist() == [[0, 8], [0, 0], [0, 0]]
    assert not plans["device"].node_dispatch_bytes_LCRN.any()
    plan = plans["none"]
    # A layer of attention: 3*24 + 6*8 = 120 FLOPs in 2.4 s; 24 + 3*4 + 24 = 60 bytes in 6 s; the dense layer before
    # makes it two. Dense FFN: 48 + 24 bytes, 7.2 s. Local experts: 2 pairs on 2 experts, 24 + 16 bytes, 4 s.
    assert plan.attention_s_LR[0].tolist() == pytest.approx([12, 0, 0])
    assert plan.dense_ffn_s_LR[0].tolist() == pytest.approx([7.2, 0, 0])
    assert plan.local_s_LR[0].tolist() == pytest.approx([4, 0, 0])
    # Remote: 1 pair on 1 expert, 12 + 8 bytes; 3 pairs on 2 experts, 24 + 24 bytes.
    assert plan.remote_s_LCRR[0, 0, 0].tolist() == pytest.approx([0, 2, 4.8])
    sync = Transmission(mode="sync", dedup="none", num_chunks=1, message_format=form, overlap_kv=True)
    together = StepPlanner(model, cluster, RooflineCost(model, cluster), sync).plan((work,), traffic, kv_tokens_RR)
    assert together.experts_s_LR[0].tolist() == pytest.approx([4, 2, 4.8])
    # Two cached tokens move to device 1 (the five that stay do not): 2 * 4 bytes for the MoE layer and the dense one.
    assert plan.kv_bytes_LRR[0].tolist() == [[0, 16, 0], [0, 0, 0], [0, 0, 0]]


def test_host_figures_of_a_plan_by_hand() -> None:
    # Two devices, one layer, two experts, top-1. Home 0 has two tokens: one for its own expert, one for the other's.
    # Message of 10 + 1 bytes over 10 B/s with 0.5 s of overhead: 1.6 s out; 4 bytes, 0.9 s back. A quarter is hidden:
    # 0.75 * 2.5 = 1.875 s of device 0's compute. The floor of 3 s is for both, as both compute something.
    model = tiny_model(num_layers=1, dense_ffn_size=None, moe=Moe(num_experts=2, topk=1, expert_ffn_size=1))
    figures = {"transfer_overlap": 0.25, "layer_overhead": 3.0, "barrier_slowdown": 0.5}
    links = [link("d0", "d1", 10.0, 0.5, message_overhead=0.5)]
    cluster, plain = (make_cluster([device_type(**changes)] * 2, links) for changes in (figures, {}))
    placement = Placement(
        policy="test",
        num_experts=2,
        physical_to_logical_LP=np.array([[0, 1]], np.int32),
        node_of_device_R=np.array([0, 1], np.int32),
    )

    def plan_of(mode: Mode, cluster: Cluster, expert_ids: list[int], dedup: Dedup = "none") -> StepPlan:
        num_chunks, num_tokens = 2 if mode == "two_batch" else 1, len(expert_ids)
        ids_TLK, home_T = np.array(expert_ids, np.uint8)[:, None, None], np.zeros(num_tokens, np.int32)
        traffic = TrafficCounter(placement, num_chunks).count(ids_TLK, home_T)
        form = MessageFormat(dispatch_vector_bytes=10.0, combine_vector_bytes=4.0, pair_bytes=1.0)
        transmission = Transmission(mode=mode, dedup=dedup, num_chunks=num_chunks, message_format=form, overlap_kv=True)
        cuts = [num_tokens] if mode != "two_batch" else [num_tokens // 2, num_tokens - num_tokens // 2]
        counts = [np.array([count, 0]) for count in cuts]
        works = [
            HomeWork(
                decode=True, tokens_R=n, requests_R=n, kv_tokens_R=n, attention_pairs_R=n, images_R=0 * n, outputs_R=n
            )
            for n in counts
        ]  # fmt: skip
        planner = StepPlanner(model, cluster, RooflineCost(model, cluster), transmission)
        return planner.plan(works, traffic, np.zeros((2, 2), np.int64))

    plan = plan_of("async", cluster, [0, 1])
    assert plan.copy_s_LR.tolist() == [[pytest.approx(1.875), 0.0]]
    assert plan_of("async", cluster, [0, 1], "node").copy_s_LR.tolist() == plan.copy_s_LR.tolist()
    assert plan.host_s_LR.tolist() == [[3.0, 3.0]]
    assert not plan_of("async", plain, [0, 1]).copy_s_LR.any()
    # Barriers stretch what is computed, and the floor, by a half; nothing is copied.
    sync, before = plan_of("sync", cluster, [0, 1]), plan_of("sync", plain, [0, 1])
    assert not sync.copy_s_LR.any()
    assert sync.host_s_LR.tolist() == [[4.5, 4.5]]
    for name in ("attention_s_LR", "router_s_LR", "shared_s_LR", "experts_s_LR", "head_s_R"):
        assert getattr(sync, name).tolist() == pytest.approx(1.5 * getattr(before, name)), name
    # A device that has nothing to do in a step does not hold the others up, nor does an empty micro-batch.
    assert plan_of("async", cluster, [0, 0]).host_s_LR.tolist() == [[3.0, 0.0]]
    assert plan_of("two_batch", cluster, [0, 0]).hosts_s_LR.tolist() == [[6.0, 0.0]]
    assert plan_of("two_batch", cluster, [0]).hosts_s_LR.tolist() == [[3.0, 0.0]]


def test_async_decode_can_lose_by_reading_weights_twice() -> None:
    # Two devices with one expert each; each home has a token for either expert. Vectors of 4 bytes at 1 MB/s: 4 µs.
    # Experts, 10 B/s: sync 12 + 2*8 bytes in one kernel, 2.8 s; async 12 + 8 bytes for its own token and again for the
    # other's, 2 + 2 s. All else is the same but for the 4 µs of dispatch, which async hides behind its own token.
    model = tiny_model(num_layers=1, dense_ffn_size=None, moe=Moe(num_experts=2, topk=1, expert_ffn_size=1))
    cluster = two_devices(bandwidth=1e6, latency=0.0)
    placement = Placement(
        policy="test",
        num_experts=2,
        physical_to_logical_LP=np.array([[0, 1]], np.int32),
        node_of_device_R=np.array([0, 1], np.int32),
    )
    traffic = TrafficCounter(placement).count(
        np.array([[[0]], [[1]], [[0]], [[1]]], np.uint8), np.array([0, 0, 1, 1], np.int32)
    )
    counts = np.array([2, 2])
    work = HomeWork(
        decode=True, tokens_R=counts, requests_R=counts, kv_tokens_R=9 * counts, attention_pairs_R=9 * counts,
        images_R=0 * counts, outputs_R=counts,
    )  # fmt: skip
    form = MessageFormat(dispatch_vector_bytes=4.0, combine_vector_bytes=4.0, pair_bytes=0.0)
    end_s = {}
    for mode in ("sync", "async"):
        transmission = Transmission(mode=mode, dedup="device", num_chunks=1, message_format=form, overlap_kv=True)
        plan = StepPlanner(model, cluster, RooflineCost(model, cluster), transmission).plan(
            (work,), traffic, np.zeros((2, 2), np.int64)
        )
        end_s[mode] = simulate_step(plan, cluster, "event")[0].end_s
    assert end_s["async"] - end_s["sync"] == pytest.approx(4.0 - 2.8 - 4e-6, abs=1e-9)


# The event engine against closed form, where nothing is contended.


def assert_same_result(event_result: StepResult, closed: StepResult) -> None:
    for name in ("end_s", "kv_end_s", "parts_s_PR", "link_busy_s_X", "link_bytes_X", "delivered_bytes_RR"):
        assert_close(getattr(event_result, name), getattr(closed, name), name)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("mode", MODES)
def test_uncontended_step_equals_closed_form(mode: Mode, dedup: Dedup, planner: str) -> None:
    compared: Counter[str] = Counter()

    @property_of(200)
    @given(data=st.data(), size=sizes(9, 2), staging=st.booleans(), seed=seeds)
    def check(data: st.DataObject, size: tuple[int, int], staging: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        cluster = mesh(rng, *size, staging)
        plan = PLANNERS[planner](rng, cluster, data.draw(shapes(mode, dedup, size[0], (0.1, 0.3, 0.05, 1.0))))
        result, execution = simulate_step(plan, cluster, "event")
        # Flows that use a link one after the other do not contend either, but the closed form shares it among them.
        assert execution is not None
        if result.contended or flows_meet(plan, cluster) or waits_for_an_earlier_layer(execution):
            return
        assert_same_result(result, simulate_step(plan, cluster, "analytic")[0])
        if plan.dispatch_bytes_LCRR.any():
            compared["steps"] += 1
            compared["chunks"] += len(set(np.nonzero(plan.dispatch_bytes_LCRR)[1])) > 1
            compared["kv"] += bool(plan.kv_bytes_LRR.any())
            compared["staging"] += staging
            compared["several homes"] += len(set(np.nonzero(plan.dispatch_bytes_LCRR)[2])) > 1
            compared["through a gateway"] += bool(plan.node_dispatch_bytes_LCRN.any())

    check()
    assert compared["steps"] >= 40, compared
    assert compared["several homes"] >= 4, compared
    assert compared["staging"] >= 2, compared
    assert compared["kv"] >= 1, compared
    assert mode != "async" or compared["chunks"] >= 10, compared
    assert dedup != "node" or compared["through a gateway"] >= 10, compared


def waits_for_an_earlier_layer(execution: Execution) -> bool:
    """Whether a message waited for one of its own flow from the layer before: exchanges that meet."""
    graph, run = execution.graph, execution.run
    for flow in range(graph.num_flows):
        messages = np.flatnonzero((graph.kind_N == Kind.MESSAGE) & (graph.flow_N == flow))
        messages = messages[np.argsort(run.start_s_N[messages])]
        for before, after in pairwise(messages):
            if graph.layer_N[before] != graph.layer_N[after] and run.start_s_N[after] < run.end_s_N[before]:
                return True
    return False


def test_flows_that_take_turns_on_a_link_are_late_in_closed_form() -> None:
    # Device 1 sends results home to 0 and to 2 through one port of 10 B/s. Those for 0 (20 bytes) leave when they are
    # ready at 1 and end at 3; those for 2 leave at 5 and end at 7: they never meet. The closed form gives each its
    # share of all bytes through the port (a half) and doubles both.
    links = [link(f"d{r}", "switch", 10.0 if r == 1 else 1e9) for r in range(3)]
    cluster = make_cluster([device_type()] * 3, links, switches=("switch",))
    combine = [[0, 20, 0], [0, 0, 0], [0, 20, 0]]
    dispatch = [[0, 1e-9, 0], [0, 0, 0], [0, 1e-9, 0]]
    plan = make_plan(
        "async",
        num_devices=3,
        attention_s_LR=[[0, 0, 3]],
        remote_s_LCRR=[[[[0, 1, 0], [0, 0, 0], [0, 2, 0]]]],
        dispatch_bytes_LCRR=[[dispatch]],
        combine_bytes_LCRR=[[combine]],
        node_of_device_R=np.arange(3, dtype=np.int32),
    )
    result, _ = simulate_step(plan, cluster, "event")
    assert result.contended is False
    assert result.end_s == pytest.approx(7)
    assert simulate_step(plan, cluster, "analytic")[0].end_s == pytest.approx(9)


# The compiled engine against its SimPy twin, and what holds in every engine, contended or not.


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("mode", MODES)
def test_engines_on_a_contended_fabric(mode: Mode, dedup: Dedup, planner: str) -> None:
    seen: Counter[str] = Counter()

    @property_of(16)
    @given(data=st.data(), size=sizes(7, 3), staging=st.booleans(), seed=seeds)
    def check(data: st.DataObject, size: tuple[int, int], staging: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        cluster = fabric(rng, *size, staging)
        plan = PLANNERS[planner](rng, cluster, data.draw(shapes(mode, dedup, size[0], (1.0, 0.5))))
        assert_sound(plan, cluster)
        result, fast = simulate_step(plan, cluster, "event")
        _, slow = simulate_step(plan, cluster, "simpy")
        assert fast is not None
        assert slow is not None
        assert fast.run.contended == slow.run.contended
        for name in ("start_s_N", "end_s_N", "sent_s_N", "incoming_s_N", "busy_s_X", "carried_bytes_X"):
            assert_close(getattr(fast.run, name), getattr(slow.run, name), name)
        seen["contended" if result.contended else "uncontended"] += 1

    check()
    assert seen["contended"] >= 4, seen


@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("mode", MODES)
def test_mesh_conserves_bytes_and_time(mode: Mode, dedup: Dedup) -> None:
    @property_of(15)
    @given(data=st.data(), size=sizes(9), seed=seeds)
    def check(data: st.DataObject, size: tuple[int, int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        cluster = mesh(rng, *size)
        plan = random_plan(rng, cluster, data.draw(shapes(mode, dedup, size[0], (0.3, 1.0))))
        assert_sound(plan, cluster)

    check()


def assert_sound(plan: StepPlan, cluster: Cluster) -> None:
    """Bytes that leave arrive, links carry what their routes say, and parts fill the step, in every engine."""
    bytes_RR = bytes_between(plan)
    bytes_X, held_s_X = bytes_on_links(plan, cluster)
    for fidelity in FIDELITIES:
        result, _ = simulate_step(plan, cluster, fidelity)
        assert_close(result.delivered_bytes_RR, bytes_RR)
        assert_close(result.link_bytes_X, bytes_X)
        assert_close(result.link_busy_s_X, held_s_X)
        assert_close(result.parts_s_PR.sum(axis=0), result.end_s)
        assert result.parts_s_PR.min() >= -1e-12
        assert (result.parts_s_PR[: len(plan.compute_s_PR())] == plan.compute_s_PR()).all()
        assert result.end_s >= plan.compute_s_PR().sum(axis=0).max() - 1e-12
        if fidelity != "analytic":  # which lets flows of different exchanges pass through each other
            assert max(result.end_s, result.kv_end_s) >= held_s_X.max(initial=0) - 1e-12


@property_of(40)
@given(seed=seeds, mode=st.sampled_from(MODES), size=sizes(8))
def test_dedup_sends_less(seed: int, mode: Mode, size: tuple[int, int]) -> None:
    crossing, total = {}, {}
    for dedup in DEDUPS:
        rng = np.random.default_rng(seed)  # the same cluster and routing for each
        cluster = mesh(rng, *size)
        shape = Shape(
            mode=mode, dedup=dedup, num_layers=2, num_chunks=1, num_homes=size[0], density=1.0, kv=False,
            overlap_kv=True, some_zeros=False, overlap_shared=False,
        )  # fmt: skip
        delivered_RR = simulate_step(routed_plan(rng, cluster, shape), cluster, "event")[0].delivered_bytes_RR
        node_R = cluster.node_of_device_R
        crossing[dedup] = delivered_RR[node_R[:, None] != node_R].sum()
        total[dedup] = delivered_RR.sum()
    assert crossing["node"] <= crossing["device"] + 1e-9
    assert crossing["device"] <= crossing["none"] + 1e-9
    assert total["device"] <= total["none"] + 1e-9


def test_same_plan_same_result() -> None:
    rng = np.random.default_rng(5)
    cluster = fabric(rng, 6, 2)
    shape = Shape(
        mode="async", dedup="node", num_layers=2, num_chunks=3, num_homes=6, density=1.0, kv=True, overlap_kv=True,
        some_zeros=False, overlap_shared=False,
    )  # fmt: skip
    plan = random_plan(rng, cluster, shape)
    for fidelity in FIDELITIES:
        first, again = (simulate_step(plan, cluster, fidelity)[0] for _ in range(2))
        assert_array_equal(first.parts_s_PR, again.parts_s_PR)
        assert (first.end_s, first.kv_end_s) == (again.end_s, again.kv_end_s)


@property_of(60)
@given(data=st.data(), size=sizes(7), dedup=st.sampled_from(DEDUPS), seed=seeds)
def test_more_bandwidth_never_slows_a_sync_step(
    data: st.DataObject, size: tuple[int, int], dedup: Dedup, seed: int
) -> None:
    # A step on one-hop links: what shares a link is through, in whatever order, no later on a faster one.
    rng = np.random.default_rng(seed)
    cluster = mesh(rng, *size)
    shape = replace(data.draw(shapes("sync", dedup, size[0], (0.3, 1.0))), kv=False)
    plan = random_plan(rng, cluster, shape)
    faster_links = tuple(replace(x, bytes_per_s=x.bytes_per_s * rng.uniform(1, 5)) for x in cluster.links)
    faster = replace(cluster, links=faster_links)
    for fidelity in ("event", "analytic"):
        before, after = (simulate_step(plan, c, fidelity)[0].end_s for c in (cluster, faster))
        assert after <= before + 1e-12


def test_more_bandwidth_makes_a_port_bound_step_faster() -> None:
    # Three devices on a switch, 30 bytes from 0 to each other: 60 bytes leave its port, 6 s at 10 B/s and 3 s at 20.
    # The last segment has another 10 bytes at the receiver's port to go: 7 and 3.5 s; latency 0.
    dispatch = [[[[0, 30, 30], [0, 0, 0], [0, 0, 0]]]]
    plan = make_plan("sync", num_devices=3, dispatch_bytes_LCRR=dispatch, combine_bytes_LCRR=dispatch)
    # The combine of 30 bytes from each crosses the receiver's port: the first 10 bytes take 1 s to the switch, then
    # 60 bytes take 6 s.
    assert simulate_step(plan, star(3, 10.0), "event")[0].end_s == pytest.approx(14)
    assert simulate_step(plan, star(3, 20.0), "event")[0].end_s == pytest.approx(7)


# Queueing theory: messages written by hand.


def run_both(graph: Any, cluster: Cluster) -> event.Run:
    """Run the graph in both engines, which must agree."""
    fast, slow = event.run_graph(graph, cluster), simpy_engine.run_graph(graph, cluster)
    assert_close(fast.end_s_N, slow.end_s_N)
    assert fast.contended == slow.contended
    return fast


def chain(bandwidths: list[float], latencies: list[float], overheads: list[float]) -> Cluster:
    """Return d0 and d1 at the two ends of a row of links."""
    names = ["d0", *(f"s{i}" for i in range(len(bandwidths) - 1)), "d1"]
    links = [
        link(*ends, bandwidth, latency, message_overhead=overhead)
        for ends, bandwidth, latency, overhead in zip(pairwise(names), bandwidths, latencies, overheads, strict=True)
    ]
    return make_cluster([device_type()] * 2, links, switches=tuple(names[1:-1]))


@pytest.mark.parametrize(
    ("num_bytes", "overheads", "end_s"),
    [
        # One segment of 10 bytes held 1, 2 and 0.5 s, latencies 0.1, 0.2, 0.3.
        (10.0, [0, 0, 0], 4.1),
        # Three: the others follow at the pace of the slowest link, 2 s each.
        (30.0, [0, 0, 0], 4.1 + 2 * 2),
        # 25 bytes are three segments of 25/3: 3.5 * 25/30 + 0.6 + 2 * 2 * 25/30.
        (25.0, [0, 0, 0], 0.6 + 7.5 * 25 / 30),
        # An overhead on the first segment only: 0.4 s on the first link delay all; on the slow link as well.
        (30.0, [0.4, 0, 0], 8.5),
        (30.0, [0, 0.4, 0], 8.5),
        # On the last link it does not: its segment leaves at 3.3 + 0.3 + 3 + 0.5, before 7.3, when the last comes.
        (30.0, [0, 0, 3], 8.3 - 0.2),
    ],
)
def test_message_over_three_links(num_bytes: float, overheads: list[float], end_s: float) -> None:
    cluster = chain([10.0, 5.0, 20.0], [0.1, 0.2, 0.3], overheads)
    run = run_both(released_messages([0.0], [(0, 1)], [num_bytes], [0]), cluster)
    assert run.end_s_N[1] == pytest.approx(end_s)
    assert not run.contended
    plan = make_plan("sync", kv_bytes_LRR=[[[0, num_bytes], [0, 0]]])
    for fidelity in FIDELITIES:
        assert simulate_step(plan, cluster, fidelity)[0].kv_end_s == pytest.approx(end_s)


def test_equal_flows_take_turns_at_their_first_link() -> None:
    # Four flows of five segments, 1 s each: flow k ends its last turn at 16 + k + 1; alone on its second link.
    cluster = make_cluster(
        [device_type()] * 5,
        [link("d0", "switch", 10.0), *(link(f"d{r}", "switch", 1e12) for r in range(1, 5))],
        switches=("switch",),
    )
    graph = released_messages([0.0] * 4, [(0, r) for r in range(1, 5)], [50.0] * 4, [0, 1, 2, 3])
    run = run_both(graph, cluster)
    assert run.end_s_N[4:].tolist() == pytest.approx([17, 18, 19, 20])
    assert run.start_s_N[4:].tolist() == pytest.approx([0, 1, 2, 3])
    assert run.contended


def test_messages_of_one_flow_keep_their_order() -> None:
    # The same four messages as one flow: one after the other, and nobody waits for another flow.
    cluster = two_devices(latency=0.0)
    run = run_both(released_messages([0.0] * 4, [(0, 1)] * 4, [50.0] * 4, [0] * 4), cluster)
    assert run.end_s_N[4:].tolist() == pytest.approx([5, 10, 15, 20])
    assert not run.contended


def test_short_flow_overtakes_a_long_one() -> None:
    # A flow of 10 segments, released first; one of 2 at 0.5. Turns: long 0-1, short 1-2, long 2-3, short 3-4.
    cluster = two_devices(latency=0.0)
    run = run_both(released_messages([0.0, 0.5], [(0, 1)] * 2, [100.0, 20.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([12, 4])


def test_later_links_serve_in_order_of_arrival() -> None:
    # Devices 0 and 1 send to 2 over ports of 10 and 20 B/s (1 and 0.5 s a segment) and a shared one of 5 B/s (2 s).
    # Three segments of 0 reach it at 1, 2, 3. Two of 1, released at 0.7, at 1.2 and 1.7. It serves 0 from 1, 1 from 3,
    # 1 from 5, 0 from 7, 0 from 9: ends at 11 and 7, not in turns.
    links = [link("d0", "switch", 10.0), link("d1", "switch", 20.0), link("switch", "d2", 5.0)]
    cluster = make_cluster([device_type()] * 3, links, switches=("switch",))
    run = run_both(released_messages([0.0, 0.7], [(0, 2), (1, 2)], [30.0, 20.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([11, 7])
    assert run.contended


@pytest.mark.parametrize("rho", [0.3, 0.7])
def test_poisson_messages_wait_as_in_an_m_d_1_queue(rho: float) -> None:
    # Single segments of S = 1 s, each a flow of its own, released with exponential gaps of mean S / rho:
    # the mean wait is rho S / (2 (1 - rho)) (Pollaczek-Khinchine with no variance of service).
    count, waits = 20_000, []
    for seed in range(5):
        gaps_s = np.random.default_rng(seed).exponential(1 / rho, count)
        graph = released_messages(gaps_s.tolist(), [(0, 1)] * count, [10.0] * count, list(range(count)))
        run = event.run_graph(graph, two_devices(latency=0.0))
        wait_s_M = run.start_s_N[count:] - run.end_s_N[:count]
        waited_s = 0.0  # Lindley: the next waits for what is left of this one's wait and service
        for m in range(1, count):
            waited_s = max(0.0, waited_s + 1.0 - gaps_s[m])
            assert abs(wait_s_M[m] - waited_s) < 1e-6
        waits.append(wait_s_M.mean())
        assert run.busy_s_X[0] / run.end_s_N.max() == pytest.approx(rho, rel=0.03)
    assert np.mean(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.05)


def test_a_cycle_is_reported() -> None:
    graph = released_messages([1.0, 1.0], [(0, 1)] * 2, [1.0] * 2, [0, 0])
    graph.num_predecessors_N[0] = 1  # waits for something that never comes, and all after it
    with pytest.raises(RuntimeError, match="4 tasks of the step never finished: its graph has a cycle"):
        event.run_graph(graph, two_devices())


# Shapes and slices.


def test_plan_checks_its_shapes() -> None:
    with pytest.raises(ValueError, match=r"experts_s_LR has shape \(1, 3\), not \(1, 2\)"):
        make_plan("sync", experts_s_LR=[[0, 0, 0]])
    chunks: dict[str, Any] = {
        name: np.zeros((1, 2, 2, 2)) for name in ("remote_s_LCRR", "dispatch_bytes_LCRR", "combine_bytes_LCRR")
    }
    with pytest.raises(ValueError, match="exactly one chunk except in mode async"):
        make_plan("sync", **chunks)


def test_slices_of_a_message_by_hand() -> None:
    # 30 bytes over links of 1 and 2 s a segment, latencies 0.1 and 0.2, after 1 s of attention: the first link is held
    # until 4. The first segment is at the second link at 2.1 and begins to come in at 2.1 + 0.2; the last one ends at
    # 2.1 + 3 * 2 + 0.2.
    plan = make_plan("sync", attention_s_LR=[[1, 0]], kv_bytes_LRR=[[[0, 30], [0, 0]]])
    _, execution = simulate_step(plan, chain([10.0, 5.0], [0.1, 0.2], [0.0, 0.0]), "event")
    assert execution is not None
    attention, tx, rx = slices_of(execution, "prefill", 0, 100.0)
    assert (attention.name, attention.track, attention.start_s, attention.end_s) == ("attention", "compute", 100, 101)
    assert (tx.device, tx.start_s, tx.end_s) == (0, pytest.approx(101), pytest.approx(104))
    assert (rx.device, rx.start_s, rx.end_s) == (1, pytest.approx(102.3), pytest.approx(108.3))
    assert tx.message_id == rx.message_id


@property_of(20)
@given(data=st.data(), size=sizes(6), mode=st.sampled_from(MODES), dedup=st.sampled_from(DEDUPS), seed=seeds)
def test_slices_show_the_step(data: st.DataObject, size: tuple[int, int], mode: Mode, dedup: Dedup, seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster = fabric(rng, *size)
    plan = random_plan(rng, cluster, data.draw(shapes(mode, dedup, size[0], (0.3, 1.0))))
    result, execution = simulate_step(plan, cluster, "event")
    assert execution is not None
    slices = slices_of(execution, "decode", 3, 100.0)
    computing_s_R = np.zeros(size[0])
    for device in range(size[0]):
        mine = sorted((s.start_s, s.end_s) for s in slices if s.device == device and s.track == "compute")
        assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(mine))
        computing_s_R[device] = sum(end_s - start_s for start_s, end_s in mine)
    assert_allclose(computing_s_R, plan.compute_s_PR().sum(axis=0), rtol=1e-9, atol=1e-9)
    sent_RR = np.zeros((size[0], size[0]))
    received = {s.message_id: s for s in slices if s.track == "rx"}
    sent = [s for s in slices if s.track == "tx"]
    assert len(sent) == len(received)
    for tx in sent:
        rx = received[tx.message_id]
        assert (tx.device, tx.peer, tx.num_bytes) == (rx.peer, rx.device, rx.num_bytes)
        assert 100 <= tx.start_s <= rx.start_s + 1e-9
        assert tx.end_s <= rx.end_s + 1e-9
        sent_RR[tx.device, rx.device] += tx.num_bytes
    assert_close(sent_RR, result.delivered_bytes_RR)

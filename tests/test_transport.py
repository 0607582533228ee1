"""What a real transport does to messages: framing, bursts, acknowledgements, connections, barriers of one's own.

Steps by hand, and both engines on random steps with all of it.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from reference.graphs import released_messages
from reference.scenarios import fabric, gateways, mesh
from reference.sent import bytes_between, bytes_on_links, flows_meet
from reference.tiny import device_type, link, make_cluster, make_placement, tiny_model
from test_sim import (
    DEDUPS,
    FIDELITIES,
    MODES,
    PLANNERS,
    assert_close,
    assert_same_result,
    make_plan,
    parts_of,
    property_of,
    run_both,
    seeds,
    shapes,
    sizes,
    two_devices,
    waits_for_an_earlier_layer,
)

from epsim.cluster import Cluster
from epsim.cost import HomeWork, RooflineCost
from epsim.errors import ScenarioError
from epsim.model import Moe
from epsim.sim import PARTS, Fidelity, StepPlan, StepPlanner, Transmission, simulate_step
from epsim.sim.engine import Execution
from epsim.sim.idle import idle_by_gaps, idle_of
from epsim.sim.messaging import MessageCosts
from epsim.sim.slices import slices_of
from epsim.sim.step import COMPUTE_PARTS, Mode
from epsim.sim.task_graph import Work
from epsim.traffic import Dedup, MessageFormat, TrafficCounter

EVENTS: tuple[Fidelity, ...] = ("event", "simpy")


# Links.


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_framing_and_header_by_hand(fidelity: Fidelity) -> None:
    # 20 bytes are two segments of 10; half as much again in frames is 30 on the wire, a header 5 more: 3.5 s at 10 B/s,
    # 0.2 s of overhead, 0.5 s of latency.
    cluster = two_devices(frame_overhead=0.5, message_header=5.0, message_overhead=0.2)
    plan = make_plan("sync", kv_bytes_LRR=[[[0, 20], [0, 0]]])
    result, execution = simulate_step(plan, cluster, fidelity)
    assert result.kv_end_s == pytest.approx(4.2)
    assert result.link_busy_s_X.tolist() == pytest.approx([3.7, 0])
    assert result.link_bytes_X.tolist() == [20, 0]
    if execution is not None:  # over two links the header delays the first segment on the second link, too
        chain = make_cluster(
            [device_type()] * 2,
            [link("d0", "s", 10.0, message_header=5.0), link("s", "d1", 5.0, message_header=5.0)],
            switches=("s",),
        )
        # At the switch at 1.5 and 2.5; on from 1.5 for 3 s, from 4.5 for 2 s.
        assert simulate_step(plan, chain, fidelity)[0].kv_end_s == pytest.approx(6.5)


@pytest.mark.parametrize(
    ("burst", "end_s"),
    [
        (0.0, [4.0, 8.0]),
        # 40 bytes less 25 of credit at 10 B/s: 1.5. The bucket then fills for 3.5 s, to the brim at 4; again 1.5.
        (25.0, [1.5, 6.5]),
        # 34 of 40 bytes; from 0.6 to 5 it fills with 34 of the 44 bytes that came: 0.6.
        (34.0, [0.6, 5.6]),
        # All at once, and again.
        (90.0, [0.0, 5.0]),
    ],
)
def test_a_bucket_lets_a_burst_through(burst: float, end_s: list[float]) -> None:
    gaps_s = [0.0, 4.0 if burst == 0.0 else 5.0]
    run = run_both(released_messages(gaps_s, [(0, 1)] * 2, [40.0] * 2, [0, 0]), two_devices(latency=0.0, burst=burst))
    assert run.end_s_N[2:].tolist() == pytest.approx(end_s)
    assert run.busy_s_X[0] == pytest.approx(2 * (40.0 - burst) / 10.0 if burst < 40 else 0.0)


def test_a_bucket_fills_while_a_segment_waits() -> None:
    # 12 bytes of credit, segments of 10. The first leaves at 0 (2 left), the second after (10 - 2) / 10 = 0.8 s with
    # nothing left. A message of 10 bytes at 1.3 finds 5: 0.5 s. Another at 1.8 finds none: 1 s.
    messages = released_messages([0.0, 1.3, 0.5], [(0, 1)] * 3, [20.0, 10.0, 10.0], [0, 1, 2])
    run = run_both(messages, two_devices(latency=0.0, burst=12.0))
    assert run.end_s_N[3:].tolist() == pytest.approx([0.8, 1.8, 2.8])


def test_acknowledgements_of_the_opposite_direction() -> None:
    # 30 bytes one way and 10 the other, both from 0: the first segments take 1.5 s, as each sees the other's. Then the
    # other direction is free: 1 s each, until 3.5.
    cluster = two_devices(latency=0.0, ack_overhead=0.5)
    run = run_both(released_messages([0.0, 0.0], [(0, 1), (1, 0)], [30.0, 10.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([3.5, 1.5])
    # Released at 0.5: the first segment went alone, until 1; the other's (0.5 to 2) sees it; the second (1 to 2.5) sees
    # that one, the third (2.5 to 3.5) nothing.
    run = run_both(released_messages([0.0, 0.5], [(0, 1), (1, 0)], [30.0, 10.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([3.5, 2.0])
    # Overheads are not stretched, and nothing is without an opposite.
    cluster = two_devices(latency=0.0, ack_overhead=0.5, message_overhead=1.0)
    run = run_both(released_messages([0.0, 0.0], [(0, 1), (1, 0)], [10.0, 10.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([2.5, 2.5])
    ways = [link("d0", "d1", 10.0, ack_overhead=0.5, duplex=False), link("d1", "d0", 10.0, duplex=False)]
    cluster = make_cluster([device_type()] * 2, ways)
    run = run_both(released_messages([0.0, 0.0], [(0, 1), (1, 0)], [10.0, 10.0], [0, 1]), cluster)
    assert run.end_s_N[2:].tolist() == pytest.approx([1.0, 1.0])


def test_equal_exchanges_slow_each_other_equally() -> None:
    # Four devices on a switch, each sends the next one 20 bytes at 0: what one may do at an instant, all may.
    links = [link(f"d{r}", "switch", 10.0, ack_overhead=0.25, burst=7.0) for r in range(4)]
    cluster = make_cluster([device_type()] * 4, links, switches=("switch",))
    bytes_RR = 20.0 * np.roll(np.eye(4), 1, axis=1)
    plan = make_plan("sync", 4, dispatch_bytes_LCRR=bytes_RR[None, None], combine_bytes_LCRR=bytes_RR[None, None])
    results = [simulate_step(plan, cluster, fidelity)[0] for fidelity in EVENTS]
    assert_close(results[0].end_s, results[1].end_s)
    for result in results:
        assert_close(result.link_busy_s_X[::2], result.link_busy_s_X[0])
        assert_close(result.link_busy_s_X[1::2], result.link_busy_s_X[1])
    assert results[0].end_s > simulate_step(plan, replace_links(cluster, ack_overhead_frac=0.0), "event")[0].end_s


def replace_links(cluster: Cluster, **changes: Any) -> Cluster:
    return replace(cluster, links=tuple(replace(one, **changes) for one in cluster.links))


# Connections and barriers.


@pytest.mark.parametrize("fidelity", EVENTS)
def test_messages_of_one_connection_keep_their_order(fidelity: Fidelity) -> None:
    # 40 bytes of KV cache and 20 bytes of dispatch from 0 to 1, released together, at 10 B/s and 0.5 s of latency.
    # In turns, a segment each: the dispatch has left at 4, the KV cache at 6. In order: at 6 and 4.
    fields: dict[str, Any] = {
        "kv_bytes_LRR": [[[0, 40], [0, 0]]],
        "dispatch_bytes_LCRR": [[[[0, 20], [0, 0]]]],
        "combine_bytes_LCRR": [[[[0, 1e-9], [0, 0]]]],
    }
    ends = {}
    for connections in ("flow", "pair"):
        plan = make_plan("sync", connections=connections, **fields)
        result, _ = simulate_step(plan, two_devices(), fidelity)
        ends[connections] = [result.end_s, result.kv_end_s]
    assert ends["flow"] == pytest.approx([4.5 + 0.5, 6.5])
    assert ends["pair"] == pytest.approx([6.5 + 0.5, 4.5])


@pytest.mark.parametrize("fidelity", EVENTS)
def test_barriers_of_its_own_by_hand(fidelity: Fidelity) -> None:
    # Fronts end at 1 and 3. Device 0's 20 bytes leave at 1 and are there at 3.5 (all: at 5.5, after the barrier at 3);
    # experts of device 1 until 5.5, 10 bytes back at 7. Device 0 has no tokens to wait for: experts from 1 to 2.
    fields: dict[str, Any] = {
        "attention_s_LR": [[1.0, 3.0]],
        "experts_s_LR": [[1.0, 2.0]],
        "dispatch_bytes_LCRR": [[[[0, 20], [0, 0]]]],
        "combine_bytes_LCRR": [[[[0, 10], [0, 0]]]],
    }
    result, _ = simulate_step(make_plan("sync", barriers="own", **fields), two_devices(), fidelity)
    assert result.end_s == pytest.approx(7.0)
    assert parts_of(result, 0) == {"attention": 1, "experts": 1, "combine": 5}
    assert parts_of(result, 1) == {"attention": 3, "dispatch": 0.5, "experts": 2, "waiting": 1.5}
    assert simulate_step(make_plan("sync", **fields), two_devices(), fidelity)[0].end_s == pytest.approx(9.0)
    # Shared experts of 2 s after each front: device 1's until 5, experts then until 7, results at 8.5.
    shared = make_plan("sync", barriers="own", overlap_shared=True, shared_s_LR=[[2.0, 2.0]], **fields)
    result, _ = simulate_step(shared, two_devices(), fidelity)
    assert result.end_s == pytest.approx(8.5)
    assert parts_of(result, 1) == {"attention": 3, "experts": 4, "waiting": 1.5}


def test_barriers_of_its_own_through_a_gateway() -> None:
    # Devices 0 | 1 2; device 0's 30 bytes are at device 1 at 3 and 20 of them at device 2 at 4; device 1 does not wait
    # for the latter. Experts 2 s: 5 and 6. Device 2's 20 bytes are at the gateway at 7, one vector of 20 home at 9.
    links = [link("d0", "d1", 10.0), link("d0", "d2", 10.0), link("d1", "d2", 20.0)]
    cluster = make_cluster([device_type()] * 3, links, nodes=[0, 1, 1])
    plan = make_plan(
        "sync", 3, barriers="own", experts_s_LR=[[0, 2, 2]], head_s_R=[0, 1, 0],
        dispatch_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        combine_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        node_dispatch_bytes_LCRN=[[[[0, 30], [0, 0], [0, 0]]]],
        node_combine_bytes_LCRN=[[[[0, 20], [0, 0], [0, 0]]]],
        gateway_RN=gateways(cluster), node_of_device_R=np.array([0, 1, 1], np.int32),
    )  # fmt: skip
    results = [simulate_step(plan, cluster, fidelity)[0] for fidelity in EVENTS]
    for result in results:
        assert result.end_s == pytest.approx(9)
        assert parts_of(result, 0) == {"combine": 9}
        assert parts_of(result, 1) == {"dispatch": 3, "experts": 2, "head": 1, "waiting": 3}
        assert parts_of(result, 2) == {"dispatch": 4, "experts": 2, "waiting": 3}


def test_only_sync_has_barriers() -> None:
    with pytest.raises(ValueError, match="only a plan in mode sync has barriers"):
        make_plan("async", barriers="own")


# What messages cost the devices.


def costs_of(num_devices: int, send_s: float, bytes_per_s: float, receive_s: float = 0.0) -> MessageCosts:
    """Return the same costs on every device."""
    values = (send_s, 1.0 / bytes_per_s, receive_s)
    send, per_byte, receive = (np.full(num_devices, value) for value in values)
    return MessageCosts(send_s_R=send, send_s_per_byte_R=per_byte, receive_s_R=receive)


@pytest.mark.parametrize("fidelity", EVENTS)
def test_sends_of_a_sync_step_by_hand(fidelity: Fidelity) -> None:
    # Device 0: attention until 1; 20 bytes to each of two, 0.5 + 20/20 = 1.5 s each: 1-2.5 for device 1, 2.5-4 for 2.
    # At 10 B/s and 0.5 s of latency there at 5 and 6.5: barrier. Experts 1 s; results of 10 bytes, 1 s to send: 8.5;
    # back at 10. Received for nothing.
    cluster = make_cluster(
        [device_type()] * 3, [link(f"d{s}", f"d{d}", 10.0, 0.5) for s, d in ((0, 1), (0, 2), (1, 2))]
    )
    fields: dict[str, Any] = {
        "attention_s_LR": [[1.0, 0, 0]],
        "experts_s_LR": [[0, 1.0, 1.0]],
        "dispatch_bytes_LCRR": [[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        "combine_bytes_LCRR": [[[[0, 10, 10], [0, 0, 0], [0, 0, 0]]]],
    }
    result, _ = simulate_step(make_plan("sync", 3, message_costs=costs_of(3, 0.5, 20.0), **fields), cluster, fidelity)
    assert result.end_s == pytest.approx(10)
    assert parts_of(result, 0) == {"attention": 1, "copy": 3, "dispatch": 2.5, "waiting": 1, "combine": 2.5}
    for device in (1, 2):
        assert parts_of(result, device) == {"waiting": 1, "dispatch": 5.5, "experts": 1, "copy": 1, "combine": 1.5}
    # Each for itself: device 1 computes 5-6, sends until 7, and its result is back at 8.5; device 2's as before.
    own = make_plan("sync", 3, barriers="own", message_costs=costs_of(3, 0.5, 20.0), **fields)
    result, _ = simulate_step(own, cluster, fidelity)
    assert result.end_s == pytest.approx(10)
    assert parts_of(result, 1) == {"dispatch": 5, "experts": 1, "copy": 1, "waiting": 3}
    # Receiving takes 0.25 s: of device 0 for two results, of the others before their experts.
    own = replace(own, message_costs=costs_of(3, 0.5, 20.0, 0.25))
    result, _ = simulate_step(own, cluster, fidelity)
    assert result.end_s == pytest.approx(10.75)
    assert parts_of(result, 0) == {"attention": 1, "copy": 3.5, "combine": 6.25}
    assert parts_of(result, 2) == {"dispatch": 6.5, "experts": 1, "copy": 1.25, "waiting": 2}


@pytest.mark.parametrize("fidelity", EVENTS)
def test_sends_and_receipts_of_an_async_step_by_hand(fidelity: Fidelity) -> None:
    # Device 0: front to 1, sends 20 bytes for 0.5 + 1 s until 2.5, local experts until 5.5. There at 2.5 + 2 + 0.5.
    # Device 1: front to 2, local to 3; from 5: 0.25 s to receive and 2 s of experts, until 7.25; sends 10 bytes for
    # 0.5 + 0.5 s, until 8.25; back at 9.75. Device 0 receives for 0.25 s, head 0.5 s: 10.5.
    plan = make_plan(
        "async",
        attention_s_LR=[[1.0, 2.0]], local_s_LR=[[3.0, 1.0]], head_s_R=[0.5, 0.5],
        remote_s_LCRR=[[[[0, 2], [0, 0]]]],
        dispatch_bytes_LCRR=[[[[0, 20], [0, 0]]]], combine_bytes_LCRR=[[[[0, 10], [0, 0]]]],
        message_costs=costs_of(2, 0.5, 20.0, 0.25),
    )  # fmt: skip
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(10.5)
    assert parts_of(result, 0) == {"attention": 1, "copy": 1.75, "experts": 3, "head": 0.5, "combine": 4.25}
    assert parts_of(result, 1) == {
        "attention": 2, "experts": 3, "dispatch": 2, "copy": 1.25, "head": 0.5, "waiting": 1.75,
    }  # fmt: skip


@pytest.mark.parametrize("fidelity", EVENTS)
def test_sends_of_two_batches_by_hand(fidelity: Fidelity) -> None:
    # Device 0: front 0-1, send 1-1.5, front 1.5-2.5, send 2.5-3. 10 bytes at 10 B/s, 0.5 s: there at 3 and 4.5.
    # Device 1: experts 3-5, send 5-5.5, experts 5.5-7.5, send 7.5-8. Back at 7 and 9.5, head until 10.5.
    costs = costs_of(2, 0.5, np.inf)
    fields: dict[str, Any] = {
        "attention_s_LR": [[1.0, 0.0]],
        "experts_s_LR": [[0.0, 2.0]],
        "dispatch_bytes_LCRR": [[[[0.0, 10.0], [0.0, 0.0]]]],
        "combine_bytes_LCRR": [[[[0.0, 10.0], [0.0, 0.0]]]],
        "message_costs": costs,
    }
    plan = make_plan("two_batch", head_s_R=[1.0, 0.0], second=make_plan("two_batch", **fields), **fields)
    result, _ = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(10.5)
    assert parts_of(result, 0) == {"attention": 2, "copy": 1, "head": 1, "combine": 6.5}
    assert parts_of(result, 1) == {"experts": 4, "copy": 1, "dispatch": 3, "waiting": 2.5}


@pytest.mark.parametrize("fidelity", EVENTS)
def test_sends_of_a_gateway_by_hand(fidelity: Fidelity) -> None:
    # Devices 0 | 1 2, 1 s for each message sent. Device 0 sends until 1; 30 bytes are at device 1 at 4, which first
    # sends on 20 of them, until 5, and then computes, until 7.
    # They are at device 2 at 6, which computes until 8 and sends until 9; at device 1 at 10, which sends until 11; home
    # at 13.
    links = [link("d0", "d1", 10.0), link("d0", "d2", 10.0), link("d1", "d2", 20.0)]
    cluster = make_cluster([device_type()] * 3, links, nodes=[0, 1, 1])
    plan = make_plan(
        "sync", 3, barriers="own", experts_s_LR=[[0, 2, 2]], message_costs=costs_of(3, 1.0, np.inf),
        dispatch_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        combine_bytes_LCRR=[[[[0, 20, 20], [0, 0, 0], [0, 0, 0]]]],
        node_dispatch_bytes_LCRN=[[[[0, 30], [0, 0], [0, 0]]]],
        node_combine_bytes_LCRN=[[[[0, 20], [0, 0], [0, 0]]]],
        gateway_RN=gateways(cluster), node_of_device_R=np.array([0, 1, 1], np.int32),
    )  # fmt: skip
    result, execution = simulate_step(plan, cluster, fidelity)
    assert execution is not None
    assert result.end_s == pytest.approx(13)
    assert parts_of(result, 0) == {"copy": 1, "combine": 12}
    sends = np.isin(execution.graph.work_N, (Work.SEND_OUT, Work.SEND_BACK))
    assert sends.sum() == 4
    assert result.parts_s_PR[PARTS.index("copy")].tolist() == [1, 2, 1]
    assert parts_of(result, 1) == {"dispatch": 4, "experts": 2, "copy": 2, "combine": 3, "waiting": 2}
    assert parts_of(result, 2) == {"dispatch": 6, "experts": 2, "copy": 1, "waiting": 4}


def test_sends_begin_with_the_next_rank() -> None:
    # Four devices, each sends every other one tokens, and device 1 KV caches to 0 and 3 as well: tokens first.
    bytes_RR = 10.0 * (1 - np.eye(4))
    kv_RR = np.zeros((4, 4))
    kv_RR[1, [0, 3]] = 10.0
    links = [link(f"d{s}", f"d{d}", 10.0) for s in range(4) for d in range(s)]
    plan = make_plan(
        "async", 4, dispatch_bytes_LCRR=bytes_RR[None, None], combine_bytes_LCRR=bytes_RR[None, None],
        remote_s_LCRR=bytes_RR[None, None], kv_bytes_LRR=kv_RR[None], attention_s_LR=[[1.0] * 4],
        message_costs=costs_of(4, 0.5, np.inf),
    )  # fmt: skip
    _, execution = simulate_step(plan, make_cluster([device_type()] * 4, links), "event")
    assert execution is not None
    graph, run = execution.graph, execution.run
    sent = np.flatnonzero((graph.source_N == 1) & np.isin(graph.work_N, (Work.DISPATCH, Work.KV)))
    sent = sent[np.argsort(run.start_s_N[sent])]
    assert graph.destination_N[sent].tolist() == [2, 3, 0, 3, 0]
    assert [Work(int(work)) for work in graph.work_N[sent]] == [Work.DISPATCH] * 3 + [Work.KV] * 2
    assert run.start_s_N[sent].tolist() == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5])


@pytest.mark.parametrize("fidelity", FIDELITIES)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_the_end_of_a_step_by_hand(mode: Mode, fidelity: Fidelity) -> None:
    # Heads until 1.5 and 2; another 0.5 and 0.25 s: 2 and 2.25.
    plan = make_plan(mode, attention_s_LR=[[1.0, 1.0]], head_s_R=[0.5, 1.0], step_s_R=np.array([0.5, 0.25]))
    result, execution = simulate_step(plan, two_devices(), fidelity)
    assert result.end_s == pytest.approx(2.25)
    assert parts_of(result, 0) == {"attention": 1, "head": 0.5, "host": 0.5, "waiting": 0.25}
    assert parts_of(result, 1) == {"attention": 1, "head": 1, "host": 0.25}
    if execution is not None:
        last = slices_of(execution, "decode", 1, 0.0)[-1]
        assert (last.track, last.name, last.start_s, last.end_s) == ("host", "end of the step", 2.0, 2.25)


def test_messaging_of_a_plan_by_hand() -> None:
    # Two devices, experts 0 | 1, top-1, one token of home 0 for expert 1: 10 + 1 bytes out, 4 bytes back, and 2 cached
    # tokens of 4 bytes to device 1. Both devices see 11 + 4 + 8 bytes pass, at 2 and at 4 B/s.
    model = tiny_model(num_layers=1, dense_ffn_size=None, moe=Moe(num_experts=2, topk=1, expert_ffn_size=1))
    messaging = {"send_overhead": 0.5, "send_bandwidth": 8.0, "receive_overhead": 0.25, "background_bandwidth": 2.0}
    types = [device_type(messaging=messaging), device_type(messaging={"background_bandwidth": 4.0}, step_overhead=3.0)]
    cluster = make_cluster(types, [link("d0", "d1", 10.0)])
    placement = make_placement([[0, 1]], [0, 1], 2)
    ids_TLK, home_T = np.array([1], np.uint8)[:, None, None], np.zeros(1, np.int32)
    ones = np.array([1, 0])
    work = HomeWork(
        decode=False, tokens_R=ones, requests_R=ones, kv_tokens_R=ones, attention_pairs_R=ones, images_R=0 * ones,
        outputs_R=ones,
    )  # fmt: skip
    form = MessageFormat(dispatch_vector_bytes=10.0, combine_vector_bytes=4.0, pair_bytes=1.0)
    kv_tokens_RR = np.array([[0, 2], [0, 0]])
    for mode, overlap_kv, copy_s in (
        ("async", True, [11.5, 5.75]), ("async", False, [7.5, 3.75]), ("sync", True, [0.0, 0.0]),
    ):  # fmt: skip
        transmission = Transmission(mode=mode, dedup="device", num_chunks=1, message_format=form, overlap_kv=overlap_kv)
        planner = StepPlanner(model, cluster, RooflineCost(model, cluster), transmission)
        plan = planner.plan((work,), TrafficCounter(placement).count(ids_TLK, home_T), kv_tokens_RR)
        assert plan.copy_s_LR.tolist() == [pytest.approx(copy_s)]
        assert plan.step_s_R is not None
        assert plan.step_s_R.tolist() == [0, 3]
        assert plan.message_costs is not None
        assert plan.message_costs.send_s_R.tolist() == [0.5, 0]
        assert plan.message_costs.sends_R.tolist() == [True, False]
        # Device 0 sends 11 bytes, and 8 with the layer; it receives a result. Device 1 pays for none.
        sends_s = [0.5 + 11 / 8 + (0.5 + 8 / 8) * overlap_kv + 0.25, 0.0]
        assert_close(plan.compute_s_PR()[PARTS.index("copy")], np.array(copy_s) + sends_s)


# Random steps.


def with_terms(plan: StepPlan, cluster: Cluster, data: st.DataObject) -> StepPlan:
    """Return the plan with connections and barriers drawn, and what messages cost on the cluster's devices."""
    barriers = data.draw(st.sampled_from(["all", "own"])) if plan.mode == "sync" else "all"
    connections = data.draw(st.sampled_from(["flow", "pair"]))
    step_s_R = np.array([device.step_overhead_s for device in cluster.devices])
    plan = replace(plan, connections=connections, barriers=barriers, step_s_R=step_s_R)
    second = None if plan.second is None else replace(plan.second, message_costs=MessageCosts.of(cluster))
    return replace(plan, message_costs=MessageCosts.of(cluster), second=second)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("mode", MODES)
def test_engines_agree_on_a_shaped_fabric(mode: Mode, dedup: Dedup, planner: str) -> None:
    seen: Counter[str] = Counter()

    @property_of(16)
    @given(data=st.data(), size=sizes(7, 3), staging=st.booleans(), seed=seeds)
    def check(data: st.DataObject, size: tuple[int, int], staging: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        cluster = fabric(rng, *size, staging, shaped=True)
        plan = PLANNERS[planner](rng, cluster, data.draw(shapes(mode, dedup, size[0], (1.0, 0.5))))
        plan = with_terms(plan, cluster, data)
        result, fast = simulate_step(plan, cluster, "event")
        again, slow = simulate_step(plan, cluster, "simpy")
        assert fast is not None
        assert slow is not None
        assert fast.run.contended == slow.run.contended
        for name in ("start_s_N", "end_s_N", "sent_s_N", "incoming_s_N", "busy_s_X", "carried_bytes_X"):
            assert_close(getattr(fast.run, name), getattr(slow.run, name), name)
        assert_close(result.parts_s_PR, again.parts_s_PR)
        assert_close(result.parts_s_PR.sum(axis=0), result.end_s)
        assert result.parts_s_PR.min() >= -1e-12
        bytes_X, held_s_X = bytes_on_links(plan, cluster)
        assert_close(result.link_bytes_X, bytes_X)
        assert_close(result.delivered_bytes_RR, bytes_between(plan))
        shorter, longer = result.link_busy_s_X < held_s_X - 1e-9, result.link_busy_s_X > held_s_X + 1e-9
        factor_X = np.array([1 + one.ack_overhead_frac for one in cluster.links])
        assert (result.link_busy_s_X <= factor_X * held_s_X + 1e-9).all()
        burst_X = np.array([one.burst_bytes for one in cluster.links])
        assert not (shorter & (burst_X == 0)).any()
        assert not (longer & (factor_X == 1)).any()
        seen["bursts"] += bool(shorter.any())
        seen["acknowledgements"] += bool(longer.any())
        assert (result.parts_s_PR[: len(COMPUTE_PARTS)] == plan.compute_s_PR()).all()
        seen["sends"] += bool(np.isin(fast.graph.work_N, (Work.SEND_OUT, Work.SEND_BACK)).any())
        if plan.overlap_kv or not plan.kv_bytes_LRR.any():  # else sends come after the step, which the parts are of
            assert_close(computing_s_R(fast), plan.compute_s_PR().sum(axis=0))
        seen[plan.connections] += 1
        seen[plan.barriers] += 1

    check()
    assert seen["sends"] >= 8, seen
    assert seen["bursts"] >= 4, seen
    assert seen["acknowledgements"] >= 4, seen
    assert min(seen["flow"], seen["pair"]) >= 2, seen
    assert mode != "sync" or min(seen["all"], seen["own"]) >= 2, seen


def computing_s_R(execution: Execution) -> NDArray[np.float64]:
    """Return how long each device's slices say that it computes."""
    seconds_R = np.zeros(execution.plan.num_devices)
    for piece in slices_of(execution, "decode", 1, 0.0):
        if piece.track == "compute":
            seconds_R[piece.device] += piece.end_s - piece.start_s
    return seconds_R


@property_of(60)
@given(data=st.data(), size=sizes(6, 2), mode=st.sampled_from(MODES), dedup=st.sampled_from(DEDUPS), seed=seeds)
def test_two_accounts_of_idle_time(
    data: st.DataObject, size: tuple[int, int], mode: Mode, dedup: Dedup, seed: int
) -> None:
    # Without sends the account of a mode says what the account by gaps says.
    rng = np.random.default_rng(seed)
    cluster = fabric(rng, *size)
    plan = PLANNERS["random"](rng, cluster, data.draw(shapes(mode, dedup, size[0], (0.3, 1.0))))
    if mode == "sync":
        plan = replace(plan, barriers=data.draw(st.sampled_from(["all", "own"])))
    _, execution = simulate_step(plan, cluster, "event")
    assert execution is not None
    times = (execution.graph, execution.run.start_s_N, execution.run.end_s_N)
    for usual, by_gaps in zip(idle_of(plan, *times), idle_by_gaps(plan, *times), strict=True):
        assert_close(usual.sum(axis=0), by_gaps.sum(axis=0))


@pytest.mark.parametrize("dedup", DEDUPS)
@pytest.mark.parametrize("mode", MODES)
def test_framed_uncontended_step_equals_closed_form(mode: Mode, dedup: Dedup) -> None:
    compared: Counter[str] = Counter()

    @property_of(60)
    @given(data=st.data(), size=sizes(6, 2), staging=st.booleans(), seed=seeds)
    def check(data: st.DataObject, size: tuple[int, int], staging: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        cluster = mesh(rng, *size, staging, framed=True)
        shape = data.draw(shapes(mode, dedup, size[0], (0.1, 0.3, 0.05, 1.0)))
        plan = PLANNERS[data.draw(st.sampled_from(sorted(PLANNERS)))](rng, cluster, shape)
        result, execution = simulate_step(plan, cluster, "event")
        assert execution is not None
        if result.contended or flows_meet(plan, cluster) or waits_for_an_earlier_layer(execution):
            return
        assert_same_result(result, simulate_step(plan, cluster, "analytic")[0])
        compared["background"] += mode != "sync" and plan.step_s_R is not None and bool(plan.copy_s_LR.any())
        framed = any(one.frame_overhead_frac and one.message_header_bytes for one in cluster.links)
        compared["framed"] += bool(framed and plan.dispatch_bytes_LCRR.any())

    check()
    assert compared["framed"] >= 6, compared
    assert mode == "sync" or compared["background"] >= 3, compared


@property_of(20)
@given(data=st.data(), size=sizes(6, 2), seed=seeds)
def test_a_rank_alone_at_a_barrier_is_no_later(data: st.DataObject, size: tuple[int, int], seed: int) -> None:
    # With a link for each pair and one flow on it, who waits for less is done no later.
    rng = np.random.default_rng(seed)
    cluster = mesh(rng, *size)
    plan = PLANNERS["random"](rng, cluster, replace(data.draw(shapes("sync", "device", size[0], (0.3, 1.0))), kv=False))
    own, _ = simulate_step(replace(plan, barriers="own"), cluster, "event")
    assert own.end_s <= simulate_step(plan, cluster, "event")[0].end_s + 1e-12
    assert_array_equal(own.link_bytes_X, simulate_step(plan, cluster, "event")[0].link_bytes_X)


@pytest.mark.parametrize(
    ("changes", "barriers", "what"),
    [
        ({"burst": 5.0}, "all", r"burst \(of the link \"d0->d1\"\)"),
        ({"ack_overhead": 0.1}, "all", r"ack_overhead \(of the link \"d0->d1\"\)"),
        ({}, "own", "transmission.barriers: own"),
    ],
)
def test_what_the_closed_form_refuses(changes: dict[str, float], barriers: Any, what: str) -> None:
    plan = make_plan("sync", barriers=barriers)
    with pytest.raises(
        ScenarioError, match=rf'^simulation\.fidelity: "analytic" has no formula for {what}; write event$'
    ):
        simulate_step(plan, two_devices(**changes), "analytic")

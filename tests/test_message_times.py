"""What devices do around messages, in plans and steps with measured costs: packing, serving arrivals, adding up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference.tiny import device_type, link, make_cluster, make_placement, tiny_model
from test_cost import work
from test_measured_cost import profile

from epsim.cluster import Cluster
from epsim.cost import Cost, HomeWork, MeasuredCost, RooflineCost
from epsim.sim import PARTS, StepPlanner, Transmission, simulate_step
from epsim.traffic import MessageFormat, TrafficCounter

COPY = PARTS.index("copy")


def measured(cluster: Cluster) -> MeasuredCost:
    """A message of n vectors takes 0.75 + 0.25 n s to pack, 1 + 0.5 n s to serve, 1.5 + 0.5 n s to add up."""
    profiles = {f"t{i}": profile() for i in range(cluster.num_devices)}
    return MeasuredCost(tiny_model(), cluster, profiles, wire="bf16, bf16")


def planner(mode: Any, dedup: Any, cluster: Cluster, cost: Cost, num_chunks: int = 1) -> StepPlanner:
    """Return a planner of the tiny model."""
    form = MessageFormat.of(tiny_model().hidden_size, "bf16", "bf16")
    transmission = Transmission(mode=mode, dedup=dedup, num_chunks=num_chunks, message_format=form, overlap_kv=True)
    return StepPlanner(tiny_model(), cluster, cost, transmission)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("dedup", "vectors"), [("none", (3, 4)), ("device", (3, 2))])
def test_what_is_done_around_messages_lengthens_a_step(mode: Any, dedup: Any, vectors: tuple[int, int]) -> None:
    """Device 0 has 3 tokens; in layer 0 one pair each goes to device 1, in layer 1 both pairs of two tokens do.

    Without dedup 3 and 4 vectors leave, with dedup 3 and 2.
    """
    cluster = make_cluster([device_type()] * 2, [link("d0", "d1", 1e9)])
    topk_TLK = np.array([[[0, 2], [2, 3]], [[1, 3], [2, 3]], [[0, 3], [0, 1]]], dtype=np.uint8)
    traffic = TrafficCounter(make_placement([[0, 1, 2, 3]] * 2, [0, 1], 4), 1).count(topk_TLK, np.zeros(3, np.int32))
    counts, nothing_RR = work(tokens_R=[3, 0], requests_R=[1, 0], outputs_R=[1, 0]), np.zeros((2, 2), np.int64)
    plan = planner(mode, dedup, cluster, measured(cluster)).plan([counts], traffic, nothing_RR)
    assert plan.pack_s_LR.tolist() == [[0.75 + 0.25 * n, 0] for n in vectors]
    assert plan.reduce_s_LR.tolist() == [[1.5 + 0.5 * n, 0] for n in vectors]
    assert plan.served_s_LCRR[:, 0].tolist() == [[[0, 1 + 0.5 * n], [0, 0]] for n in vectors]
    # Attention of a dense and a MoE layer, then of a MoE layer: 103 s each. Router 2, dense FFN 20, head 8 s.
    assert plan.front_s_LR[:, 0].tolist() == [
        206.0 + 20 + 2 + 0.75 + 0.25 * vectors[0],
        103.0 + 2 + 0.75 + 0.25 * vectors[1] + 1.5 + 0.5 * vectors[0],
    ]
    # Without shared experts device 0 waits for device 1, whose pairs are as many as its own or more: 3 and 3, 2 and 4.
    plan = replace(plan, shared_s_LR=np.zeros((2, 2)))
    without = replace(plan, pack_s_LR=np.zeros((2, 2)), reduce_s_LR=np.zeros((2, 2)), serve_s_LCRR=None)
    own_s, served_s = 4.5 + 0.75 * sum(vectors), 2 + 0.5 * sum(vectors)
    for fidelity in ("event", "simpy", "analytic"):
        result, least = (simulate_step(p, cluster, fidelity)[0] for p in (plan, without))  # type: ignore[arg-type]
        assert result.end_s == pytest.approx(least.end_s + own_s + served_s)
        assert result.parts_s_PR[COPY].tolist() == [pytest.approx(own_s), pytest.approx(served_s)]
        assert not least.parts_s_PR[COPY].any()
    roofline = RooflineCost(tiny_model(), cluster)
    plan = planner(mode, dedup, cluster, roofline).plan([counts], traffic, nothing_RR)
    assert not any(times.any() for times in (plan.pack_s_LR, plan.reduce_s_LR, plan.served_s_LCRR))


@pytest.mark.parametrize(
    ("dedup", "num_chunks", "pack_s", "reduce_s", "serve_s"),
    [
        # Two messages of two vectors: 2 * 1.25 and 2 * 2.5 s; each is served in 2 s.
        ("none", 1, 2.5, 5.0, [2.0]),
        ("device", 1, 2.5, 5.0, [2.0]),
        # Two of one vector in each chunk: 4 * 1 and 4 * 2 s; served in 1.5 s each.
        ("device", 2, 4.0, 8.0, [1.5, 1.5]),
        # One message to the gateway, and one back; both devices are served by it.
        ("node", 1, 1.25, 2.5, [2.0]),
        ("node", 2, 2.0, 4.0, [1.5, 1.5]),
    ],
)
def test_each_message_is_counted_for_itself(
    dedup: Any, num_chunks: int, pack_s: float, reduce_s: float, serve_s: list[float]
) -> None:
    """Nodes 0 1 | 2 3, an expert each; device 0 has two tokens, both for experts 2 and 3."""
    names = ["d0", "d1", "d2", "d3"]
    links = [link(source, target, 1e9) for i, source in enumerate(names) for target in names[:i]]
    cluster = make_cluster([device_type()] * 4, links, nodes=[0, 0, 1, 1])
    placement = make_placement([[0, 1, 2, 3]] * 2, [0, 0, 1, 1], 4)
    topk_TLK = np.tile(np.array([2, 3], dtype=np.uint8), (2, 2, 1))
    traffic = TrafficCounter(placement, num_chunks).count(topk_TLK, np.zeros(2, np.int32))
    nothing_R = np.zeros(4, np.int64)
    fields: dict[str, Any] = {name: nothing_R for name in HomeWork.__dataclass_fields__ if name != "decode"}
    counts = HomeWork(decode=False, **{**fields, "tokens_R": np.array([2, 0, 0, 0])})
    plan = planner("async", dedup, cluster, measured(cluster), num_chunks).plan(
        [counts], traffic, np.zeros((4, 4), np.int64)
    )
    assert plan.pack_s_LR.tolist() == [[pack_s, 0, 0, 0]] * 2
    assert plan.reduce_s_LR.tolist() == [[reduce_s, 0, 0, 0]] * 2
    assert plan.served_s_LCRR[:, :, 0].tolist() == [[[0, 0, s, s] for s in serve_s]] * 2
    assert not plan.served_s_LCRR[:, :, 1:].any()

"""`AnalyticClock`: the closed form's time of one MoE layer of a scenario, for any placement of the layer's experts.

It stands on some steps of a batch of the trace: the prefill, and decode steps evenly spaced, each of which stands for
the decode steps around it. Letters: S steps, T tokens of one, L MoE layers (of a `StepPlan` here: S), C chunks,
R devices, E experts, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from epsim.batch import BatchRun, Deployment
from epsim.cluster import Cluster
from epsim.cost import HomeWork
from epsim.errors import TraceError
from epsim.fitting import expected_homes
from epsim.layout import Layout
from epsim.model import ModelCard
from epsim.placement import Placement
from epsim.scenario.spec import ScenarioSpec
from epsim.sim import StepPlan, StepPlanner, check_closed_form, network_of, simulate_layers
from epsim.sim.layer_traffic import LayerTraffic, traffic_at_home
from epsim.trace import TraceSource
from epsim.traffic import Counts, StepTraffic, TrafficCounter

Floats = npt.NDArray[np.float64]
NUM_DECODE_STEPS = 16
_HOME_FIELDS = (
    "attention_s_LR",
    "dense_ffn_s_LR",
    "router_s_LR",
    "home_experts_s_LR",
    "shared_s_LR",
    "host_s_LR",
    "copy_s_LR",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClockStep:
    """One step that a clock stands on, and how many steps of a batch it stands for.

    topk_expert_ids_TLK, home_T, chunk_T: its tokens, sorted by home.
    works, kv_tokens_RR: as `StepPlanner.plan` takes them.
    """

    weight: float
    topk_expert_ids_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    home_T: npt.NDArray[np.int32]
    chunk_T: Counts
    works: tuple[HomeWork, ...]
    kv_tokens_RR: Counts


class AnalyticClock:
    """Predicts what a layer adds to the time from a batch's arrival to its last token (a `LayerClock`).

    That is the sum over steps of their weight times the end of the layer as a step by itself, all devices starting
    together. The vision encoder and leading dense layers belong to the first layer, the head and the end of the step to
    the last. With one MoE layer, or in mode sync where no device's host is the limit and adding up results takes no
    time, the layers of a step add up to its `simulate_analytic`; else ranks drift between layers, which the clock does
    not see. Neither does it see what decode waits for KV caches.
    """

    def __init__(
        self, planner: StepPlanner, cluster: Cluster, steps: Sequence[ClockStep], num_experts: int, *, growing: bool
    ) -> None:
        """growing: the routed experts of a kernel take longer, or as long, with more pairs and with more experts."""
        self._planner, self._steps, self._num_experts, self._growing = planner, steps, num_experts, growing
        self._num_devices, self._num_chunks = cluster.num_devices, planner.transmission.num_chunks
        self._cluster, self._num_layers = cluster, steps[0].topk_expert_ids_TLK.shape[1]
        self._weight_S = np.array([step.weight for step in steps])
        self._traffic: dict[int, LayerTraffic] = {}
        self._plan_homes()

    def seconds(self, layer: int, device_of_expert_E: npt.NDArray[np.integer]) -> float:
        """Return what the layer adds to the time of a batch when its experts are on these devices, in s."""
        device_E = np.asarray(device_of_expert_E)
        in_range = device_E.min(initial=0) >= 0 and device_E.max(initial=0) < self._num_devices
        if device_E.shape != (self._num_experts,) or not in_range:
            raise ValueError("device_of_expert_E must have the device of each expert")
        traffic = self._tokens(layer).count(device_E.astype(np.int32))
        pairs_LCR = traffic.pairs_LCRR.sum(axis=2)
        has_pairs = [pairs_LCR.any(axis=1)] if len(self._has_tokens) == 1 else list(pairs_LCR.swapaxes(0, 1) > 0)
        return float(self._weight_S @ self._ends_s_S(layer, self._plan(layer, traffic, has_pairs)))

    def bound_seconds(self, layer: int) -> float:
        """Return a time in s that no placement of the layer's experts without replicas can beat.

        It is the plan with no message and with the routed experts of one device d alone, at the least that the device
        with the most of them can have; the best d counts. The recursions of all modes are sums and maxima, so nothing
        that is left out could make a step end earlier: messages arrive after they leave, and making, serving and adding
        them up takes 0 or more, as do the experts of the other devices.

        Of the least: if a step activates A experts, with n = ceil(A / R) some device has n or more of them, and with
        these at least the pairs of the n that have the fewest. Also, of P pairs some device has p = ceil(P / R) or
        more, and at least as many experts as it takes of those with the most pairs to have p. Where time grows with
        pairs and with experts (`growing`), that device takes no less than a kernel of these sizes; in modes async and
        two_batch its kernels take no less than one would for all: each pays launch and weights again, and smaller ones
        are no more efficient. Both are valid, so the larger counts. Where time need not grow (measured profiles),
        experts count as 0.
        """
        load_SE = self._tokens(layer).load_SE
        least = [self._fewest_experts(load_SE), self._fewest_pairs(load_SE)] if self._growing else []
        no_pairs_SR = np.zeros((len(self._steps), self._num_devices), dtype=np.int64)
        nowhere = [no_pairs_SR > 0] * len(self._has_tokens)  # the floor of the host counts where there are home tokens
        ends_s_S = self._ends_s_S(layer, self._plan(layer, self._at_home(no_pairs_SR, no_pairs_SR), nowhere))
        for pairs_S, activated_S in least:
            pairs_SR, activated_SR = (np.repeat(x[:, None], self._num_devices, axis=1) for x in (pairs_S, activated_S))
            plan = self._plan(layer, self._at_home(pairs_SR, activated_SR), nowhere)
            of_device = [self._ends_s_S(layer, _only_on(plan, device)) for device in range(self._num_devices)]
            ends_s_S = np.maximum(ends_s_S, np.min(of_device, axis=0))
        return float(self._weight_S @ ends_s_S)

    def _fewest_experts(self, load_SE: Counts) -> tuple[Counts, Counts]:
        """Return pairs and experts [S] of the device with the most experts, at the least."""
        num_S = -(-(load_SE > 0).sum(axis=1) // self._num_devices)
        ascending_SE = np.sort(np.where(load_SE > 0, load_SE, np.iinfo(np.int64).max), axis=1)
        pairs = [row_E[:num].sum() for row_E, num in zip(ascending_SE, num_S, strict=True)]
        return np.array(pairs, dtype=np.int64), num_S

    def _fewest_pairs(self, load_SE: Counts) -> tuple[Counts, Counts]:
        """Return pairs and experts [S] of the device with the most pairs, at the least."""
        pairs_S = -(-load_SE.sum(axis=1) // self._num_devices)
        most_SE = np.cumsum(-np.sort(-load_SE, axis=1), axis=1)
        return pairs_S, 1 + (most_SE < pairs_S[:, None]).sum(axis=1) - (pairs_S == 0)

    def _plan(self, layer: int, traffic: StepTraffic, has_pairs: Sequence[npt.NDArray[np.bool_]]) -> StepPlan:
        """Return the plan of the layer in all steps; has_pairs: of each micro-batch, who serves any, [S, R]."""
        homes = [
            {**fields, "host_s_LR": fields["host_s_LR"] * (has_tokens_SR | has_pairs_SR)}
            for fields, has_tokens_SR, has_pairs_SR in zip(
                self._homes[layer == 0], self._has_tokens, has_pairs, strict=True
            )
        ]
        return self._planner.plan_layers(homes, traffic)

    def _ends_s_S(self, layer: int, plan: StepPlan) -> Floats:
        """Return when the layer ends in each step."""
        is_last = layer == self._num_layers - 1
        return simulate_layers(plan, self._tail_s_SR if is_last else np.zeros_like(self._tail_s_SR), self._network)

    def _plan_homes(self) -> None:
        """Plan once what homes compute, in a first layer and in any other: by `first`, micro-batch and field."""
        two_layers = self._at_home(*np.ones((2, 2, self._num_devices), dtype=np.int64))  # all devices take part
        plans = [self._planner.plan(step.works, two_layers, step.kv_tokens_RR) for step in self._steps]
        self._network = network_of(plans[0], self._cluster)
        self._tail_s_SR = np.stack([plan.tail_s_R for plan in plans])
        self._homes: dict[bool, list[dict[str, Floats]]] = {}
        batches, none_R = range(len(plans[0].batches)), np.zeros(self._num_devices)
        for first in (True, False):
            self._homes[first] = [
                {name: np.stack([getattr(plan.batches[b], name)[1 - first] for plan in plans]) for name in _HOME_FIELDS}
                | {"vision_s_R": none_R, "head_s_R": none_R}
                for b in batches
            ]
        for b in batches:  # the encoder runs before the first layer
            self._homes[True][b]["attention_s_LR"] += np.stack([plan.batches[b].vision_s_R for plan in plans])
        self._has_tokens = [np.stack([step.works[b].tokens_R > 0 for step in self._steps]) for b in batches]

    def _at_home(self, pairs_SR: Counts, activated_SR: Counts) -> StepTraffic:
        return traffic_at_home(pairs_SR, activated_SR, self._num_chunks, self._cluster.num_nodes)

    def _tokens(self, layer: int) -> LayerTraffic:
        if layer not in self._traffic:
            self._traffic[layer] = LayerTraffic(
                [step.topk_expert_ids_TLK[:, layer] for step in self._steps],
                [step.home_T for step in self._steps],
                [step.chunk_T for step in self._steps],
                num_experts=self._num_experts,
                num_chunks=self._num_chunks,
                node_of_device_R=self._cluster.node_of_device_R.astype(np.int32),
            )
        return self._traffic[layer]


def _only_on(plan: StepPlan, device: int) -> StepPlan:
    """Return the plan in which only this device has routed experts to compute."""
    only_R = np.arange(plan.num_devices) == device
    return replace(plan, experts_s_LR=plan.experts_s_LR * only_R, local_s_LR=plan.local_s_LR * only_R)


def layer_clock(
    spec: ScenarioSpec,
    model: ModelCard,
    cluster: Cluster,
    trace: TraceSource,
    planner: StepPlanner,
    *,
    batch_size: int | None = None,
    num_decode_steps: int = NUM_DECODE_STEPS,
) -> AnalyticClock:
    """Return the clock of a scenario under expert parallelism, on the first batch of `trace`.

    batch_size: default the middle of the workload's; of a shorter trace all requests. num_decode_steps: at most, evenly
    spaced. Homes are those that are expected: where they follow from the placement (by_modality), those of a placement
    with the vision experts on the first devices. Raises ScenarioError where the closed form does not know the cluster.
    """
    check_closed_form(cluster, planner.transmission.barriers, ('placement.policy: "predicted_time"', "another policy"))
    sizes = spec.workload.batch_sizes
    ids = trace.requests.request_id_Q[: batch_size or sizes[len(sizes) // 2]]
    if not len(ids):
        raise TraceError(f"trace: {trace.name} has no requests; a placement by predicted time needs some")
    placement, num_devices = _some_placement(trace, cluster), cluster.num_devices
    num_chunks = planner.transmission.num_chunks
    counter = TrafficCounter(placement, num_chunks)
    layout = Layout(description="ep", card=model, placement=placement, homes=expected_homes(spec, num_devices))
    deployment = Deployment(
        model=model,
        cluster=cluster,
        trace=trace,
        check_rows=True,
        layout=layout,
        counter=counter,
        num_micro_batches=2 if planner.transmission.mode == "two_batch" else 1,
        planner=planner,
        fidelity="analytic",
    )
    run = BatchRun(deployment, ids, spec.workload.max_output_tokens)
    steps = [_step(run, counter, step, weight) for step, weight in spaced_steps(run.num_steps - 1, num_decode_steps)]
    growing = not any(device_type.profile for device_type in spec.cluster.device_types.values())
    return AnalyticClock(planner, cluster, steps, trace.meta.num_experts, growing=growing)


def spaced_steps(num_decode: int, at_most: int) -> list[tuple[int, int]]:
    """Return (step, weight): the prefill, and decode steps in the middle of equal stretches of 1..num_decode."""
    count = min(num_decode, at_most)
    bounds = [part * num_decode // count for part in range(count + 1)] if count else []
    return [(0, 1)] + [((first + 1 + last) // 2, last - first) for first, last in pairwise(bounds)]


def _step(run: BatchRun, counter: TrafficCounter, step: int, weight: int) -> ClockStep:
    tokens, given = run.tokens(step), run.input(step)
    return ClockStep(
        weight=weight,
        topk_expert_ids_TLK=tokens.topk_expert_ids_TLK,
        home_T=tokens.home_T,
        chunk_T=counter.chunk_of_token_T(tokens.home_T),
        works=given.works,
        kv_tokens_RR=given.kv_tokens_RR,
    )


def _some_placement(trace: TraceSource, cluster: Cluster) -> Placement:
    """Return a placement of whatever kind: what is asked of the steps does not depend on it."""
    num_experts, num_devices = trace.meta.num_experts, cluster.num_devices
    slots_P = np.full(-(-num_experts // num_devices) * num_devices, -1, dtype=np.int32)
    slots_P[:num_experts] = np.arange(num_experts)
    return Placement(
        policy="any",
        num_experts=num_experts,
        physical_to_logical_LP=np.tile(slots_P, (trace.meta.num_layers, 1)),
        node_of_device_R=cluster.node_of_device_R.astype(np.int32),
    )

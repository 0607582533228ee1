"""The composition root: a `ScenarioSpec` becomes domain objects (`assemble`), and these an `Outcome` (`simulate`)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim import __version__
from epsim.batch import Deployment, StepInput, run_steps, step_inputs
from epsim.cluster import Cluster, build_cluster
from epsim.cost import Cost, MemoryAccount, RooflineCost
from epsim.cost.measured import measured_cost
from epsim.cost.profile import wire_name
from epsim.fitting import make_policy, placement_problem
from epsim.layer_clock import AnalyticClock, layer_clock
from epsim.layout import Layout
from epsim.metrics import RequestRecord, StepRecord, TransferCounts, summarise_batch_size
from epsim.model import ModelCard
from epsim.parallelism import check_parallelism, group_size, lay_out
from epsim.placement import PlacementProblem
from epsim.scenario.spec import FileTraceSpec, ScenarioSpec, TransmissionSpec, WorkloadSpec
from epsim.sim import ReplicaPlanner, StepPlanner, Transmission, check_closed_form
from epsim.sim.slices import Slice, slices_of
from epsim.trace import TraceSource
from epsim.traces import checked_trace, num_requests_needed, trace_and_load
from epsim.traffic import MessageFormat, TrafficCounter

Advance = Callable[[], None]


@dataclass(kw_only=True)
class Outcome:
    """What a scenario gave. results: plain values for JSON. steps: by batch size. slices: of the timeline's steps."""

    results: dict[str, Any]
    steps: dict[int, list[StepRecord]] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    device_names: tuple[str, ...] = ()


def simulate(spec: ScenarioSpec, advance: Advance = lambda: None, *, with_timeline: bool = False) -> Outcome:
    """Run every batch size of a scenario.

    advance: is called after each simulated step (see `count_steps`). with_timeline: keep the slices of the first
    batch's first steps.
    """
    return replay(assemble(spec), spec, advance, with_timeline=with_timeline)


def replay(
    deployment: Deployment, spec: ScenarioSpec, advance: Advance = lambda: None, *, with_timeline: bool = False
) -> Outcome:
    """Run every batch size of a scenario on a deployment of it; the trace may be another than the scenario's."""
    accounts = _accounts(deployment, spec)
    outcome = Outcome(
        results=_header(spec, deployment), device_names=accounts[spec.workload.batch_sizes[0]].device_names
    )
    for batch_size, account in accounts.items():
        shown = with_timeline and batch_size == spec.workload.batch_sizes[0]
        num_executions = 1 + spec.simulation.timeline_decode_steps if shown else 0
        summary = _run_batch_size(deployment, spec, batch_size, outcome, num_executions, advance)
        summary["memory_bytes"] = account.as_dict()
        outcome.results["batch_sizes"].append(summary)
    return outcome


def check(spec: ScenarioSpec) -> tuple[Deployment, dict[int, MemoryAccount]]:
    """Return what `simulate` runs, and the memory account of every batch size; raise all that it would refuse."""
    deployment = assemble(spec)
    return deployment, _accounts(deployment, spec)


def _accounts(deployment: Deployment, spec: ScenarioSpec) -> dict[int, MemoryAccount]:
    return {size: check_memory(deployment, spec, size) for size in spec.workload.batch_sizes}


def assemble(spec: ScenarioSpec) -> Deployment:
    """Build model, cluster, trace, and layout of a scenario, and check that they fit together."""
    model, cluster = model_and_cluster(spec)
    trace, load_MLE = checked_trace(spec.trace, model, spec.workload)
    return deploy(spec, model, cluster, trace, fit_layout(spec, model, cluster, trace, load_MLE))


def fit_layout(
    spec: ScenarioSpec, model: ModelCard, cluster: Cluster, trace: TraceSource, load_MLE: npt.NDArray[np.int64]
) -> Layout:
    """Return the layout that a scenario's policy makes of a trace and its loads."""
    problem = build_problem(spec, model, cluster, trace, load_MLE)
    return lay_out(spec, model, make_policy(spec.placement), problem)


def build_problem(
    spec: ScenarioSpec, model: ModelCard, cluster: Cluster, trace: TraceSource, load_MLE: npt.NDArray[np.int64]
) -> PlacementProblem:
    """Return what the policy of a scenario is fitted to: a trace, its loads, and the simulator's time of a layer."""
    return placement_problem(spec, cluster, trace, load_MLE, lambda: build_clock(spec, model, cluster, trace))


def deploy(spec: ScenarioSpec, model: ModelCard, cluster: Cluster, trace: TraceSource, layout: Layout) -> Deployment:
    """Return a layout ready to serve the requests of a trace as the scenario says."""
    transmission = build_transmission(spec, model)
    return Deployment(
        model=model,
        cluster=cluster,
        trace=trace,
        check_rows=isinstance(spec.trace, FileTraceSpec),
        layout=layout,
        counter=TrafficCounter(layout.placement, transmission.num_chunks),
        num_micro_batches=2 if transmission.mode == "two_batch" else 1,
        planner=build_planner(spec, model, cluster),
        fidelity=spec.simulation.fidelity,
    )


def model_and_cluster(spec: ScenarioSpec) -> tuple[ModelCard, Cluster]:
    """Build both, and check that the kind of parallelism goes with them and with the rest of the scenario."""
    model = ModelCard.from_mapping(spec.model.model_dump())
    cluster = build_cluster(spec.cluster.model_dump())
    check_parallelism(spec, model, cluster.num_devices)
    return model, cluster


def build_planner(spec: ScenarioSpec, model: ModelCard, cluster: Cluster) -> StepPlanner | ReplicaPlanner:
    """Return what turns the steps of a scenario into plans: the only part that knows how fast devices are."""
    transmission = build_transmission(spec, model)
    if spec.simulation.fidelity == "analytic":
        check_closed_form(cluster, transmission.barriers)
    size = group_size(spec.parallelism, cluster.num_devices)
    if size is None:
        return StepPlanner(model, cluster, build_cost(spec, model, cluster), transmission)
    card = model.shard(size)
    vector_bytes = transmission.message_format.combine_vector_bytes
    cost = build_cost(spec, card, cluster)
    return ReplicaPlanner(card, cluster, cost, group_size=size, vector_bytes=vector_bytes)


def build_clock(spec: ScenarioSpec, model: ModelCard, cluster: Cluster, trace: TraceSource) -> AnalyticClock:
    """Return the simulator's time of a layer of a scenario under expert parallelism, for policies that search by it."""
    cost, transmission = build_cost(spec, model, cluster), build_transmission(spec, model)
    return layer_clock(spec, model, cluster, trace, StepPlanner(model, cluster, cost, transmission))


def build_cost(spec: ScenarioSpec, card: ModelCard, cluster: Cluster) -> Cost:
    """Return the times of a device's part of the model: from measured profiles if the device types name them."""
    paths = {name: device_type.profile for name, device_type in spec.cluster.device_types.items()}
    if not any(paths.values()):
        return RooflineCost(card, cluster)
    wire = wire_name(spec.transmission.dispatch_dtype, spec.transmission.combine_dtype)
    return measured_cost(card, cluster, paths, wire=wire)


def build_transmission(spec: ScenarioSpec, model: ModelCard) -> Transmission:
    """Return mode, dedup, chunks and message sizes (sync sends one message per pair of ranks)."""
    t: TransmissionSpec = spec.transmission
    return Transmission(
        mode=t.mode,
        dedup=t.dedup,
        num_chunks={"sync": 1, "async": t.num_chunks, "two_batch": 2}[t.mode],
        overlap_shared=t.overlap_shared,
        connections=t.connections,
        barriers=t.barriers if t.mode == "sync" else "all",
        overlap_kv=spec.homes.kv_transfer == "overlapped",
        message_format=MessageFormat.of(model.hidden_size, t.dispatch_dtype, t.combine_dtype),
    )


def check_memory(deployment: Deployment, spec: ScenarioSpec, batch_size: int) -> MemoryAccount:
    """Return the memory account of the fullest batch of a size; CapacityError when it does not fit."""
    d = deployment
    fullest: MemoryAccount | None = None
    for batch in range(spec.workload.num_batches):
        prompt_Q, decode_Q = _lengths(d.trace, spec.workload, batch_size, batch)
        homes = d.layout.homes.assign(batch_size)
        kv_tokens_R = np.zeros(d.cluster.num_devices, dtype=np.int64)
        moves_Q = (homes.prefill_Q != homes.decode_Q) & (decode_Q > 0)  # a prompt without a decode step stays
        np.add.at(kv_tokens_R, homes.prefill_Q, np.where(moves_Q, prompt_Q, prompt_Q + decode_Q))
        np.add.at(kv_tokens_R, homes.decode_Q[moves_Q], (prompt_Q + decode_Q)[moves_Q])
        tokens_R = np.zeros(d.cluster.num_devices, dtype=np.int64)
        np.add.at(tokens_R, homes.prefill_Q, prompt_Q)
        account = d.layout.account(d.cluster, kv_tokens_R, tokens_R, dedup=spec.transmission.dedup != "none")
        account.check(batch_size)
        if fullest is None or account.headroom_bytes < fullest.headroom_bytes:
            fullest = account
    assert fullest is not None
    return fullest


def count_steps(spec: ScenarioSpec) -> int:
    """Return how many steps `simulate` will run, for a progress bar."""
    model = ModelCard.from_mapping(spec.model.model_dump())
    trace, _ = trace_and_load(spec.trace, model, num_requests_needed(spec.workload))
    return sum(
        1 + int(_lengths(trace, spec.workload, size, batch)[1].max(initial=0))
        for size in spec.workload.batch_sizes
        for batch in range(spec.workload.num_batches)
    )


def _lengths(
    trace: TraceSource, workload: WorkloadSpec, batch_size: int, batch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the prompt tokens and the decode tokens that are run, int64 [Q], of the requests of a batch."""
    rows = slice(batch * batch_size, (batch + 1) * batch_size)
    prompt_Q = trace.requests.num_prefill_tokens_Q[rows].astype(np.int64)
    decode_Q = trace.requests.num_decode_tokens_Q[rows].astype(np.int64)
    if workload.max_output_tokens is not None:
        decode_Q = np.minimum(decode_Q, workload.max_output_tokens - 1)
    return prompt_Q, decode_Q


def _header(spec: ScenarioSpec, deployment: Deployment) -> dict[str, Any]:
    meta, layout, devices = deployment.trace.meta, deployment.layout, deployment.cluster.devices
    return {
        "epsim_version": __version__,
        "scenario": spec.model_dump(mode="json", by_alias=True),
        "trace": {
            "kind": meta.kind,
            "origin": meta.origin,
            "mock": meta.mock,
            "description": meta.words,
            "seed": meta.seed,
            "num_requests": len(deployment.trace.requests.request_id_Q),
            "num_tokens": deployment.trace.num_tokens,
        },
        "homes": {
            "prefill": [devices[r].name for r in layout.devices_of(layout.homes.prefill_devices)],
            "decode": [devices[r].name for r in layout.devices_of(layout.homes.decode_devices)],
        },
        "parallelism": layout.description,
        "batch_sizes": [],
    }


def _counted(inputs: Iterable[StepInput], transfers: TransferCounts) -> Iterator[StepInput]:
    """Pass the steps on, and add what they route to `transfers`."""
    for given in inputs:
        transfers.add(given.phase, given.counts_M4)
        yield given


def _run_batch_size(
    deployment: Deployment, spec: ScenarioSpec, batch_size: int, outcome: Outcome, num_executions: int, advance: Advance
) -> dict[str, Any]:
    requests: list[RequestRecord] = []
    steps: list[StepRecord] = []
    transfers, now_s = TransferCounts(), 0.0
    request_ids = deployment.trace.requests.request_id_Q
    for batch in range(spec.workload.num_batches):
        ids = request_ids[batch * batch_size : (batch + 1) * batch_size]
        records = run_steps(
            _counted(step_inputs(deployment, ids, spec.workload.max_output_tokens), transfers),
            planner=deployment.planner,
            cluster=deployment.cluster,
            fidelity=deployment.fidelity,
            request_ids=ids,
            batch=batch,
            start_s=now_s,
            num_executions=num_executions if batch == 0 else 0,
            advance=advance,
        )
        for record, execution in zip(records.steps, records.executions, strict=False):
            outcome.slices += slices_of(execution, record.phase, record.step, record.start_s)
        requests += records.requests
        steps += records.steps
        now_s = records.end_s
    outcome.steps[batch_size] = steps
    links = deployment.cluster.links
    slo = spec.workload.slo
    return summarise_batch_size(
        batch_size=batch_size,
        requests=requests,
        steps=steps,
        transfers=transfers,
        link_names=[link.name for link in links],
        staging_links={link.name for link in links if link.is_staging},
        duration_s=now_s,
        ttft_limit_s=slo.ttft,
        tpot_limit_s=slo.tpot,
    )

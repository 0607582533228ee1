"""One static batch from its trace rows to its records: `Deployment`, `BatchRun`, `step_inputs`, `run_steps`, ..

A batch is prefilled in one step; the first output token of every request is there at its end. Each decode step then
takes one token of every request that still has some. A step starts when the one before it has ended on all devices
(and, after prefill, when the KV caches that move have arrived). Letters: T tokens, Q requests, L MoE layers, R devices.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epsim.cluster import Cluster
from epsim.cost import HomeWork
from epsim.errors import TraceError
from epsim.layout import Layout
from epsim.metrics import Phase, RequestRecord, StepRecord
from epsim.model import ModelCard
from epsim.sim import PARTS, Execution, Fidelity, ReplicaPlanner, StepPlan, StepPlanner, StepResult, simulate_step
from epsim.trace import Modality, RoutingTrace, TraceSource, check_trace
from epsim.traffic import StepTraffic, TrafficCounter, count_remote


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model laid out on a cluster, ready to run batches of a trace.

    check_rows: the trace comes from outside, so the rows of each batch are held to the invariants of traces.
    num_micro_batches: into how many parts of its tokens each home cuts a step (each a chunk of the counter), or 1.
    """

    model: ModelCard
    cluster: Cluster
    trace: TraceSource
    check_rows: bool
    layout: Layout
    counter: TrafficCounter
    num_micro_batches: int
    planner: StepPlanner | ReplicaPlanner
    fidelity: Fidelity


@dataclass(frozen=True, kw_only=True)
class BatchRecords:
    """What a batch left: requests, steps, the executions to be kept, and when its last token was there."""

    requests: list[RequestRecord]
    steps: list[StepRecord]
    executions: list[Execution]
    end_s: float


@dataclass(frozen=True, kw_only=True)
class StepInput:
    """What a step is before any device or link has a speed: it follows from routing, placement and homes alone.

    request_Q: indices of the requests in the batch that get a token. counts_M4: routed pairs and visits, all and remote
    (`epsim.traffic.count_remote`); none for a dense model. serving_R: which devices can serve pairs of this phase; of a
    dense model none. works: one per micro-batch. kv_tokens_RR: tokens whose KV cache moves afterwards.
    """

    step: int
    num_tokens: int
    request_Q: npt.NDArray[np.int64]
    counts_M4: npt.NDArray[np.int64]
    serving_R: npt.NDArray[np.bool_]
    works: tuple[HomeWork, ...]
    traffic: StepTraffic
    kv_tokens_RR: npt.NDArray[np.int64]

    @property
    def phase(self) -> Phase:
        return "prefill" if self.step == 0 else "decode"


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """The tokens of one step, sorted by home; request_T: index of each token's request in the batch."""

    step: int
    home_T: npt.NDArray[np.int32]
    request_T: npt.NDArray[np.int64]
    position_T: npt.NDArray[np.int32]
    topk_expert_ids_TLK: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    modality_T: npt.NDArray[np.uint8]


def step_inputs(
    deployment: Deployment, request_ids: npt.NDArray[np.integer], max_output_tokens: int | None
) -> Iterator[StepInput]:
    """Yield the steps of one batch of requests: its prefill, then one decode step per further output token."""
    run = BatchRun(deployment, request_ids, max_output_tokens)
    for step in range(run.num_steps):
        yield run.input(step)


def step_plans(
    deployment: Deployment, request_ids: npt.NDArray[np.integer], max_output_tokens: int | None
) -> Iterator[StepPlan]:
    """Yield the plans of the same steps."""
    for given in step_inputs(deployment, request_ids, max_output_tokens):
        yield deployment.planner.plan(given.works, given.traffic, given.kv_tokens_RR)


def step_tokens(
    deployment: Deployment, request_ids: npt.NDArray[np.integer], max_output_tokens: int | None
) -> Iterator[StepTokens]:
    """Yield the tokens of the same steps, for whoever runs them for real."""
    run = BatchRun(deployment, request_ids, max_output_tokens)
    for step in range(run.num_steps):
        yield run.tokens(step)


def run_steps(
    inputs: Iterable[StepInput],
    *,
    planner: StepPlanner | ReplicaPlanner,
    cluster: Cluster,
    fidelity: Fidelity,
    request_ids: npt.NDArray[np.integer],
    batch: int = 0,
    start_s: float = 0.0,
    num_executions: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> BatchRecords:
    """Simulate the steps of a batch whose requests all arrive at start_s, one after the other.

    num_executions: of how many steps, from the first, to keep the execution (the closed form has none). advance: is
    called after every step.
    """
    token_times: list[list[float]] = [[] for _ in request_ids]
    executions: list[Execution] = []
    now_s, steps = start_s, []
    for given in inputs:
        plan = planner.plan(given.works, given.traffic, given.kv_tokens_RR)
        result, execution = simulate_step(plan, cluster, fidelity)
        if execution is not None and given.step < num_executions:
            executions.append(execution)
        pairs_LR = planner.served_pairs_LR(given.traffic) * given.serving_R  # a dense model's go to a stand-in
        steps.append(_record(batch, given, now_s, result, pairs_LR))
        for q in given.request_Q:
            token_times[q].append(now_s + steps[-1].duration_s)
        now_s += steps[-1].duration_s + steps[-1].kv_exposed_s
        advance()
    requests = [
        RequestRecord(request_id=int(request_id), arrival_s=start_s, token_times_s=tuple(times))
        for request_id, times in zip(request_ids, token_times, strict=True)
    ]
    return BatchRecords(
        requests=requests, steps=steps, executions=executions, end_s=steps[-1].start_s + steps[-1].duration_s
    )


class BatchRun:
    """A batch's rows of the trace and its steps; `deployment` may become another with the same homes between two."""

    def __init__(
        self, deployment: Deployment, request_ids: npt.NDArray[np.integer], max_output_tokens: int | None
    ) -> None:
        self.deployment = deployment
        self._homes = deployment.layout.homes.assign(len(request_ids))
        self._rows = rows = deployment.trace.select(request_ids)
        if deployment.check_rows:
            _check_rows(rows, deployment.trace.name)
        # Rows come request by request in the order given: a change of id starts the next request of the batch.
        self._request_T = np.concatenate(([0], np.cumsum(np.diff(rows.request_id_T) != 0)))
        self._prompt_Q = np.bincount(self._request_T[rows.step_T == 0], minlength=len(request_ids))
        self.num_steps = int(rows.step_T.max()) + 1
        if max_output_tokens is not None:
            self.num_steps = min(self.num_steps, max_output_tokens)
        self._by_step_T = np.argsort(rows.step_T, kind="stable")
        self._bounds = np.searchsorted(rows.step_T[self._by_step_T], np.arange(self.num_steps + 1))

    def tokens(self, step: int) -> StepTokens:
        rows_T = self._by_step_T[self._bounds[step] : self._bounds[step + 1]]
        home_Q = self._homes.prefill_Q if step == 0 else self._homes.decode_Q
        rows_T = rows_T[np.argsort(home_Q[self._request_T[rows_T]], kind="stable")]
        request_T = self._request_T[rows_T]
        return StepTokens(
            step=step,
            home_T=home_Q[request_T],
            request_T=request_T,
            position_T=self._rows.position_T[rows_T],
            topk_expert_ids_TLK=self._rows.topk_expert_ids_TLK[rows_T],
            modality_T=self._rows.modality_T[rows_T],
        )

    def input(self, step: int) -> StepInput:
        """Return what is known of a step before it runs."""
        deployment, tokens = self.deployment, self.tokens(step)
        return StepInput(
            step=step,
            num_tokens=len(tokens.home_T),
            request_Q=np.unique(tokens.request_T),
            counts_M4=self._counts(tokens),
            serving_R=self._serving(step),
            works=self._works(tokens),
            traffic=deployment.counter.count(tokens.topk_expert_ids_TLK, tokens.home_T),
            kv_tokens_RR=self._moving_kv_tokens(step),
        )

    def _counts(self, tokens: StepTokens) -> npt.NDArray[np.int64]:
        """Return `StepInput.counts_M4`."""
        if self.deployment.model.moe is None:
            return np.zeros((2, 4), dtype=np.int64)
        device_of_expert_RLE = self.deployment.layout.placement.device_of_expert_RLE
        counts_M4: npt.NDArray[np.int64] = count_remote(
            tokens.topk_expert_ids_TLK, tokens.home_T, tokens.modality_T, device_of_expert_RLE
        )
        return counts_M4

    def _serving(self, step: int) -> npt.NDArray[np.bool_]:
        """Return `StepInput.serving_R`."""
        d = self.deployment
        if d.model.moe is None:
            return np.zeros(d.cluster.num_devices, dtype=np.bool_)
        return d.layout.serving_R(d.layout.homes.prefill_devices if step == 0 else d.layout.homes.decode_devices)

    def _works(self, tokens: StepTokens) -> tuple[HomeWork, ...]:
        """Return the work of each micro-batch. Images and outputs count for the first: they are computed together."""
        d, num_devices = self.deployment, self.deployment.cluster.num_devices
        batch_T = d.counter.chunk_of_token_T(tokens.home_T) if d.num_micro_batches > 1 else np.zeros_like(tokens.home_T)
        home_Q = np.zeros(len(self._prompt_Q), dtype=np.int32)
        home_Q[tokens.request_T] = tokens.home_T
        images_Q, has_output_Q = self._images(tokens), np.bincount(tokens.request_T, minlength=len(home_Q)) > 0

        def per_device(
            home: npt.NDArray[np.int32], values: npt.NDArray[np.integer | np.bool_]
        ) -> npt.NDArray[np.int64]:
            return np.bincount(home, weights=values, minlength=num_devices).astype(np.int64)

        works = []
        for batch in range(d.num_micro_batches):
            own_T = batch_T == batch
            home_T, context_T = tokens.home_T[own_T], tokens.position_T[own_T].astype(np.int64) + 1
            context_Q = np.zeros(len(home_Q), dtype=np.int64)
            np.maximum.at(context_Q, tokens.request_T[own_T], context_T)
            first = int(batch == 0)
            works.append(
                HomeWork(
                    decode=tokens.step > 0,
                    tokens_R=per_device(home_T, np.ones_like(home_T)),
                    requests_R=per_device(home_Q, context_Q > 0),
                    kv_tokens_R=per_device(home_Q, context_Q),
                    attention_pairs_R=per_device(home_T, context_T),
                    images_R=per_device(home_Q, first * images_Q),
                    outputs_R=per_device(home_Q, first * has_output_Q),
                )
            )
        return tuple(works)

    def _images(self, tokens: StepTokens) -> npt.NDArray[np.int64]:
        """Return how many images the vision tokens of each request fill, in a prefill."""
        vision = self.deployment.model.vision
        if vision is None or tokens.step > 0:
            return np.zeros_like(self._prompt_Q)
        is_vision_T = tokens.modality_T == Modality.VISION
        vision_Q = np.bincount(tokens.request_T[is_vision_T], minlength=len(self._prompt_Q))
        return -(-vision_Q // vision.tokens_per_image)

    def _moving_kv_tokens(self, step: int) -> npt.NDArray[np.int64]:
        """Return [R, R]: tokens whose KV cache moves after the prefill, of the requests that decode at all."""
        moving_RR = np.zeros((self.deployment.cluster.num_devices,) * 2, dtype=np.int64)
        if step == 0 and self.num_steps > 1:
            decoding_Q = np.unique(self._request_T[self._rows.step_T == 1])
            route = (self._homes.prefill_Q[decoding_Q], self._homes.decode_Q[decoding_Q])
            np.add.at(moving_RR, route, self._prompt_Q[decoding_Q])
        return moving_RR


def _check_rows(rows: RoutingTrace, name: str) -> None:
    try:
        check_trace(rows)
    except TraceError as error:
        raise TraceError(
            f"{name}: {error} (rows counted in its batch; `epsim trace check` counts them in the file)"
        ) from error


def _record(
    batch: int, given: StepInput, now_s: float, result: StepResult, pairs_LR: npt.NDArray[np.int64]
) -> StepRecord:
    return StepRecord(
        batch=batch,
        phase=given.phase,
        step=given.step,
        start_s=now_s,
        duration_s=result.end_s,
        kv_exposed_s=max(0.0, result.kv_end_s - result.end_s),
        num_tokens=given.num_tokens,
        parts_s=dict(zip(PARTS, result.parts_s_PR, strict=True)),
        link_busy_s_X=result.link_busy_s_X,
        link_bytes_X=result.link_bytes_X,
        pairs_LR=pairs_LR,
        serving_R=given.serving_R,
        sent_bytes=float(result.delivered_bytes_RR.sum()),
        contended=result.contended,
    )

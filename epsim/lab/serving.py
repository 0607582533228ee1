"""Requests served batch by batch while the placement follows their routing: `Server`, which leaves a `Served`.

Letters: S steps of all batches, L MoE layers, R devices (sender, then receiver).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from epsim.batch import BatchRun, Deployment, StepInput, run_steps
from epsim.errors import InputError
from epsim.fitting import make_policy, placement_problem
from epsim.lab.moves import moved_experts_RR, settle
from epsim.lab.question import Choice, Question
from epsim.layout import Layout
from epsim.metrics import RequestRecord, StepRecord
from epsim.placement import Placement
from epsim.run import build_transmission, check_memory, deploy
from epsim.sim import simulate_step
from epsim.sim.bulk import bulk_plan
from epsim.trace import RoutingTrace, concatenate
from epsim.trace.statistics import expert_load
from epsim.traffic import TrafficCounter

Advance = Callable[[], None]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a placement is made anew: after every so many steps, from the routing of the last `window` steps."""

    every: int
    window: int
    match_devices: bool = True

    def __post_init__(self) -> None:
        for option, value in (("--every", self.every), ("--window", self.window)):
            if value < 1:
                raise InputError(f"{option}: {value} is below 1; write 1 or more steps")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rebalance:
    """One change of the placement.

    before_step: the step, counted over all batches, that waits for it. experts_RR: experts that are sent. bytes,
    seconds: what that takes. time_to_place_s: wall-clock time of the policy, which nothing waits for here.
    """

    before_step: int
    experts_RR: npt.NDArray[np.int64]
    num_bytes: float
    seconds: float
    time_to_place_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """What all batches left. batches: of each its requests and steps as they would be if no step waited for weights."""

    batches: list[tuple[list[RequestRecord], list[StepRecord]]]
    rebalances: list[Rebalance]

    @property
    def steps(self) -> list[StepRecord]:
        """The steps of all batches in their order."""
        return [step for _, steps in self.batches for step in steps]

    @property
    def moving_s_S(self) -> Floats:
        """How long each step waited for weights."""
        seconds_S = np.zeros(len(self.steps))
        for rebalance in self.rebalances:
            seconds_S[rebalance.before_step] += rebalance.seconds
        return seconds_S

    @property
    def step_s_S(self) -> Floats:
        """How long each step took, with the KV caches that the next one waits for, without the weights."""
        return np.array([step.duration_s + step.kv_exposed_s for step in self.steps])

    def requests(self, *, with_moves: bool) -> list[RequestRecord]:
        """Return the records of all requests; with_moves: tokens are later by all that their batch has waited for."""
        records, moving_s_S, first = [], self.moving_s_S * with_moves, 0
        for requests, steps in self.batches:
            late_s = np.cumsum(moving_s_S[first : first + len(steps)])
            for request in requests:
                times = np.array(request.token_times_s) + late_s[: len(request.token_times_s)]
                records.append(replace(request, token_times_s=tuple(times.tolist())))
            first += len(steps)
        return records


@dataclass(kw_only=True)
class Server:
    """Serves requests of a trace in batches of one size, in their order.

    first: the layout to begin with. schedule: when the policy of the choice makes another one; None: never.
    """

    question: Question
    choice: Choice
    trace: RoutingTrace
    first: Layout
    schedule: Schedule | None
    batch_size: int
    num_batches: int
    advance: Advance = lambda: None
    _done: int = 0
    _window: deque[RoutingTrace] = field(default_factory=deque)
    _rebalances: list[Rebalance] = field(default_factory=list)

    def __post_init__(self) -> None:
        workload = self.choice.spec.workload.model_copy(
            update={"batch_sizes": [self.batch_size], "num_batches": self.num_batches}
        )
        self._spec = self.choice.spec.model_copy(update={"workload": workload})
        question = self.question
        self._deployment = deploy(self._spec, question.model, question.cluster, self.trace, self.first)
        self._num_chunks = build_transmission(self._spec, question.model).num_chunks
        check_memory(self._deployment, self._spec, self.batch_size)
        if self.schedule is not None:
            self._window = deque(maxlen=self.schedule.window)

    def serve(self) -> Served:
        """Serve all batches, once."""
        ids_Q, size, batches, now_s = self.trace.requests.request_id_Q, self.batch_size, [], 0.0
        for batch in range(self.num_batches):
            ids = ids_Q[batch * size : (batch + 1) * size]
            run = BatchRun(self._deployment, ids, self._spec.workload.max_output_tokens)
            records = run_steps(
                self._inputs(run, self.trace.select(ids)),
                planner=self._deployment.planner,
                cluster=self.question.cluster,
                fidelity=self._deployment.fidelity,
                request_ids=ids,
                batch=batch,
                start_s=now_s,
                advance=self.advance,
            )
            batches.append((records.requests, records.steps))
            now_s = records.end_s
        return Served(batches=batches, rebalances=self._rebalances)

    def _inputs(self, run: BatchRun, rows: RoutingTrace) -> Iterator[StepInput]:
        """Yield the steps of a batch, each on the placement of its time; rows: those of the batch."""
        for step in range(run.num_steps):
            if self.schedule is not None and self._done and self._done % self.schedule.every == 0:
                self._rebalance(self.schedule)
            run.deployment = self._deployment
            yield run.input(step)
            self._done += 1
            if self.schedule is not None:
                self._window.append(rows.take(np.flatnonzero(rows.step_T == step)))

    def _rebalance(self, schedule: Schedule) -> None:
        """Fit to the last steps, and move weights to where they are to be."""
        question, layout, rows = self.question, self._deployment.layout, concatenate(list(self._window))
        problem = placement_problem(self._spec, question.cluster, rows, expert_load(rows))
        began_s = time.perf_counter()
        found = make_policy(self._spec.placement).place(problem)
        time_to_place_s = time.perf_counter() - began_s
        new = settle(layout.placement, found, question.cluster, match_devices=schedule.match_devices)
        experts_RR = moved_experts_RR(layout.placement, new, question.cluster)
        bytes_RR = experts_RR.astype(np.float64) * float(question.model.expert_bytes)
        self._rebalances.append(
            Rebalance(
                before_step=self._done,
                experts_RR=experts_RR,
                num_bytes=float(bytes_RR.sum()),
                seconds=self._transfer_s(bytes_RR),
                time_to_place_s=time_to_place_s,
            )
        )
        self._deployment = self._with(new)
        check_memory(self._deployment, self._spec, self.batch_size)

    def _transfer_s(self, bytes_RR: Floats) -> float:
        """Return how long the devices send to each other, all at once, while nothing else is on the links."""
        plan = bulk_plan(bytes_RR, self.question.cluster)
        return simulate_step(plan, self.question.cluster, self._deployment.fidelity)[0].kv_end_s

    def _with(self, placement: Placement) -> Deployment:
        return replace(
            self._deployment,
            layout=replace(self._deployment.layout, placement=placement),
            counter=TrafficCounter(placement, self._num_chunks),
        )

"""A policy on one split of the requests: fitted to one part, judged on the other (`Sample`, `run_trial` -> `Trial`).

Letters: L MoE layers, R devices, E experts.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.fitting import make_policy
from epsim.lab.crossing import Crossing, count_crossing
from epsim.lab.question import Choice, Question
from epsim.lab.split import Split
from epsim.layout import Layout
from epsim.metrics import balancedness
from epsim.migration import bytes_by_mode
from epsim.parallelism import lay_out
from epsim.placement import FitTokens, PlacementProblem
from epsim.placement.bounds import gap, max_load_bound_L, transfer_bound_L
from epsim.placement.predicted_time import PredictedTime
from epsim.run import build_problem, build_transmission, deploy, fit_layout, replay
from epsim.scenario import ScenarioSpec
from epsim.trace import RoutingTrace
from epsim.trace.statistics import expert_load
from epsim.traffic import MessageFormat

Floats = npt.NDArray[np.float64]
Values = dict[str, float | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Some requests of a trace."""

    trace: RoutingTrace

    @cached_property
    def load_MLE(self) -> npt.NDArray[np.int64]:
        """How often they chose each expert, int64 [modality, L, E]."""
        return expert_load(self.trace)

    @cached_property
    def tokens(self) -> FitTokens:
        """Their routing, a layer's rows together."""
        return FitTokens.of(self.trace)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """A split with its rows."""

    split: Split
    fit: Part
    held_out: Part
    _bounds: dict[tuple[str, int, int], float] = field(default_factory=dict)

    @classmethod
    def of(cls, question: Question, split: Split) -> "Sample":
        """Return the split of the question's trace."""
        fit, held_out = (Part(trace=question.trace.select(ids)) for ids in (split.fit_ids, split.held_out_ids))
        return cls(split=split, fit=fit, held_out=held_out)

    def transfer_bound(self, problem: PlacementProblem, part: Part, slots_per_device: int) -> float:
        """Return the mean over layers of what no placement's cost is below."""

        def bound() -> Floats:
            return transfer_bound_L(
                problem.objective, part.tokens, num_experts=problem.num_experts, slots_per_device=slots_per_device
            )

        return self._once(("transfer", id(part), slots_per_device), bound)

    def load_bound(self, problem: PlacementProblem, part: Part, slots_per_device: int) -> float:
        """Return the mean over layers of what no placement's fullest device serves less than."""
        load_LE = part.load_MLE.sum(axis=0)
        return self._once(
            ("load", id(part), slots_per_device),
            lambda: max_load_bound_L(load_LE, problem.num_devices, slots_per_device),
        )

    def _once(self, key: tuple[str, int, int], make: Callable[[], Floats]) -> float:
        if key not in self._bounds:
            self._bounds[key] = float(make().mean())
        return self._bounds[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What a policy gave on a split.

    values: by name (docs/metrics.md), None where there is nothing to say. times: TTFT and TPOT in s by batch size.
    sent_bytes_RR: of the held-out requests, by sender and receiver. bounds: as values, or empty.
    """

    values: Values
    times: dict[int, Values]
    sent_bytes_RR: Floats
    bounds: Values


def run_trial(
    question: Question, choice: Choice, sample: Sample, advance: Callable[[], None], *, with_bounds: bool
) -> Trial:
    """Fit the policy to one part of the requests and judge it on the other.

    advance: is called after each simulated step. with_bounds: also bound what any placement gives, which takes longer.
    """
    problem = build_problem(choice.spec, question.model, question.cluster, sample.fit.trace, sample.fit.load_MLE)
    policy = make_policy(choice.spec.placement)
    began_s = time.perf_counter()
    layout = lay_out(choice.spec, question.model, policy, problem)
    seconds = time.perf_counter() - began_s
    transmission = build_transmission(choice.spec, question.model)
    parts = {"fit": sample.fit, "held_out": sample.held_out}
    crossings = {
        name: count_crossing(part.trace, layout, question.cluster, transmission) for name, part in parts.items()
    }
    judged, costs = crossings["held_out"], _costs(sample, problem, layout)
    return Trial(
        values={
            **_crossing_values(judged),
            **costs,
            **_migration_values(question, layout, sample.held_out, transmission.message_format),
            "replica_memory_bytes": replica_bytes(layout, float(question.model.expert_bytes)),
            "time_to_place_s": seconds,
        },
        times=_times(question, choice.spec, layout, sample.held_out.trace, advance),
        sent_bytes_RR=judged.bytes_RR,
        bounds=_bounds(sample, problem, layout, costs, crossings) if with_bounds else {},
    )


def fit_to_all(question: Question, choice: Choice) -> Layout:
    """Return the layout that the policy makes of all requests of the trace."""
    return fit_layout(choice.spec, question.model, question.cluster, question.trace, question.load_MLE)


def replica_bytes(layout: Layout, expert_bytes: float) -> float:
    """Return the bytes of experts on the fullest device beyond E / R per layer."""
    placement = layout.placement
    even = placement.num_layers * placement.num_experts / placement.num_devices
    return max(0.0, float(placement.filled_slots_R.max()) - even) * expert_bytes


def _crossing_values(judged: Crossing) -> Values:
    balance = balancedness([judged.served_LR])
    assert balance is not None  # a part has tokens
    return {
        "remote_bytes_per_token": judged.bytes_per_token,
        "remote_devices_per_token": judged.remote_devices,
        "remote_nodes_per_token": judged.remote_nodes,
        **{f"balancedness_{form}": value for form, value in balance.items()},
    }


def _migration_values(question: Question, layout: Layout, part: Part, form: MessageFormat) -> Values:
    """Return what tokens would send that stay where their first expert was, without and with their keys and values."""
    sent = bytes_by_mode(part.trace, layout.placement, layout.homes, question.model, form)
    return {
        "migrate_vector_bytes_per_token": sent.per_token(sent.vectors_FLRR),
        "migrate_bytes_per_token": sent.per_token(sent.migrate_FLRR),
    }


def _costs(sample: Sample, problem: PlacementProblem, layout: Layout) -> Values:
    """Return the transfer objective of the requests fitted to and of those held out."""
    table_RLE = layout.placement.device_of_expert_RLE
    return {
        f"objective_{name}": float(problem.objective.cost_L(part.tokens, table_RLE).mean())
        for name, part in (("fit", sample.fit), ("held_out", sample.held_out))
    }


def _bounds(
    sample: Sample, problem: PlacementProblem, layout: Layout, costs: Values, crossings: Mapping[str, Crossing]
) -> Values:
    """Return lower bounds of both objectives, and how far these and the largest loads are above them."""
    slots, values = layout.placement.slots_per_device, dict[str, float | None]()
    for name, part in (("fit", sample.fit), ("held_out", sample.held_out)):
        bound, cost = sample.transfer_bound(problem, part, slots), costs[f"objective_{name}"]
        max_load = float(crossings[name].served_LR.max(axis=1).mean())
        assert cost is not None
        values[f"objective_bound_{name}"] = bound
        values[f"objective_gap_{name}"] = gap(cost, bound)
        values[f"max_load_gap_{name}"] = gap(max_load, sample.load_bound(problem, part, slots))
    return {**values, **_time_bound(problem, layout)}


def _time_bound(problem: PlacementProblem, layout: Layout) -> Values:
    """Return the closed form's time of all layers, its lower bound and the gap, for the policy that minimises it."""
    if layout.placement.policy != PredictedTime.kind or problem.clock is None:
        return {}
    clock, device_LE = problem.clock(), layout.placement.device_of_expert_RLE[0]
    seconds = sum(clock.seconds(layer, device_E) for layer, device_E in enumerate(device_LE))
    bound_s = sum(clock.bound_seconds(layer) for layer in range(problem.num_layers))
    return {"clock_fit_s": seconds, "clock_bound_fit_s": bound_s, "clock_gap_fit": gap(seconds, bound_s)}


def _times(
    question: Question, spec: ScenarioSpec, layout: Layout, trace: RoutingTrace, advance: Callable[[], None]
) -> dict[int, Values]:
    """Return TTFT and TPOT of each batch size, means over the requests of as many full batches as there are."""
    deployment = deploy(spec, question.model, question.cluster, trace, layout)
    times: dict[int, Values] = {}
    for size in spec.workload.batch_sizes:
        batches = {"batch_sizes": [size], "num_batches": question.num_batches(size, len(trace.requests))}
        own = spec.model_copy(update={"workload": spec.workload.model_copy(update=batches)})
        found: dict[str, Any] = replay(deployment, own, advance).results["batch_sizes"][0]
        times[size] = {name: found[name]["mean"] if found[name] else None for name in ("ttft_s", "tpot_s")}
    return times

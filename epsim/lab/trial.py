"""A policy on one split of the requests: fitted to one part, judged on the other (`Sample`, `run_trial` -> `Trial`).

Letters: L MoE layers, R devices, E experts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.fitting import make_policy, placement_problem
from epsim.lab.crossing import Crossing, count_crossing
from epsim.lab.question import Choice, Question
from epsim.lab.split import Split
from epsim.layout import Layout
from epsim.metrics import balancedness
from epsim.parallelism import lay_out
from epsim.placement import FitTokens, PlacementProblem
from epsim.placement.bounds import max_load_bound_L, transfer_bound_L
from epsim.run import build_transmission, deploy, replay
from epsim.scenario import ScenarioSpec
from epsim.trace import RoutingTrace
from epsim.trace.statistics import expert_load

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
    _bounds: dict[tuple[str, int, int], float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, question: Question, split: Split) -> "Sample":
        """Return the split of the question's trace."""
        fit, held_out = (Part(trace=question.trace.select(ids)) for ids in (split.fit_ids, split.held_out_ids))
        return cls(split=split, fit=fit, held_out=held_out)

    def transfer_bound(self, problem: PlacementProblem, part: Part, slots_per_device: int) -> float | None:
        """Return the mean over layers of what no placement's cost is below."""
        return self._once(
            ("transfer", id(part), slots_per_device),
            lambda: _mean(
                transfer_bound_L(
                    problem.objective,
                    part.tokens,
                    num_experts=problem.num_experts,
                    slots_per_device=slots_per_device,
                )
            ),
        )

    def load_bound(self, problem: PlacementProblem, part: Part, slots_per_device: int) -> float | None:
        """Return the mean over layers of what no placement's fullest device serves less than."""
        load_LE = part.load_MLE.sum(axis=0)
        return self._once(
            ("load", id(part), slots_per_device),
            lambda: _mean(max_load_bound_L(load_LE, problem.num_devices, slots_per_device)),
        )

    def _once(self, key: tuple[str, int, int], make: Callable[[], float | None]) -> float | None:
        if key not in self._bounds:
            self._bounds[key] = make()
        return self._bounds[key]


def _mean(bound_L: Floats | None) -> float | None:
    return None if bound_L is None else float(bound_L.mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What a policy gave on a split.

    values: by name (docs/metrics.md), None where there is nothing to say. times: TTFT and TPOT in s by batch size.
    sent_bytes_RR: of the held-out requests, by sender and receiver.
    """

    values: Values
    times: dict[int, Values]
    sent_bytes_RR: Floats


def run_trial(question: Question, choice: Choice, sample: Sample, advance: Callable[[], None]) -> Trial:
    """Fit the policy to one part of the requests and judge it on the other; advance: is called after each step."""
    problem = placement_problem(choice.spec, question.cluster, sample.fit.trace, sample.fit.load_MLE)
    policy = make_policy(choice.spec.placement)
    began_s = time.perf_counter()
    layout = lay_out(choice.spec, question.model, policy, problem)
    seconds = time.perf_counter() - began_s
    transmission = build_transmission(choice.spec, question.model)
    fitted, judged = (
        count_crossing(part.trace, layout, question.cluster, transmission) for part in (sample.fit, sample.held_out)
    )
    return Trial(
        values={
            **_crossing_values(judged),
            **_bounded_values(sample, problem, layout, fitted, judged),
            "replica_memory_bytes": replica_bytes(layout, float(question.model.expert_bytes)),
            "time_to_place_s": seconds,
        },
        times=_times(question, choice.spec, layout, sample.held_out.trace, advance),
        sent_bytes_RR=judged.bytes_RR,
    )


def fit_to_all(question: Question, choice: Choice) -> Layout:
    """Return the layout that the policy makes of all requests of the trace."""
    problem = placement_problem(choice.spec, question.cluster, question.trace, question.load_MLE)
    return lay_out(choice.spec, question.model, make_policy(choice.spec.placement), problem)


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


def _bounded_values(
    sample: Sample, problem: PlacementProblem, layout: Layout, fitted: Crossing, judged: Crossing
) -> Values:
    """Return the transfer objective and the largest loads, in sample and held out, beside their lower bounds."""
    values: Values = {}
    placement = layout.placement
    slots = placement.slots_per_device
    for name, part, crossing in (("fit", sample.fit, fitted), ("held_out", sample.held_out, judged)):
        cost = float(problem.objective.cost_L(part.tokens, placement.device_of_expert_RLE).mean())
        bound = sample.transfer_bound(problem, part, slots)
        max_load, load_bound = float(crossing.served_LR.max(axis=1).mean()), sample.load_bound(problem, part, slots)
        values[f"objective_{name}"] = cost
        values[f"objective_bound_{name}"] = bound
        values[f"objective_gap_{name}"] = _gap(cost, bound)
        values[f"max_load_gap_{name}"] = _gap(max_load, load_bound)
    return values


def _gap(value: float, bound: float | None) -> float | None:
    return value / bound - 1 if bound else None


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

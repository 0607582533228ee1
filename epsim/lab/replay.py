"""A placement made anew every so many steps against one made once: `replay_policies`, plain values for JSON and tables.

Requests are served in their order. The first of them are what each policy is fitted to; the others are replayed: on the
baseline, on the placement of the first part (fixed), and from there on one that follows the routing (online).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any

from epsim.errors import InputError, ScenarioError
from epsim.lab.experiment import about
from epsim.lab.question import Choice, Chosen, Question
from epsim.lab.serving import Schedule, Served, Server
from epsim.layout import Layout
from epsim.metrics import RequestRecord, StepRecord, balancedness
from epsim.placement.predicted_time import PredictedTime
from epsim.run import fit_layout
from epsim.trace import RoutingTrace
from epsim.trace.statistics import expert_load

Advance = Callable[[], None]
FORMS = ("ratio_of_sums", "mean_of_ratios")


@dataclass(frozen=True, kw_only=True)
class ReplayDesign:
    """How requests are parted in time, and when placements are made anew.

    batch_size: None: the first of the workload.
    """

    schedule: Schedule
    fit_share: float = 0.5
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fit_share < 1:
            raise InputError(f"--fit-share: {self.fit_share} is not between 0 and 1; write e.g. 0.5")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"--batch-size: {self.batch_size} is below 1; write 1 or more")


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """The two parts of a question's trace in time, and the batches that the second fills."""

    question: Question
    num_fit: int
    batch_size: int

    @classmethod
    def of(cls, question: Question, design: ReplayDesign) -> "Parts":
        """Return the parts; InputError where one is too small, ScenarioError where homes would move with experts."""
        if question.spec.homes.policy != "balanced":
            raise ScenarioError(
                f'homes.policy: "{question.spec.homes.policy}" follows the placement, which --replay moves; '
                "write balanced, e.g. --set homes.policy=balanced"
            )
        num_requests = len(question.trace.requests)
        size = design.batch_size or question.spec.workload.batch_sizes[0]
        num_fit = int(design.fit_share * num_requests + 0.5)
        if not num_fit:
            raise InputError(f"--fit-share: {design.fit_share} of {num_requests} requests is none; write more")
        if num_requests - num_fit < size:
            raise InputError(
                f"--batch-size: {size} needs as many requests to replay, {num_requests - num_fit} of {num_requests} "
                "are left; write a smaller one or a smaller --fit-share, or use a longer trace"
            )
        return cls(question=question, num_fit=num_fit, batch_size=size)

    @cached_property
    def fit(self) -> RoutingTrace:
        """The requests that policies are fitted to."""
        return self.question.trace.select(self.question.trace.requests.request_id_Q[: self.num_fit])

    @cached_property
    def replayed(self) -> RoutingTrace:
        """The requests after them."""
        return self.question.trace.select(self.question.trace.requests.request_id_Q[self.num_fit :])

    @property
    def num_batches(self) -> int:
        """Full batches of the replayed requests, or as many as the scenario says at most."""
        return self.question.num_batches(self.batch_size, len(self.question.trace.requests) - self.num_fit)

    @property
    def num_steps(self) -> int:
        """Steps of all batches: a prefill each, and as many decode steps as its longest request has."""
        decode_Q = self.question.trace.requests.num_decode_tokens_Q[self.num_fit :]
        return self.question.num_steps(self.batch_size, decode_Q)

    def lay_out(self, choice: Choice) -> Layout:
        """Return what a policy makes of the first part."""
        question, rows = self.question, self.fit
        return fit_layout(choice.spec, question.model, question.cluster, rows, expert_load(rows))

    def serve(self, choice: Choice, first: Layout, schedule: Schedule | None, advance: Advance) -> Served:
        """Serve the second part."""
        server = Server(
            question=self.question,
            choice=choice,
            trace=self.replayed,
            first=first,
            schedule=schedule,
            batch_size=self.batch_size,
            num_batches=self.num_batches,
            advance=advance,
        )
        return server.serve()


def count_replay_steps(parts: Parts, chosen: Chosen) -> int:
    """Return how many steps `replay_policies` will simulate, for a progress bar."""
    policies = sum(choice.label != chosen.baseline for choice in chosen.choices)
    return parts.num_steps * (2 * policies + (len(chosen.choices) - policies))


def replay_policies(
    parts: Parts, chosen: Chosen, design: ReplayDesign, advance: Advance = lambda: None
) -> dict[str, Any]:
    """Return what each policy gives on the replayed requests, fixed and online, and the baseline.

    advance: is called after each simulated step. Raises InputError where a policy does not apply that is not optional,
    or is the baseline that was named.
    """
    if all(choice.label == chosen.baseline for choice in chosen.choices):
        raise InputError(f"--policy: {chosen.baseline} is the baseline; name another policy to compare with it")
    rows: list[dict[str, Any]] = []
    left_out = {**chosen.left_out, **_not_of_windows(chosen)}
    for choice in sorted(chosen.choices, key=lambda choice: choice.label != chosen.baseline):  # the baseline first
        if choice.label in left_out:
            continue
        try:
            rows += _of_policy(parts, choice, None if choice.label == chosen.baseline else design.schedule, advance)
        except InputError as error:
            left_out[choice.label] = chosen.unless_left_out(choice.label, error)
    if not rows:
        raise InputError(f"--policy: none applies; {next(iter(left_out.values()))}")
    return {
        **about(parts.question),
        "design": {
            "fit_share": design.fit_share,
            "num_fit": parts.num_fit,
            "num_replayed": parts.num_batches * parts.batch_size,
            "batch_size": parts.batch_size,
            "num_batches": parts.num_batches,
            "num_steps": parts.num_steps,
            "every": design.schedule.every,
            "window": design.schedule.window,
            "match_devices": design.schedule.match_devices,
        },
        "baseline": chosen.baseline,
        "rows": rows,
        "left_out": [{"policy": label, "reason": why} for label, why in left_out.items()],
    }


def _not_of_windows(chosen: Chosen) -> dict[str, str]:
    """Return why policies cannot be refitted to steps, by label; InputError where they are not optional."""
    why = f"{PredictedTime.kind} predicts batches of whole requests, and a window of steps has parts of them"
    found = [c.label for c in chosen.choices if c.kind == PredictedTime.kind and c.label != chosen.baseline]
    if found and not chosen.optional:
        raise InputError(f'--policy "{found[0]}": {why}; write another policy, e.g. balanced_coactivation')
    return dict.fromkeys(found, why)


def _of_policy(parts: Parts, choice: Choice, schedule: Schedule | None, advance: Advance) -> list[dict[str, Any]]:
    """Return the baseline's row, or where there is a schedule those of a policy, fixed and online."""
    first = parts.lay_out(choice)
    fixed = parts.serve(choice, first, None, advance)
    head = {"policy": choice.label}
    if schedule is None:
        return [{**head, "placement": "baseline", **_summary(fixed)}]
    online = parts.serve(choice, first, schedule, advance)
    return [
        {**head, "placement": "fixed", **_summary(fixed)},
        {**head, "placement": "online", **_summary(online), **_break_even(fixed, online)},
    ]


def _summary(served: Served) -> dict[str, Any]:
    steps, moves = served.steps, served.rebalances
    moving_s, serving_s = float(served.moving_s_S.sum()), float(served.step_s_S.sum())
    means = {
        f"{name}{suffix}": value
        for with_moves, suffix in ((True, ""), (False, "_without_moves"))
        for name, value in _latencies(served.requests(with_moves=with_moves)).items()
    }
    by_step = [_balance([step]) for step in steps]
    return {
        **means,
        "remote_bytes_per_token": sum(step.sent_bytes for step in steps) / sum(step.num_tokens for step in steps),
        **{f"balancedness_{form}": value for form, value in _balance(steps).items()},
        "num_rebalances": len(moves),
        "moved_experts": sum(int(move.experts_RR.sum()) for move in moves),
        "moved_bytes": sum(move.num_bytes for move in moves),
        "moving_s": moving_s,
        "moving_share": moving_s / (moving_s + serving_s),
        "time_to_place_s": median(move.time_to_place_s for move in moves) if moves else None,
        "rebalances": [
            {
                "before_step": move.before_step,
                "moved_experts": int(move.experts_RR.sum()),
                "moved_bytes": move.num_bytes,
                "moving_s": move.seconds,
            }
            for move in moves
        ],
        "steps": {
            "batch": [step.batch for step in steps],
            "phase": [step.phase for step in steps],
            "num_tokens": [step.num_tokens for step in steps],
            "step_s": served.step_s_S.tolist(),
            "moving_s": served.moving_s_S.tolist(),
            **{f"balancedness_{form}": [found[form] for found in by_step] for form in FORMS},
        },
    }


def _latencies(requests: list[RequestRecord]) -> dict[str, float | None]:
    tpots_s = [request.tpot_s for request in requests if request.tpot_s is not None]
    return {"ttft_s": fmean(request.ttft_s for request in requests), "tpot_s": fmean(tpots_s) if tpots_s else None}


def _balance(steps: list[StepRecord]) -> dict[str, float]:
    found = balancedness([step.pairs_LR[:, step.serving_R] for step in steps])
    assert found is not None  # a step has tokens
    return found


def _break_even(fixed: Served, online: Served) -> dict[str, float | None]:
    """Return what following saves, and after how many steps a rebalance has paid for itself.

    saved_s_per_step: of the steps from the first rebalance on, without waiting for weights; negative where following
    is slower. break_even_steps: mean time of a move over that; None where nothing is saved, or nothing was rebalanced.
    """
    if not online.rebalances:
        return {"saved_s_per_step": None, "break_even_steps": None}
    since = online.rebalances[0].before_step
    saved_s = float((fixed.step_s_S - online.step_s_S)[since:].mean())
    a_move_s = fmean(rebalance.seconds for rebalance in online.rebalances)
    return {"saved_s_per_step": saved_s, "break_even_steps": a_move_s / saved_s if saved_s > 0 else None}

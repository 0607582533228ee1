"""Which placement of a comparison is written to a file: `check_metric`, `best_policy`, `placement_file`."""

from collections.abc import Callable, Mapping
from typing import Any

from epsim.errors import InputError
from epsim.lab.question import Chosen, Question
from epsim.lab.trial import fit_to_all
from epsim.placement.file import PlacementFile

Policy = Mapping[str, Any]


def _metric(name: str, sign: int) -> Callable[[Policy], float]:
    return lambda policy: sign * float(policy["metrics"][name]["mean"])


def _latency(name: str) -> Callable[[Policy], float | None]:
    """Return what reads the time at the largest batch size, None without one."""

    def read(policy: Policy) -> float | None:
        value = policy["batch_sizes"][-1][name]
        return None if value is None else float(value["mean"])

    return read


BEST: Mapping[str, Callable[[Policy], float | None]] = {  # the less the better
    "bytes": _metric("remote_bytes_per_token", 1),
    "devices": _metric("remote_devices_per_token", 1),
    "ttft": _latency("ttft_s"),
    "tpot": _latency("tpot_s"),
    "balance": _metric("balancedness_ratio_of_sums", -1),
}


def check_metric(metric: str) -> None:
    """Raise InputError for a metric that is none of `BEST`."""
    if metric not in BEST:
        raise InputError(f'--best: "{metric}" is not a metric; write one of {", ".join(BEST)}')


def check_second_tokens(metric: str, question: Question) -> None:
    """Raise InputError for `tpot` where no request of the trace can have a second token."""
    most = question.spec.workload.max_output_tokens
    if metric == "tpot" and (most == 1 or not question.trace.requests.num_decode_tokens_Q.any()):
        raise _no_second_token(metric)


def best_policy(found: Mapping[str, Any], metric: str) -> str:
    """Return the label of the policy that is best in a metric on held-out requests, the first of several.

    Raises InputError where no policy has a value, which is of TPOT.
    """
    values: dict[str, float] = {
        policy["policy"]: value for policy in found["policies"] if (value := BEST[metric](policy)) is not None
    }
    if not values:
        raise _no_second_token(metric)
    return min(values, key=values.__getitem__)


def _no_second_token(metric: str) -> InputError:
    others = ", ".join(name for name in BEST if name != metric)
    return InputError(f"--best {metric}: no request has a second token; write one of {others}")


def placement_file(question: Question, chosen: Chosen, found: Mapping[str, Any], metric: str | None) -> PlacementFile:
    """Return the placement that a policy makes of all requests of the trace: the best one, or else the first asked for.

    Raises InputError where the first was left out.
    """
    label = chosen.first if metric is None else best_policy(found, metric)
    if label not in [policy["policy"] for policy in found["policies"]]:
        raise InputError(f"--out: {label} was left out of the comparison; say which to write with --best")
    choice = next(choice for choice in chosen.choices if choice.label == label)
    placement = fit_to_all(question, choice).placement
    return PlacementFile(
        layer_ids=question.trace.meta.layer_ids,
        num_experts=placement.num_experts,
        num_devices=placement.num_devices,
        physical_to_logical_LP=placement.physical_to_logical_LP,
        policy=label,
        description=f"fitted by epsim place to all {len(question.trace.requests)} requests of {question.trace.name} "
        f"for {question.cluster.num_devices} devices of {question.spec.cluster.name}",
    )

"""The kind of parallelism of a scenario: whether it goes with the rest (`check_parallelism`), and its `lay_out`.

ep: experts spread over all devices. tp: groups of devices that share every layer. dp: a replica per device. afd:
attention on some devices, experts on the others. pd: prefill on some devices, decode on the others, experts spread
over the devices of each pool.
"""

from epsim.errors import ScenarioError
from epsim.layout import Layout, attention_apart, expert_parallel, prefill_apart, replicas
from epsim.model import ModelCard
from epsim.placement import PlacementPolicy, PlacementProblem
from epsim.scenario.describe import show
from epsim.scenario.spec import AfdSpec, DpSpec, ParallelismSpec, PdSpec, ScenarioSpec, TpSpec

_WHY = {"tp": "every device holds a slice of every expert", "dp": "every device holds the whole model"}


def check_parallelism(spec: ScenarioSpec, model: ModelCard, num_devices: int) -> None:
    """Raise ScenarioError where the kind of parallelism does not go with the model, the devices or other sections."""
    kind, chosen = spec.parallelism.kind, spec.parallelism
    if kind in _WHY:
        _require_defaults(spec)
    elif not model.moe_layer_ids:
        raise ScenarioError(
            f"model: {model.name} has no MoE layers; write a model with experts, e.g. olmoe, "
            "or parallelism.kind: tp or dp"
        )
    if (size := group_size(chosen, num_devices)) is not None:
        _check_size(size, model, num_devices)
    if isinstance(chosen, AfdSpec | PdSpec):
        _check_split(spec, num_devices)


def _check_size(size: int, model: ModelCard, num_devices: int) -> None:
    if num_devices % size:
        why = f"does not divide {num_devices} devices"
    elif uneven := model.uneven(size):
        why = f"does not split {uneven} of {model.name}"
    else:
        return
    fits = [n for n in range(1, num_devices + 1) if num_devices % n == 0 and not model.uneven(n)]
    raise ScenarioError(
        f"parallelism.size: {size} {why}; write {'one of ' * (len(fits) > 1)}{', '.join(map(str, fits))}"
    )


def _check_split(spec: ScenarioSpec, num_devices: int) -> None:
    kind, chosen = spec.parallelism.kind, spec.parallelism
    if isinstance(chosen, AfdSpec):
        field, first, where = "attention_devices", chosen.attention_devices, "on the attention devices"
    else:
        assert isinstance(chosen, PdSpec)
        field, first, where = "prefill_devices", chosen.prefill_devices, "first in the one, then in the other pool"
    if num_devices < 2:
        raise ScenarioError(f'parallelism.kind: "{kind}" needs 2 devices, the cluster has 1; write ep, tp or dp')
    if first is not None and first >= num_devices:
        raise ScenarioError(
            f"parallelism.{field}: {first} leaves none of {num_devices} devices; write {num_devices - 1} or less"
        )
    if spec.homes.policy != "balanced":
        raise ScenarioError(
            f'homes.policy: "{spec.homes.policy}" has no meaning under {kind}, where tokens live {where}; leave it out'
        )


def _require_defaults(spec: ScenarioSpec) -> None:
    """Where experts are not spread and tokens do not travel to them, nothing can be said about it."""
    kind = spec.parallelism.kind
    for section in ("placement", "homes", "transmission"):
        default = ScenarioSpec.model_fields[section].default
        for field, value in getattr(spec, section):
            if value != getattr(default, field, None):
                raise ScenarioError(
                    f"{section}.{field}: {show(value)} has no meaning under {kind}, where {_WHY[kind]}; leave it "
                    f'out (on the command line: --set "{section}={{}}")'
                )


def group_size(chosen: ParallelismSpec, num_devices: int) -> int | None:
    """Return how many devices share each layer of a replica; None where devices are no replicas."""
    if isinstance(chosen, TpSpec):
        return chosen.size or num_devices
    return 1 if isinstance(chosen, DpSpec) else None


def lay_out(spec: ScenarioSpec, model: ModelCard, policy: PlacementPolicy, problem: PlacementProblem) -> Layout:
    """Return the layout of a scenario that `check_parallelism` accepts; `policy` places the experts where it can."""
    chosen = spec.parallelism
    match chosen:
        case TpSpec() | DpSpec():
            size = group_size(chosen, problem.num_devices)
            assert size is not None
            return replicas(model, problem, kind=chosen.kind, size=size)
        case AfdSpec():
            return attention_apart(model, policy, problem, attention_devices=chosen.attention_devices)
        case PdSpec():
            return prefill_apart(model, policy, problem, prefill_devices=chosen.prefill_devices)
        case _:
            return expert_parallel(model, policy, problem, homes=spec.homes.policy)

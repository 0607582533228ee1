"""A scenario in slow motion: `dilated`. Devices and links are k times slower: what a host adds counts k times less.

Sizes of messages stay the same. Latencies are not imitated by a testbed and are left alone.
"""

from typing import Any

from epsim.errors import ScenarioError
from epsim.scenario import ScenarioSpec

_RATES = ("memory_bandwidth",)
_TIMES = ("launch_overhead", "layer_overhead", "request_overhead", "expert_overhead")


def dilated(spec: ScenarioSpec, slowdown: float) -> ScenarioSpec:
    """Return the scenario with every device and link `slowdown` times slower."""
    if not 1 <= slowdown <= 1000:
        raise ScenarioError(f"--dilation: {slowdown:g} is not from 1 to 1000; write e.g. 10")
    cluster = spec.cluster
    types = {name: kind.model_copy(update=_slower_type(kind, slowdown)) for name, kind in cluster.device_types.items()}
    links = [link.model_copy(update={"bandwidth": link.bandwidth / slowdown}) for link in cluster.links]
    return spec.model_copy(update={"cluster": cluster.model_copy(update={"device_types": types, "links": links})})


def without_messages(spec: ScenarioSpec) -> ScenarioSpec:
    """Return the scenario without what messages cost devices: real ones cost what they cost."""
    kinds = spec.cluster.device_types.items()
    types = {name: kind.model_copy(update={"messaging": None, "step_overhead": 0.0}) for name, kind in kinds}
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"device_types": types})})


def _slower_type(kind: Any, slowdown: float) -> dict[str, Any]:
    changed = {name: getattr(kind, name) / slowdown for name in _RATES}
    changed |= {name: getattr(kind, name) * slowdown for name in _TIMES}
    return changed | {"flops": {dtype: rate / slowdown for dtype, rate in kind.flops.items()}}

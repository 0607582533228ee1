"""`Ranges`: how far the grids of a device's measurements must reach, from a scenario by `ranges_of`."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from epsim.errors import InputError
from epsim.run import assemble
from epsim.scenario.cluster import ClusterSpec
from epsim.scenario.spec import ScenarioSpec


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The most of everything on one device. pairs: of its experts. experts: slots in a layer. prompt, context: tokens
    of a request, least and most.
    """

    requests: int
    prompt: tuple[int, int]
    context: tuple[int, int]
    tokens: int
    experts: int
    pairs: int
    vectors: int
    images: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = value[0] if isinstance(value, tuple) else value
            if least < (0 if name == "images" else 1) or (isinstance(value, tuple) and value[0] > value[1]):
                raise ValueError(f"{name}: {value}")

    def widened(self, **most: int | None) -> Self:
        """Return the ranges with other ends; raise InputError where there can be none."""
        fields = dict(vars(self))
        for name, value in most.items():
            if value is not None:
                fields[name] = (min(fields[name][0], value), value) if name in ("prompt", "context") else value
        if fields["tokens"] < fields["prompt"][1]:
            raise InputError(f"--max-tokens: {fields['tokens']} is less than a prompt of {fields['prompt'][1]}")
        if fields["pairs"] < fields["experts"]:
            raise InputError(f"--max-pairs: {fields['pairs']} is less than a pair for each of {fields['experts']}")
        return type(self)(**fields)


def ranges_of(spec: ScenarioSpec) -> Ranges:
    """Return what a scenario can ask of one device, whatever the routing: all experts of a batch's tokens may be there.

    Raises InputError for what `simulate` refuses, for a dense model, and for tensor parallelism.
    """
    if spec.model.moe is None:
        raise InputError(f"model: {spec.model.name} has no experts to measure; name a MoE model")
    if spec.parallelism.kind == "tp":
        raise InputError("parallelism.kind: tp splits the layers, a profile is of whole ones; write ep")
    deployment = assemble(spec.model_copy(update={"cluster": _without_profiles(spec)}))
    homes, topk = deployment.layout.homes, deployment.model.topk
    batch, num_homes = max(spec.workload.batch_sizes), min(len(homes.prefill_devices), len(homes.decode_devices))
    requests = -(-batch // num_homes)
    rows = slice(0, batch * spec.workload.num_batches)
    prompt_Q = deployment.trace.requests.num_prefill_tokens_Q[rows].astype(np.int64)
    decode_Q = deployment.trace.requests.num_decode_tokens_Q[rows].astype(np.int64)
    if spec.workload.max_output_tokens is not None:
        decode_Q = np.minimum(decode_Q, spec.workload.max_output_tokens - 1)
    prompt, vision = int(prompt_Q.max()), deployment.model.vision
    experts = deployment.layout.placement.slots_per_device
    all_tokens = batch * prompt
    images = 0
    if vision is not None:
        images = requests * -(
            -int(deployment.trace.requests.num_vision_tokens_Q[rows].max()) // vision.tokens_per_image
        )
    return Ranges(
        requests=requests,
        prompt=(int(prompt_Q.min()), prompt),
        context=(int(prompt_Q.min()) + 1, int((prompt_Q + np.maximum(decode_Q, 1)).max())),
        tokens=requests * prompt,
        experts=experts,
        pairs=max(experts, all_tokens * min(topk, experts)),
        vectors=all_tokens * topk,
        images=images,
    )


def _without_profiles(spec: ScenarioSpec) -> ClusterSpec:
    """Return the cluster as if it had no profiles: the one to be written need not be there yet."""
    types = {name: kind.model_copy(update={"profile": None}) for name, kind in spec.cluster.device_types.items()}
    return spec.cluster.model_copy(update={"device_types": types})

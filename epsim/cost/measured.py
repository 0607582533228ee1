"""`MeasuredCost`: seconds of each part of a step from measured device profiles. Letters: R devices."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from epsim.cluster import Cluster
from epsim.cost.interpolation import Interpolation
from epsim.cost.profile import DeviceProfile, read_profile, shapes_of
from epsim.cost.roofline import Counts, Floats, HomeWork
from epsim.errors import InputError
from epsim.model import ModelCard


class MeasuredCost:
    """Times of the parts of a step on the devices of a cluster, each type of device with a profile of its own.

    Has the methods of `RooflineCost`. What a spec says of compute does not count: launches, requests and experts are in
    the measured times. `layer_overhead` still is the least time of a layer.
    """

    def __init__(self, model: ModelCard, cluster: Cluster, profiles: Mapping[str, DeviceProfile], *, wire: str) -> None:
        """profiles: by type of device, of this model's shapes and this wire (`wire_name`); InputError otherwise."""
        for name, profile in profiles.items():
            _require_shapes(model, profile, f"cluster.device_types.{name}.profile")
            _require_wire(wire, profile, f"cluster.device_types.{name}.profile")
        self._times = [
            (
                np.array([r for r, device in enumerate(cluster.devices) if device.type_name == name], dtype=np.intp),
                {op: Interpolation(op, table, _origin(name, profile)) for op, table in profile.ops.items()},
                _origin(name, profile),
            )
            for name, profile in profiles.items()
        ]
        self._has_shared = model.moe is not None and model.moe.shared_ffn_size > 0
        self.layer_floor_s_R = np.array([device.layer_overhead_s for device in cluster.devices])

    def _seconds(self, op: str, *at_xR: Counts | Floats, optional: bool = False) -> Floats:
        """Return [..., R]: each device's own table; optional: an operation that a profile lacks takes no time."""
        seconds_xR = np.zeros(at_xR[0].shape)
        for devices, tables, origin in self._times:
            at = [values[..., devices] for values in at_xR]
            if op in tables:
                seconds_xR[..., devices] = tables[op](*at)
            elif not optional and all(values.any() for values in at):
                raise InputError(f"{origin}: has no {op}; measure this scenario with `epsim measure device`")
        return seconds_xR

    def attention_s_R(self, work: HomeWork) -> Floats:
        """One layer: by requests, and tokens or cached tokens of a request on average."""
        requests_R = np.maximum(work.requests_R, 1)
        if work.decode:
            return self._seconds("decode_attention", work.requests_R, work.kv_tokens_R / requests_R)
        return self._seconds("prefill_attention", work.requests_R, work.tokens_R / requests_R)

    def router_s_R(self, work: HomeWork) -> Floats:
        """One MoE layer's gate, with its norm."""
        return self._seconds("router", work.tokens_R)

    def dense_ffn_s_R(self, work: HomeWork) -> Floats:
        """The feed-forward part of one dense layer; 0 where no layer is dense."""
        return self._seconds("dense_ffn", work.tokens_R, optional=True)

    def shared_experts_s_R(self, work: HomeWork) -> Floats:
        """The shared experts of one MoE layer; 0 where there are none."""
        return self._seconds("shared_experts", work.tokens_R, optional=not self._has_shared)

    def experts_s(self, pairs_xR: Counts, activated_xR: Counts) -> Floats:
        """Routed experts of one kernel: by activated slots, and pairs per activated slot on average."""
        return self._seconds("experts", activated_xR, pairs_xR / np.maximum(activated_xR, 1))

    def pack_s(self, vectors_xR: Counts) -> Floats:
        """Making one message of vectors: gathering and encoding them."""
        return self._seconds("pack", vectors_xR)

    def serve_s(self, vectors_xR: Counts) -> Floats:
        """What one arrival of vectors takes beside its experts: decoding it, encoding its results."""
        return self._seconds("serve", vectors_xR)

    def reduce_s(self, vectors_xR: Counts) -> Floats:
        """Decoding and adding up the vectors of one message that came back."""
        return self._seconds("reduce", vectors_xR)

    def vision_s_R(self, work: HomeWork) -> Floats:
        """Vision encoder and projector for the step's images."""
        return self._seconds("vision", work.images_R)

    def head_s_R(self, work: HomeWork) -> Floats:
        """The language-model head, final norm included, for the step's output tokens."""
        return self._seconds("head", work.outputs_R)


def measured_cost(model: ModelCard, cluster: Cluster, paths: Mapping[str, str | None], *, wire: str) -> MeasuredCost:
    """Return the cost of profiles in files, by type of device. wire: as `wire_name` writes it.

    Raises InputError if a type has none while another has one, or a file is no profile of the model or the wire.
    """
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        having = next(name for name, path in paths.items() if path is not None)
        raise InputError(
            f"cluster.device_types.{missing[0]}.profile: is missing, {having} has one; measure all types of device, "
            "or leave out all profiles"
        )
    profiles = {name: read_profile(Path(path)) for name, path in paths.items() if path is not None}
    return MeasuredCost(model, cluster, profiles, wire=wire)


def _origin(type_name: str, profile: DeviceProfile) -> str:
    return f"cluster.device_types.{type_name}.profile ({profile.device}, {profile.date})"


def _require_shapes(model: ModelCard, profile: DeviceProfile, where: str) -> None:
    wanted, found = shapes_of(model), dict(profile.shapes)
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"{where}: was measured with {name} {found.get(name, 'absent')}, the model"
                f"{'' if model.name == profile.model else f' {model.name}'} has {wanted.get(name, 'none')}; "
                "measure this model with `epsim measure device`"
            )


def _require_wire(wire: str, profile: DeviceProfile, where: str) -> None:
    if profile.wire != wire:
        raise InputError(
            f"{where}: was measured with vectors in {profile.wire} (dispatch, combine), the scenario sends {wire}; "
            "measure with that transmission.dispatch_dtype and combine_dtype, with `epsim measure device`"
        )

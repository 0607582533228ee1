"""The YAML of a cluster: `ClusterSpec` with device types, devices, nics, switches and links.

Only single fields are checked here; what one field says of another (a link to an unknown vertex) is checked
where the cluster is built. `model_dump()` gives plain values in SI units.
"""

import math
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

from epsim.scenario.base import FlopRate, Fraction, PositiveInt, Rate, Share, Size, SizeOrZero, StrictModel, Time

_Name = Annotated[str, StringConstraints(min_length=1)]
_Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_MAX_COPIES = 65536


def _countable(each: dict[str, int]) -> dict[str, int]:
    if math.prod(each.values()) > _MAX_COPIES:
        raise ValueError(f"{each} repeats the entry {math.prod(each.values())} times; write at most {_MAX_COPIES}")
    return each


_Each = Annotated[dict[_Variable, PositiveInt], AfterValidator(_countable)]


def _has_bf16(flops: dict[str, float]) -> dict[str, float]:
    if "bf16" not in flops:
        raise ValueError(f'{sorted(flops)} lacks bf16; write e.g. "bf16: 312 TFLOP/s"')
    return flops


def _not_tiny(segment_bytes: float) -> float:
    if segment_bytes < 512:
        raise ValueError(f'{segment_bytes:g} B is below 512 B, too many segments to simulate; write e.g. "64 KiB"')
    return segment_bytes


class StagingSpec(StrictModel):
    """The copy through host memory that every message takes where the network cannot reach device memory."""

    bandwidth: Rate
    message_overhead: Time = 0.0


class MessagingSpec(StrictModel):
    """What messages take from a device's compute: before each that it sends, for each it receives, for every byte."""

    send_overhead: Time = 0.0
    send_bandwidth: Rate | None = None
    receive_overhead: Time = 0.0
    background_bandwidth: Rate | None = None


class DeviceTypeSpec(StrictModel):
    """What devices of one type have in common: data-sheet peaks, the parts of them that are reached, host overheads."""

    memory: Size
    memory_bandwidth: Rate
    flops: Annotated[dict[str, FlopRate], AfterValidator(_has_bf16)]
    compute_efficiency: Fraction = 1.0
    efficiency_exponent: Share = 0.0
    memory_efficiency: Fraction = 1.0
    memory_usable: Fraction = 1.0
    launch_overhead: Time = 0.0
    layer_overhead: Time = 0.0
    request_overhead: Time = 0.0
    expert_overhead: Time = 0.0
    barrier_slowdown: Annotated[float, Field(ge=0, le=10)] = 0.0
    transfer_overlap: Share = 1.0
    step_overhead: Time = 0.0
    messaging: MessagingSpec | None = None
    staging: StagingSpec | None = None
    profile: _Name | None = None


class VertexSpec(StrictModel):
    """Nics or switches: a name pattern and how often to fill it in."""

    name: _Name
    each: _Each = Field(default_factory=dict)


class DeviceSpec(VertexSpec):
    """Devices: a name pattern, their type, and the pattern of the node that they are in."""

    type: _Name
    node: _Name


class LinkSpec(StrictModel):
    """Links between two vertices, in both directions (`duplex`) or only from `from` to `to`."""

    name: _Name | None = None
    source: _Name = Field(alias="from")
    target: _Name = Field(alias="to")
    bandwidth: Rate
    latency: Time = 0.0
    message_overhead: Time = 0.0
    message_header: SizeOrZero = 0.0
    frame_overhead: Share = 0.0
    burst: SizeOrZero = 0.0
    ack_overhead: Share = 0.0
    duplex: bool = True
    each: _Each = Field(default_factory=dict)


class ClusterSpec(StrictModel):
    """A cluster file, or the `cluster` of a scenario written out."""

    name: _Name
    segment: Annotated[Size, AfterValidator(_not_tiny)] = 65536.0  # 64 KiB
    device_types: dict[_Name, DeviceTypeSpec] = Field(min_length=1)
    devices: list[DeviceSpec] = Field(min_length=1)
    nics: list[VertexSpec] = Field(default_factory=list)
    switches: list[VertexSpec] = Field(default_factory=list)
    links: list[LinkSpec] = Field(default_factory=list)

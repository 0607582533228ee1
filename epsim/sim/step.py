"""What goes into the simulation of one step and what comes out: `StepPlan`, `StepResult`.

A step is one prefill of a batch or one decode step. Letters: L MoE layers, C chunks, R devices (source or home, then
destination or expert device), N nodes, X links.

The parts of a device's time, in the order of `PARTS`, cover the whole step: what it computes, what it waits for.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from epsim.sim.messaging import Exchange, Gateways, MessageCosts

Floats = npt.NDArray[np.float64]
Mode = Literal["sync", "async", "two_batch"]
Connections = Literal["flow", "pair"]
Barriers = Literal["all", "own"]

# "copy": what messages take from compute, and transfers that cannot hide behind it.
COMPUTE_PARTS = ("vision", "attention", "dense_ffn", "router", "experts", "copy", "head")
PARTS = (*COMPUTE_PARTS, "dispatch", "combine", "host", "waiting")


@functools.cache
def _suffix(name: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the longest suffix that a field's name ends in."""
    return max((end for end in suffixes if name.endswith(end)), key=len, default=None)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Durations in s and messages in bytes of one step.

    vision_s_R: before the first layer. attention_s_LR, dense_ffn_s_LR (leading dense layers, counted to the MoE layer
    that follows them), router_s_LR: until a layer's dispatch. home_experts_s_LR: experts computed before the dispatch
    (tensor and data parallelism). shared_s_LR: shared experts, at the home. host_s_LR: the least time from the start of
    a layer (of the first: with the vision encoder) to the start of the next, in which the host launches it.
    pack_s_LR: making the messages that a home sends, between its router and the dispatch. reduce_s_LR: adding up what
    came back, before the next layer or the head. serve_s_LCRR[:, c, s, d]: what the arrival of chunk c of s takes d
    beside its experts, directly before them (None: nothing).
    copy_s_LR: what transfers take from the compute of a device, in mode async before its local experts, in mode
    two_batch before its front. message_costs: what each message takes; step_s_R: after the head (both None for none).
    experts_s_LR: routed experts of a device in one kernel (sync, two_batch). local_s_LR: those for its own tokens, and
    remote_s_LCRR[:, c, s, d]: those on d for chunk c of s (mode async). head_s_R: after the last layer.
    dispatch_bytes_LCRR, combine_bytes_LCRR: [.., s, d] hidden vectors from home s to device d and back; zero on the
    diagonal. With node-level dedup (`gateway_RN` given) they cross a node boundary only inside
    node_dispatch_bytes_LCRN and node_combine_bytes_LCRN, and travel between gateway and d on the far side.
    kv_bytes_LRR: KV cache from prefill home to decode home, per MoE layer (leading dense layers with the first).
    overlap_kv: each layer's KV cache leaves with the dispatch of its home; else all of it when that device is done.
    overlap_shared: shared experts are computed while the dispatch travels, not with the routed ones (in mode async they
    always are). connections: messages keep their order among those of one kind between two ranks for one home ("flow"),
    or among all from one rank to another ("pair"). barriers: in mode sync, a rank goes on when the messages of all have
    arrived ("all") or those to itself ("own"). second: in mode two_batch, the plan of the other micro-batch (its second
    is None); vision, head and KV cache are in the first.
    """

    mode: Mode
    vision_s_R: Floats
    attention_s_LR: Floats
    dense_ffn_s_LR: Floats
    router_s_LR: Floats
    home_experts_s_LR: Floats
    shared_s_LR: Floats
    host_s_LR: Floats
    copy_s_LR: Floats
    pack_s_LR: Floats
    reduce_s_LR: Floats
    experts_s_LR: Floats
    local_s_LR: Floats
    remote_s_LCRR: Floats
    head_s_R: Floats
    dispatch_bytes_LCRR: Floats
    combine_bytes_LCRR: Floats
    node_dispatch_bytes_LCRN: Floats
    node_combine_bytes_LCRN: Floats
    gateway_RN: npt.NDArray[np.int32] | None
    node_of_device_R: npt.NDArray[np.int32]
    kv_bytes_LRR: Floats
    overlap_kv: bool
    overlap_shared: bool = False
    second: "StepPlan | None" = None
    connections: Connections = "flow"
    barriers: Barriers = "all"
    message_costs: MessageCosts | None = None
    step_s_R: Floats | None = None
    serve_s_LCRR: Floats | None = None

    def __post_init__(self) -> None:
        num_layers, num_chunks, num_devices, _ = self.dispatch_bytes_LCRR.shape
        if num_layers == 0 or (self.mode != "async" and num_chunks != 1):
            raise ValueError("a step needs at least one layer, and exactly one chunk except in mode async")
        if self.second is not None and (self.mode != "two_batch" or self.second.second is not None):
            raise ValueError("only a plan in mode two_batch has a second, and that has none")
        if self.barriers == "own" and self.mode != "sync":
            raise ValueError("only a plan in mode sync has barriers")
        layers, chunks, devices = num_layers, num_chunks, num_devices
        nodes = self.node_dispatch_bytes_LCRN.shape[-1]
        shape_of = {"_s_R": (devices,), "_LR": (layers, devices), "_LRR": (layers, devices, devices)}
        shape_of |= {"_LCRR": (layers, chunks, devices, devices), "_LCRN": (layers, chunks, devices, nodes)}
        shape_of |= {"_RN": (devices, nodes), "node_of_device_R": (devices,)}
        for name, array in vars(self).items():
            suffix = _suffix(name, tuple(shape_of))
            if suffix is not None and array is not None and array.shape != shape_of[suffix]:
                raise ValueError(f"{name} has shape {array.shape}, not {shape_of[suffix]}")

    @property
    def num_layers(self) -> int:
        return int(self.dispatch_bytes_LCRR.shape[0])

    @property
    def num_devices(self) -> int:
        return int(self.dispatch_bytes_LCRR.shape[2])

    @property
    def batches(self) -> tuple["StepPlan", ...]:
        """The plans of the micro-batches: this one, and in mode two_batch the second."""
        return (self,) if self.second is None else (self, self.second)

    @property
    def hosts_s_LR(self) -> Floats:
        """What the host needs to launch a layer of all micro-batches."""
        return self.host_s_LR if self.second is None else self.host_s_LR + self.second.host_s_LR

    @property
    def front_s_LR(self) -> Floats:
        """What a device computes in a layer before its dispatch, with the results of the layer before."""
        front_s_LR = self.attention_s_LR + self.dense_ffn_s_LR + self.router_s_LR + self.home_experts_s_LR
        front_s_LR = front_s_LR + self.pack_s_LR
        front_s_LR[0] += self.vision_s_R
        return front_s_LR + self.front_copy_s_LR

    @property
    def tail_s_R(self) -> Floats:
        """What a device does after the last layer: it receives the last results, computes its head, ends the step."""
        tail_s_R = np.sum([self.head_s_R, *(batch.results_s_LR[-1] for batch in self.batches)], axis=0)
        return np.asarray(tail_s_R if self.step_s_R is None else tail_s_R + self.step_s_R)

    @property
    def front_copy_s_LR(self) -> Floats:
        """What messages take at the start of a front: the results of the layer before, and in mode two_batch copies."""
        copy_s_LR = self.copy_s_LR.copy() if self.mode == "two_batch" else np.zeros_like(self.copy_s_LR)
        copy_s_LR[1:] += self.results_s_LR[:-1]
        return copy_s_LR

    @property
    def experts_copy_s_LR(self) -> Floats:
        """What messages take before the (async: local) experts; receiving and serving, but in mode async copies."""
        if self.mode == "async":
            return self.copy_s_LR
        served_s_LR = self.served_s_LCRR.sum(axis=(1, 2))
        if not self.receive_s_R.any():
            return np.asarray(served_s_LR)
        return np.asarray(self.out.count_LRR.sum(axis=1) * self.receive_s_R + served_s_LR)

    @functools.cached_property
    def results_s_LR(self) -> Floats:
        """What a device takes to receive and add up its results of a layer; async: and to receive what it passed on."""
        if not self.receive_s_R.any():
            return self.reduce_s_LR
        count_LR = self.back.count_LRR.sum(axis=1)
        if self.mode == "async":  # all other messages are received with the kernel of their tokens
            count_LR = count_LR + self._gateways.only_passed_on_LR(
                self.dispatch_bytes_LCRR > 0, self.node_dispatch_bytes_LCRN
            )
        return np.asarray(count_LR * self.receive_s_R + self.reduce_s_LR)

    @property
    def served_s_LCRR(self) -> Floats:
        """What each arrival takes a device beside its experts, when it has been received."""
        return np.zeros_like(self.remote_s_LCRR) if self.serve_s_LCRR is None else self.serve_s_LCRR

    @property
    def receive_s_R(self) -> Floats:
        """What a device takes to receive a message."""
        return np.zeros(self.num_devices) if self.message_costs is None else self.message_costs.receive_s_R

    @property
    def _gateways(self) -> Gateways:
        return Gateways(gateway_RN=self.gateway_RN, node_of_device_R=self.node_of_device_R)

    @functools.cached_property
    def out(self) -> Exchange:
        """The messages of the dispatches."""
        sent_LCRR = self.dispatch_bytes_LCRR > 0
        return self._gateways.exchange(sent_LCRR, self.dispatch_bytes_LCRR, self.node_dispatch_bytes_LCRN)

    @functools.cached_property
    def back(self) -> Exchange:
        """The messages of the combines: one for each of the dispatch."""
        sent_LCRR = self.dispatch_bytes_LCRR > 0
        return self._gateways.exchange(sent_LCRR, self.combine_bytes_LCRR, self.node_combine_bytes_LCRN).reversed

    def via_gateway(self, source: npt.NDArray[np.intp], destination: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether the messages of these pairs go through a gateway."""
        if self.gateway_RN is None:
            return np.zeros(source.shape, dtype=bool)
        return np.asarray(self.node_of_device_R[source] != self.node_of_device_R[destination])

    @property
    def moved_bytes_LR(self) -> Floats:
        """Bytes that a device sends or receives in a layer, with KV caches that leave in it."""
        bytes_LRR = self.out.bytes_LRR + self.back.bytes_LRR + (self.kv_bytes_LRR if self.overlap_kv else 0.0)
        return np.asarray(bytes_LRR.sum(axis=1) + bytes_LRR.sum(axis=2))

    def compute_s_PR(self) -> Floats:
        """Seconds that each device computes for each of COMPUTE_PARTS, [7, R]."""
        experts_s_R = self.experts_s_LR.sum(axis=0)
        if self.mode == "async":
            experts_s_R = self.local_s_LR.sum(axis=0) + self.remote_s_LCRR.sum(axis=(0, 1, 2))
        seconds_PR = np.stack(
            [
                self.vision_s_R,
                self.attention_s_LR.sum(axis=0),
                self.dense_ffn_s_LR.sum(axis=0),
                self.router_s_LR.sum(axis=0),
                experts_s_R + self.shared_s_LR.sum(axis=0) + self.home_experts_s_LR.sum(axis=0),
                self._copy_s_R(),
                self.head_s_R,
            ]
        )
        return seconds_PR if self.second is None else seconds_PR + self.second.compute_s_PR()

    def _copy_s_R(self) -> Floats:
        """What transfers and messages take, without the KV cache that leaves when a device has ended its step."""
        copy_s_R: Floats = self.pack_s_LR.sum(axis=0) + self.reduce_s_LR.sum(axis=0)
        copy_s_R = copy_s_R + self.served_s_LCRR.sum(axis=(0, 1, 2))
        if self.mode != "sync":
            copy_s_R = copy_s_R + self.copy_s_LR.sum(axis=0)
        if self.message_costs is None:
            return copy_s_R
        count_RR = (self.out.count_LRR + self.back.count_LRR).sum(axis=0)
        copy_s_R = copy_s_R + count_RR.sum(axis=0) * self.receive_s_R
        bytes_RR = (self.out.bytes_LRR + self.back.bytes_LRR).sum(axis=0)
        if self.overlap_kv:
            count_RR = count_RR + (self.kv_bytes_LRR > 0).sum(axis=0)
            bytes_RR = bytes_RR + self.kv_bytes_LRR.sum(axis=0)
        copy_s_R += count_RR.sum(axis=1) * self.message_costs.send_s_R
        return np.asarray(copy_s_R + bytes_RR.sum(axis=1) * self.message_costs.send_s_per_byte_R)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Times in s from the start of the step.

    end_s: the last device has finished its head. kv_end_s: the last KV cache has arrived (0 when none moves).
    parts_s_PR: seconds of each of PARTS on each device; a column sums to end_s.
    link_busy_s_X, link_bytes_X: how long each link was held, and what it carried.
    delivered_bytes_RR: bytes that arrived, by the two ends of each message. contended: some message had to wait for
    another flow's on a link (None where the fidelity cannot tell).
    """

    end_s: float
    kv_end_s: float
    parts_s_PR: Floats
    link_busy_s_X: Floats
    link_bytes_X: Floats
    delivered_bytes_RR: Floats
    contended: bool | None

"""`Slice`: who did what when, for timelines, read off an executed step by `slices_of`."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from epsim.sim.engine import Execution
from epsim.sim.step import StepPlan
from epsim.sim.task_graph import Kind, Work

Track = Literal["compute", "host", "tx", "rx"]

_NAMES = {
    Work.EXPERTS: "experts",
    Work.REMOTE_EXPERTS: "experts for",
    Work.SHARED: "shared experts",
    Work.HEAD: "head",
    Work.DISPATCH: "dispatch",
    Work.FORWARD: "forward",
    Work.GATHER: "gather",
    Work.COMBINE: "combine",
    Work.KV: "KV cache",
    Work.SEND_OUT: "send",
    Work.SEND_BACK: "send",
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One piece of work on a track of a device, in s. message_id joins the tx and the rx slice of a message.

    peer: the other device of a message, or the home of remote tokens; -1 otherwise.
    """

    device: int
    track: Track
    name: str
    start_s: float
    end_s: float
    layer: int
    peer: int = -1
    num_bytes: float = 0.0
    message_id: str = ""


def slices_of(execution: Execution, phase: str, step: int, offset_s: float) -> list[Slice]:
    """Return the slices of one step that starts at offset_s."""
    kind_N = execution.graph.kind_N
    slices: list[Slice] = []
    for task in np.flatnonzero(kind_N == Kind.COMPUTE):
        slices += _compute_slices(execution, int(task), offset_s)
    for task in np.flatnonzero(kind_N == Kind.MESSAGE):
        slices += _message_slices(execution, int(task), f"{phase}-{step}-{task}", offset_s)
    return slices


def _compute_slices(execution: Execution, task: int, offset_s: float) -> list[Slice]:
    """A front is several slices, a task that takes no time none."""
    graph, run = execution.graph, execution.run
    start_s, end_s = offset_s + float(run.start_s_N[task]), offset_s + float(run.end_s_N[task])
    layer, device, work = int(graph.layer_N[task]), int(graph.source_N[task]), Work(int(graph.work_N[task]))
    if work == Work.FRONT:
        return _front_slices(execution.plan.batches[graph.batch_N[task]], layer, device, start_s)
    if not graph.duration_s_N[task]:
        return []
    origin = int(graph.origin_N[task])
    if work == Work.HOST:
        return [Slice(device=origin, track="host", name="host", start_s=start_s, end_s=end_s, layer=layer)]
    plan = execution.plan.batches[graph.batch_N[task]]
    ended_s = end_s
    if work == Work.HEAD and plan.step_s_R is not None:
        end_s -= float(plan.step_s_R[device])
    begun_s = min(end_s, start_s + _copied_s(execution.plan, work, int(graph.batch_N[task]), layer, device))
    peer = origin if work == Work.REMOTE_EXPERTS else -1
    pieces: list[tuple[Track, str, float, float]] = [
        ("compute", "copy", start_s, begun_s),
        ("compute", _NAMES[work], begun_s, end_s),
        ("host", "end of the step", end_s, ended_s),
    ]
    return [
        Slice(device=device, track=track, name=name, start_s=begin_s, end_s=until_s, layer=layer, peer=peer)
        for track, name, begin_s, until_s in pieces
        if until_s > begin_s
    ]


def _copied_s(plan: StepPlan, work: Work, batch: int, layer: int, device: int) -> float:
    """Return what messages take at the start of a task."""
    if work == Work.EXPERTS:
        return float(plan.batches[batch].experts_copy_s_LR[layer, device])
    if work == Work.REMOTE_EXPERTS:
        return float(plan.receive_s_R[device])
    if work == Work.HEAD:
        return float(sum(part.results_s_LR[-1, device] for part in plan.batches))
    return 0.0


def _message_slices(execution: Execution, task: int, message_id: str, offset_s: float) -> tuple[Slice, Slice]:
    """The message as it leaves its source and as it comes to its destination."""
    graph, run = execution.graph, execution.run
    source, destination = int(graph.source_N[task]), int(graph.destination_N[task])
    tx = Slice(
        device=source,
        track="tx",
        name=_NAMES[Work(int(graph.work_N[task]))],
        start_s=offset_s + float(run.start_s_N[task]),
        end_s=offset_s + float(run.sent_s_N[task]),
        layer=int(graph.layer_N[task]),
        peer=destination,
        num_bytes=float(graph.bytes_N[task]),
        message_id=message_id,
    )
    arrival = offset_s + float(run.incoming_s_N[task]), offset_s + float(run.end_s_N[task])
    return tx, replace(tx, device=destination, track="rx", peer=source, start_s=arrival[0], end_s=arrival[1])


def _front_slices(plan: StepPlan, layer: int, device: int, start_s: float) -> list[Slice]:
    slices = []
    parts = [
        ("copy", plan.front_copy_s_LR[layer, device]),
        ("vision", plan.vision_s_R[device] if layer == 0 else 0.0),
        ("attention", plan.attention_s_LR[layer, device]),
        ("dense FFN", plan.dense_ffn_s_LR[layer, device]),
        ("router", plan.router_s_LR[layer, device]),
        ("experts", plan.home_experts_s_LR[layer, device]),
        ("pack", plan.pack_s_LR[layer, device]),
    ]
    for name, duration_s in parts:
        if duration_s > 0:
            end_s = start_s + float(duration_s)
            slices.append(Slice(device=device, track="compute", name=name, start_s=start_s, end_s=end_s, layer=layer))
            start_s = end_s
    return slices

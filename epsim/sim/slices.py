"""`Slice`: who did what when, for timelines, read off an executed step by `slices_of`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from epsim.sim.engine import Execution
from epsim.sim.graph import Kind, Work

Track = Literal["compute", "tx", "rx"]

_NAMES = {
    Work.EXPERTS: "experts",
    Work.REMOTE_EXPERTS: "experts for",
    Work.HEAD: "head",
    Work.DISPATCH: "dispatch",
    Work.FORWARD: "forward",
    Work.GATHER: "gather",
    Work.COMBINE: "combine",
    Work.KV: "KV cache",
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
    graph, run = execution.graph, execution.run
    slices: list[Slice] = []
    for task in np.flatnonzero(graph.kind_N == Kind.COMPUTE):
        start_s = offset_s + float(run.start_s_N[task])
        layer, device, work = (
            int(graph.layer_N[task]),
            int(graph.source_N[task]),
            Work(int(graph.work_N[task])),
        )
        if work == Work.FRONT:
            slices += _front_slices(execution, layer, device, start_s)
        elif graph.duration_s_N[task] > 0:
            peer = int(graph.origin_N[task]) if work == Work.REMOTE_EXPERTS else -1
            end_s = offset_s + float(run.end_s_N[task])
            slices.append(
                Slice(
                    device=device,
                    track="compute",
                    name=_NAMES[work],
                    start_s=start_s,
                    end_s=end_s,
                    layer=layer,
                    peer=peer,
                )
            )
    for task in np.flatnonzero(graph.kind_N == Kind.MESSAGE):
        source, destination = int(graph.source_N[task]), int(graph.destination_N[task])
        name, message_id = _NAMES[Work(int(graph.work_N[task]))], f"{phase}-{step}-{task}"
        for device, peer, track, begin, end in (
            (source, destination, "tx", run.start_s_N[task], run.sent_s_N[task]),
            (destination, source, "rx", run.incoming_s_N[task], run.end_s_N[task]),
        ):
            slices.append(
                Slice(
                    device=device, track="tx" if track == "tx" else "rx", name=name, start_s=offset_s + float(begin),
                    end_s=offset_s + float(end), layer=int(graph.layer_N[task]), peer=peer,
                    num_bytes=float(graph.bytes_N[task]), message_id=message_id,
                )
            )  # fmt: skip
    return slices


def _front_slices(execution: Execution, layer: int, device: int, start_s: float) -> list[Slice]:
    plan, slices = execution.plan, []
    parts = [
        ("vision", plan.vision_s_R[device] if layer == 0 else 0.0),
        ("attention", plan.attention_s_LR[layer, device]),
        ("dense FFN", plan.dense_ffn_s_LR[layer, device]),
        ("router", plan.router_s_LR[layer, device]),
    ]
    for name, duration_s in parts:
        if duration_s > 0:
            end_s = start_s + float(duration_s)
            slices.append(Slice(device=device, track="compute", name=name, start_s=start_s, end_s=end_s, layer=layer))
            start_s = end_s
    return slices

"""A small trace of prompts with and without images, and a scenario of its shape: `mixed_trace`, `write_question`."""

from pathlib import Path
from typing import Any

import numpy as np

from epsim.trace import RoutingTrace, TraceMeta
from epsim.trace.file import TraceWriter

NUM_EXPERTS, TOPK = 8, 2
SCENARIO = """\
name: small
model: olmoe
cluster: {cluster}
trace: {{kind: uniform}}
homes: {{policy: {homes}}}
transmission: {{mode: async, dedup: {dedup}}}
workload: {{batch_sizes: [1, 2]}}
overrides:
  model.num_layers: 2
  model.moe.num_experts: 8
  model.moe.topk: 2
  model.vision.image_size: 28 # 4 tokens
"""


def mixed_trace(num_image: int = 6, num_text: int = 4, *, seed: int = 0, **changes: Any) -> RoutingTrace:
    """Return requests 10, 11, ..: first those of 4 vision, 2 text and 2 decode tokens, then of 3 text and 1 decode.

    Vision tokens go to the first half of the experts, others to the second, but for one expert in four.
    """
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, int]] = []  # request, position, step, modality
    for request in range(num_image + num_text):
        vision, text, decode = (4, 2, 2) if request < num_image else (0, 3, 1)
        rows += [(10 + request, at, 0, int(at < vision)) for at in range(vision + text)]
        rows += [(10 + request, vision + text + step, step + 1, 0) for step in range(decode)]
    request_T, position_T, step_T, modality_T = np.array(rows).T
    scores_TLE = rng.random((len(rows), 2, NUM_EXPERTS))
    is_own_TE = (np.arange(NUM_EXPERTS) < NUM_EXPERTS // 2) == (modality_T[:, None] == 1)
    ids_TLE = np.argsort(-(scores_TLE + 0.4 * is_own_TE[:, None]), axis=2)
    fields: dict[str, Any] = {
        "meta": TraceMeta(
            model="small",
            layer_ids=(0, 1),
            num_experts=NUM_EXPERTS,
            topk=TOPK,
            origin="captured",
            description="drawn",
        ),
        "request_id_T": request_T.astype(np.int32),
        "position_T": position_T.astype(np.int32),
        "step_T": step_T.astype(np.int32),
        "phase_T": (step_T > 0).astype(np.uint8),
        "modality_T": modality_T.astype(np.uint8),
        "topk_expert_ids_TLK": ids_TLE[:, :, :TOPK].astype(np.uint8),
    }
    return RoutingTrace(**{**fields, **changes})


def write_question(
    folder: Path, trace: RoutingTrace, *, cluster: str = "orin-2x-10gbe", homes: str = "balanced", dedup: str = "device"
) -> tuple[Path, Path]:
    """Write trace.arrow and small.yaml; return their paths."""
    path, scenario = folder / "trace.arrow", folder / "small.yaml"
    with TraceWriter(path, trace.meta) as writer:
        writer.write(trace)
    scenario.write_text(SCENARIO.format(cluster=cluster, homes=homes, dedup=dedup))
    return path, scenario

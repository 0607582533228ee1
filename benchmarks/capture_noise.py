"""Do chunks, batch sizes and scores change what is recorded? The share of (token, layer) pairs with other experts.

    python benchmarks/capture_noise.py [--device cuda --full --backbones olmoe]

The same requests with images are captured five times: whole prefill in batches of 8 (what the others are compared
with), in chunks of 100 columns, one request at a time, with the attention score in the model's attention call, and
whole again. Sums in another order differ in the last bits, and where two experts are closer than that, the pick flips;
the layers after it then see another input. Prefill only: a flip can change the next token, and with it all that is
decoded. Weights are random: trained routers are mostly further from ties.
"""

import argparse
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from epsim.capture.command import capture_trace
from epsim.capture.models.backbones import BACKBONES
from epsim.capture.models.source import ModelSource
from epsim.capture.options import CaptureOptions, RequestSource
from epsim.console import count_requests
from epsim.trace.file import TraceFile
from epsim.trace.routing import RoutingTrace

RUNS = {
    "chunks of 100": {"chunk_size": 100},
    "batch 1": {"batch_size": 1},
    "scores": {"scores": ("attention",)},
    "again": {},
}


def capture(options: CaptureOptions, folder: Path) -> RoutingTrace:
    """Return all rows of a capture, by request."""
    path = folder / "t.arrow"
    capture_trace(options, path, count=count_requests, say=lambda line: None)
    trace = TraceFile.open(path)
    return trace.select(trace.requests.request_id_Q)


def share_of_other_picks(one: RoutingTrace, other: RoutingTrace) -> float:
    """Return the share of (token, layer) pairs whose sets of experts differ."""
    sets = [np.sort(trace.topk_expert_ids_TLK, axis=2) for trace in (one, other)]
    return float((sets[0] != sets[1]).any(axis=2).mean())


def main() -> None:
    """Print a row per backbone and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--full", action="store_true", help="full size; else reduced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--requests", type=int, default=8)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {arguments.requests} requests; differing picks in %")
    print(f"{'backbone':14}{'dtype':10}" + "".join(f"{name:>16}" for name in RUNS))
    for backbone in arguments.backbones:
        for dtype in arguments.dtypes:
            base = CaptureOptions(
                model=ModelSource(
                    random_init=backbone, reduced=not arguments.full, dtype=dtype, device=arguments.device
                ),
                requests=RequestSource(builtin="digits", num_requests=arguments.requests),
                max_new_tokens=1,
            )
            with tempfile.TemporaryDirectory() as folder:
                whole = capture(base, Path(folder))
                shares = [
                    share_of_other_picks(whole, capture(replace(base, **change), Path(folder)))
                    for change in RUNS.values()
                ]
            print(f"{backbone:14}{dtype:10}" + "".join(f"{100 * share:16.4f}" for share in shares))


if __name__ == "__main__":
    main()

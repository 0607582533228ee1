"""Peak memory and time of indexing and reading a large trace file in small groups of requests.

Writes a synthetic trace of OLMoE's shape (16 layers, 64 experts, top-8) to a temporary directory and reads
it in a process of its own:

    python benchmarks/trace_memory.py --tokens 10000000 [--compression zstd] [--interleaved]
"""

import argparse
import dataclasses
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from epsim.trace import concatenate
from epsim.trace.file import TraceFile, TraceWriter
from epsim.trace.synthetic import OLMOE_SHAPE, SyntheticWorkload, uniform

TOKENS_PER_REQUEST = 1000
REQUESTS_PER_SELECT = 32


def write(path: Path, num_tokens: int, *, compression: str | None, interleaved: bool) -> None:
    """Write `num_tokens` tokens: one random group of requests, again and again under new request ids."""
    workload = SyntheticWorkload(num_requests=64, num_vision_tokens=576, num_text_tokens=324, num_decode_tokens=100)
    group = concatenate(list(uniform(OLMOE_SHAPE, workload, seed=0)))
    if interleaved:
        group = group.take(np.lexsort((group.position_T, group.request_id_T, group.step_T)))
    num_requests = max(num_tokens // TOKENS_PER_REQUEST, 1)
    with TraceWriter(path, group.meta, compression=compression) as writer:
        for first in range(0, num_requests, 64):
            kept = np.flatnonzero(group.request_id_T < num_requests - first)
            request_id_T = group.request_id_T + np.int32(first)
            writer.write(dataclasses.replace(group, request_id_T=request_id_T).take(kept))


def read(path: Path) -> None:
    """Index and read the whole trace through `select`, and print what it took."""
    baseline_bytes = peak_bytes()
    start_s = time.perf_counter()
    trace = TraceFile.open(path)
    request_ids = trace.requests.request_id_Q
    index_s = time.perf_counter() - start_s
    index_bytes = peak_bytes()
    num_rows = sum(
        trace.select(request_ids[i : i + REQUESTS_PER_SELECT]).num_tokens
        for i in range(0, len(request_ids), REQUESTS_PER_SELECT)
    )
    read_s = time.perf_counter() - start_s - index_s
    print(f"tokens {num_rows}, requests {len(request_ids)}, file {path.stat().st_size / 1e6:.0f} MB")
    print(f"index {index_s:.2f} s, read {read_s:.2f} s")
    print(
        f"peak resident memory {peak_bytes() / 1e6:.0f} MB (after import {baseline_bytes / 1e6:.0f} MB, "
        f"after indexing {index_bytes / 1e6:.0f} MB)"
    )


def peak_bytes() -> float:
    """Return the peak resident memory of this program.

    `ru_maxrss` of a child starts at what its parent had before `exec`, so Linux's VmHWM is taken instead.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found:
            return float(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)


def main() -> None:
    """Write the trace, then read it in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--compression", choices=["zstd"])
    parser.add_argument("--interleaved", action="store_true", help="decode steps of 64 requests interleaved")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.read)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.arrow"
        write(path, arguments.tokens, compression=arguments.compression, interleaved=arguments.interleaved)
        subprocess.run([sys.executable, __file__, "--read", str(path)], check=True)


if __name__ == "__main__":
    main()

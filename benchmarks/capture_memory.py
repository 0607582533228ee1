"""Host memory of streaming a capture to its file: passes of random picks, as a model on a device would leave them.

    python benchmarks/capture_memory.py --tokens 1000000

Prints the tokens per second and the peak resident memory above that of the process before the first pass, which is
what tracing takes beside the model. Passes alternate between a prefill of 32 prompts of 715 tokens and 15 decode steps.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from epsim.capture.stream import PassRecord, TraceStream
from epsim.trace.meta import Phase, TraceMeta
from epsim.trace.writer import TraceWriter

NUM_REQUESTS, NUM_PROMPT_TOKENS, NUM_STEPS = 32, 715, 15
SCORES = ("attention", "gaussian", "gmm2", "gmm4")


def record(meta: TraceMeta, first_id: int, step: int, generator: torch.Generator) -> PassRecord:
    """Return a prefill (step 0) or a decode step of `NUM_REQUESTS` requests with random picks, weights and scores."""
    num_columns = 1 if step else NUM_PROMPT_TOKENS
    size = (NUM_REQUESTS, num_columns)
    keys = torch.rand(meta.num_layers, *size, meta.num_experts, generator=generator)
    positions = torch.arange(num_columns).expand(size) + (NUM_PROMPT_TOKENS + step - 1 if step else 0)
    arrays = {
        "is_token": torch.ones(size, dtype=torch.bool),
        "is_text": positions >= 576,
        "token_ids": torch.ones(size, dtype=torch.int64),
        "positions": positions,
        "picks": keys.topk(meta.topk).indices.to(torch.uint8),
        "weights": keys[..., : meta.topk].half(),
    }
    arrays |= {f"score_{name}": torch.rand(*size, meta.num_layers, generator=generator).half() for name in SCORES}
    return PassRecord(
        request_ids_B=np.arange(first_id, first_id + NUM_REQUESTS, dtype=np.int32),
        phase=Phase.DECODE if step else Phase.PREFILL,
        step=step,
        ends_prefill=not step,
        arrays=arrays,
    )


def forget_peak() -> int:
    """Let the peak of this process's resident memory begin anew, and return it, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the largest resident size of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Stream `--tokens` tokens of an OLMoE-shaped model with four scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    num_tokens = parser.parse_args().tokens
    meta = TraceMeta(
        layer_ids=tuple(range(16)), num_experts=64, topk=8, model="", origin="captured", description="random", mock=True
    )
    generator = torch.Generator().manual_seed(0)
    passes = [record(meta, 0, step, generator) for step in range(NUM_STEPS + 1)]  # made once: only streaming counts
    start_bytes = forget_peak()
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "t.arrow", time.perf_counter()
        with TraceWriter(path, meta) as writer, TraceStream(writer) as stream:
            first_id, sent = 0, 0
            while sent < num_tokens:
                for each in passes:
                    ids = np.arange(first_id, first_id + NUM_REQUESTS, dtype=np.int32)
                    stream.put(PassRecord(**{**vars(each), "request_ids_B": ids}))
                    sent += each.arrays["is_token"].numel()
                first_id += NUM_REQUESTS
        seconds, size = time.perf_counter() - start, path.stat().st_size
    print(f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{stream.num_tokens} tokens, file {size / 1e6:.0f} MB, {stream.num_tokens / seconds:.0f} tokens/s")
    more = peak_bytes() - start_bytes
    print(f"resident memory {start_bytes / 1e6:.0f} MB before, at most {more / 1e6:.0f} MB more")


if __name__ == "__main__":
    main()

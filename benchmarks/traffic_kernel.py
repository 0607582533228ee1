"""Throughput of the traffic kernel: routed expert ids per second, beside what the memory of the machine delivers.

Run: python benchmarks/traffic_kernel.py [--devices 16] [--tokens 1000000]
"""

import argparse
import os
import statistics
import time

import numpy as np

from epsim.placement import PlacementProblem
from epsim.placement.policies import Random
from epsim.traffic import TrafficCounter

SHAPES = {"OLMoE": (16, 64, 8), "Qwen3": (48, 128, 8)}
REPEATS = 9


def median_s(work: object, repeats: int = REPEATS) -> float:
    """Return the median wall time of calling `work`, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--ids", type=int, default=128_000_000, help="routed expert ids")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{os.cpu_count()} CPUs, {args.devices} devices in 2 nodes, random placement, median of {REPEATS}")
    for name, (layers, experts, topk) in SHAPES.items():
        tokens = args.ids // (layers * topk)
        sample = np.argsort(rng.random((4096, layers, experts), dtype=np.float32), axis=2)[:, :, :topk]
        ids_TLK = np.ascontiguousarray(sample.astype(np.uint8)[np.arange(tokens) % len(sample)])
        home_T = np.sort(rng.integers(0, args.devices, tokens)).astype(np.int32)
        node_R = (np.arange(args.devices) * 2 // args.devices).astype(np.int32)
        problem = PlacementProblem(
            num_layers=layers,
            num_experts=experts,
            node_of_device_R=node_R,
            expert_load_MLE=np.ones((2, layers, experts), np.int64),
        )
        counter = TrafficCounter(Random(seed=0).place(problem))
        kernel_s = median_s(lambda counter=counter, ids=ids_TLK, home=home_T: counter.count(ids, home))
        words = ids_TLK.reshape(-1).view(np.uint64)
        read_s = median_s(lambda words=words: words.sum())
        print(
            f"{name:6} {ids_TLK.size / kernel_s / 1e9:.2f}e9 ids/s (device and node dedup); "
            f"one core sums the same bytes at {ids_TLK.nbytes / read_s / 1e9:.1f} GB/s, "
            f"the kernel takes {ids_TLK.nbytes / kernel_s / 1e9:.2f} GB/s: {100 * read_s / kernel_s:.0f} % of that"
        )


if __name__ == "__main__":
    main()

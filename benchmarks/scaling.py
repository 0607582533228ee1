"""Time of a whole simulation, both fidelities: 2 nodes x 8 GPUs, Qwen3, batch 32; then by tokens and by steps.

Run: python benchmarks/scaling.py [--plot docs/images/scaling.png]
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

from epsim.run import simulate
from epsim.scenario import check_scenario

REPEATS = 3


def scenario(fidelity: str, mode: str, dedup: str, prompt: int, decode: int) -> Any:
    """Return the spec: 576 of the prompt's tokens are vision tokens, where it has that many."""
    vision = min(576, prompt - 1)
    return check_scenario(
        {
            "name": "scaling",
            "model": "qwen3-moe",
            "cluster": "h100-2x8",
            "trace": {
                "kind": "uniform",
                "vision_tokens": vision,
                "text_tokens": prompt - vision,
                "output_tokens": decode + 1,
            },
            "transmission": {"mode": mode, "dedup": dedup},
            "workload": {"batch_sizes": [32]},
            "simulation": {"fidelity": fidelity, "timeline_decode_steps": 0},
        }
    )


def median_s(spec: Any) -> float:
    """Return the median time of simulating; drawing the trace is done once before and does not count."""
    simulate(spec)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        simulate(spec)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, median of {REPEATS}, s; 2 nodes x 8 GPUs, Qwen3, batch 32")
    print("842-token prompts, 256 decode steps")
    for mode, dedup in (("sync", "device"), ("async", "device"), ("async", "node")):
        event_s, analytic_s = (median_s(scenario(f, mode, dedup, 842, 256)) for f in ("event", "analytic"))
        print(f"  {mode:5} dedup {dedup:6} event {event_s:6.2f}  analytic {analytic_s:5.2f}", flush=True)
    print("the three engines, 64-token prompts, 4 decode steps, async dedup device")
    times = {f: median_s(scenario(f, "async", "device", 64, 4)) for f in ("simpy", "event", "analytic")}
    print("  " + "  ".join(f"{name} {seconds:.3f}" for name, seconds in times.items()), flush=True)
    sweeps: dict[str, list[tuple[int, float, float]]] = {"prompt tokens": [], "decode steps": []}
    for prompt in (421, 842, 1684, 3368):
        pair = [median_s(scenario(f, "async", "device", prompt, 1)) for f in ("event", "analytic")]
        sweeps["prompt tokens"].append((prompt, *pair))
    for decode in (32, 64, 128, 256):
        pair = [median_s(scenario(f, "async", "device", 64, decode)) for f in ("event", "analytic")]
        sweeps["decode steps"].append((decode, *pair))
    for name, rows in sweeps.items():
        print(name)
        for count, event_s, analytic_s in rows:
            print(f"  {count:5d} event {event_s:6.2f}  analytic {analytic_s:5.2f}")
    if args.plot:
        plot(sweeps, args.plot)


def plot(sweeps: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Draw time against tokens and steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (name, rows) in zip(axes, sweeps.items(), strict=True):
        counts, event, analytic = zip(*rows, strict=True)
        axis.plot(counts, event, "o-", label="event")
        axis.plot(counts, analytic, "s--", label="analytic")
        axis.set(xlabel=f"{name} per request", ylabel="simulation time (s)", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("2 nodes × 8 GPUs, Qwen3 (48 layers, 128 experts, top-8), batch 32, async, device dedup")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

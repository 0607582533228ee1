"""What contention does: event engine and closed form on the shipped clusters (the table of docs/simulator.md).

Run: python benchmarks/contention.py
"""

from typing import Any

from epsim.run import simulate
from epsim.scenario import check_scenario

CLUSTERS = {"orin-2x-10gbe": "olmoe", "h200-1x8": "olmoe", "a800-2x8": "qwen3-moe", "h100-2x8": "qwen3-moe"}


def run(cluster: str, model: str, mode: str, dedup: str, fidelity: str) -> dict[str, Any]:
    """Return the figures of batch 32 with balanced homes and uniform routing."""
    spec = {
        "name": "contention",
        "model": model,
        "cluster": cluster,
        "trace": {"kind": "uniform", "vision_tokens": 576, "text_tokens": 266, "output_tokens": 9},
        "transmission": {"mode": mode, "num_chunks": 2, "dedup": dedup},
        "workload": {"batch_sizes": [32]},
        "simulation": {"fidelity": fidelity, "timeline_decode_steps": 0},
    }
    return dict(simulate(check_scenario(spec)).results["batch_sizes"][0])


def main() -> None:
    print("| cluster | mode | dedup | TTFT event | closed form | | TPOT event | closed form | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cluster, model in CLUSTERS.items():
        for mode in ("sync", "async", "two_batch"):
            for dedup in ("device", "node"):
                event, analytic = (run(cluster, model, mode, dedup, f) for f in ("event", "analytic"))
                cells = [cluster, mode, dedup]
                for metric in ("ttft_s", "tpot_s"):
                    exact, closed = event[metric]["mean"], analytic[metric]["mean"]
                    cells += [f"{1e3 * exact:.3f} ms", f"{1e3 * closed:.3f} ms", f"{100 * (closed / exact - 1):+.1f} %"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

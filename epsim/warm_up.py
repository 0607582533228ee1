"""`python -m epsim.warm_up`: compile the numba kernels into their cache, so that the first real run need not."""

import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from epsim.run import simulate
from epsim.scenario import check_scenario

MODES = ("sync", "async", "two_batch")
PLACEMENTS: tuple[dict[str, Any], ...] = (
    {"policy": "replicated"},
    {"policy": "token_migration"},
    {"policy": "eplb_global"},
)


def warm_up() -> None:
    """Run a tiny scenario through every kernel: first what all runs share, then the rest on all cores."""
    _run("sync", {"policy": "coactivation"})
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = [pool.submit(_run, mode, {"policy": "predicted_time", "max_evaluations": 1}) for mode in MODES]
        done += [pool.submit(_run, "sync", placement) for placement in PLACEMENTS]
        for each in done:
            each.result()


def _run(mode: str, placement: dict[str, Any]) -> None:
    for fidelity in ("event", "analytic"):
        simulate(
            check_scenario(
                {
                    "name": "warm-up",
                    "model": "olmoe",
                    "cluster": "orin-2x-10gbe",
                    "trace": {"kind": "uniform", "vision_tokens": 1, "text_tokens": 1, "output_tokens": 2},
                    "placement": placement,
                    "transmission": {"mode": mode},
                    "workload": {"batch_sizes": [2]},
                    "simulation": {"fidelity": fidelity},
                }
            )
        )


if __name__ == "__main__":
    print("compiling kernels (once) ...", flush=True)
    warm_up()

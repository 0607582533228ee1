"""`python -m epsim.warm_up`: compile the numba kernels into their cache, so that the first real run need not."""

from epsim.run import simulate
from epsim.scenario import check_scenario


def warm_up() -> None:
    """Run a tiny scenario through every kernel."""
    for fidelity in ("event", "analytic"):
        for mode in ("sync", "async", "two_batch"):
            simulate(
                check_scenario(
                    {
                        "name": "warm-up",
                        "model": "olmoe",
                        "cluster": "orin-2x-10gbe",
                        "trace": {"kind": "uniform", "vision_tokens": 1, "text_tokens": 1, "output_tokens": 2},
                        "placement": {"policy": "predicted_time", "max_evaluations": 1},
                        "transmission": {"mode": mode},
                        "workload": {"batch_sizes": [2]},
                        "simulation": {"fidelity": fidelity},
                    }
                )
            )


if __name__ == "__main__":
    print("compiling kernels (once) ...", flush=True)
    warm_up()

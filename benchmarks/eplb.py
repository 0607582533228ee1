"""The policies `eplb_hierarchical` and `eplb_global` beside the public algorithm: time, and how even devices become.

Get eplb.py from https://github.com/deepseek-ai/EPLB; it needs torch.
Run: python benchmarks/eplb.py --public eplb.py [--repeats 9]
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from epsim.metrics import balancedness
from epsim.placement import POLICIES, Placement, PlacementProblem

LAYERS, EXPERTS, REDUNDANT, GROUPS, NODES, DEVICES = 61, 256, 64, 8, 4, 32
FIELDS = {"eplb_hierarchical": {"num_groups": GROUPS}, "eplb_global": {}}
PUBLIC_GROUPS = {
    "eplb_hierarchical": GROUPS,
    "eplb_global": 1,
}  # groups that the nodes do not divide: its global policy


def load_public(path: Path) -> ModuleType:
    """Return the public algorithm, a module from a file anywhere."""
    spec = importlib.util.spec_from_file_location("public_eplb", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_loads(rng: np.random.Generator) -> dict[str, npt.NDArray[np.int64]]:
    """Return tokens per expert, [layers, experts], of two kinds."""
    uneven = rng.permuted(np.tile(1e6 / np.arange(1, EXPERTS + 1), (LAYERS, 1)), axis=1)
    return {"random": rng.integers(1, 100_000, (LAYERS, EXPERTS)), "zipf": rng.poisson(uneven)}


def evenness(load_LE: npt.NDArray[np.int64], p2l_LP: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.float64], float]:
    """Return the load of the fullest device of each layer, and balancedness (vLLM's form)."""
    layers = np.arange(LAYERS)[:, None]
    copies_LE = np.zeros((LAYERS, EXPERTS))
    np.add.at(copies_LE, (layers, p2l_LP), 1)
    load_LR = (load_LE / copies_LE)[layers, p2l_LP].reshape(LAYERS, DEVICES, -1).sum(axis=2)
    found = balancedness([load_LR])
    assert found is not None
    return load_LR.max(axis=1), found["ratio_of_sums"]


def times_ms(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the wall times of calling `work`, after one call that does not count."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--public", type=Path, required=True, help="the public eplb.py")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    public = load_public(args.public)
    print(
        f"{LAYERS} layers, {EXPERTS} + {REDUNDANT} experts, {GROUPS} groups, {NODES} nodes, {DEVICES} devices; "
        f"{os.cpu_count()} CPUs, torch {torch.__version__} with {torch.get_num_threads()} threads, "
        f"medians of {args.repeats} (fastest - slowest)"
    )
    for name, load_LE in make_loads(np.random.default_rng(0)).items():
        problem = PlacementProblem(
            num_layers=LAYERS,
            num_experts=EXPERTS,
            node_of_device_R=np.repeat(np.arange(NODES, dtype=np.int32), DEVICES // NODES),
            expert_load_MLE=np.stack([load_LE, np.zeros_like(load_LE)]),
        )
        weight = torch.from_numpy(load_LE)
        for kind, fields in FIELDS.items():
            policy = POLICIES[kind](redundant_experts=REDUNDANT, **fields)
            shape = (EXPERTS + REDUNDANT, PUBLIC_GROUPS[kind], NODES, DEVICES)

            def ours(policy: object = policy, problem: PlacementProblem = problem) -> Placement:
                return policy.place(problem)  # type: ignore[attr-defined]

            def theirs(weight: torch.Tensor = weight, shape: tuple[int, ...] = shape) -> npt.NDArray[np.int64]:
                return public.rebalance_experts(weight, *shape)[0].numpy()

            ours_ms, theirs_ms = times_ms(ours, args.repeats), times_ms(theirs, args.repeats)
            p2l_LP, public_LP = ours().physical_to_logical_LP, theirs()
            (fullest_L, even), (public_L, public_even) = (evenness(load_LE, p2l) for p2l in (p2l_LP, public_LP))
            print(
                f"{name:6} {kind:17} {_spread(ours_ms)}, public {_spread(theirs_ms)}, "
                f"ratio {statistics.median(theirs_ms) / statistics.median(ours_ms):.0f}; "
                f"balancedness {even:.6f}, public {public_even:.6f}; "
                f"layers with the same map {(p2l_LP == public_LP).all(axis=1).sum()} of {LAYERS}, "
                f"fullest device off by {np.abs(fullest_L / public_L - 1).max():.1e} at most"
            )


def _spread(values_ms: list[float]) -> str:
    return f"{statistics.median(values_ms):.2f} ms ({min(values_ms):.2f} - {max(values_ms):.2f})"


if __name__ == "__main__":
    main()

"""The policy `coactivation` beside mt-kahypar on the same hypergraph, and the bound below both.

Tokens choose top-6 of 64 experts, 79 % of the choices from two of eight hidden groups; eight devices. Every device's
experts are counted (mean devices per token), homes are not. mt-kahypar (`pip install mtkahypar`) runs in a process of
its own, on two threads, with as many experts in each block; its connectivity metric is this objective less 1.

Run: python benchmarks/coactivation.py [--partitioner-python .../bin/python] [--repeats 5] [--seed 0] [--scale]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from epsim.placement import POLICIES, FitTokens, PlacementProblem, TransferObjective
from epsim.placement.bounds import gap, transfer_bound_L
from epsim.trace import RoutingTrace, TraceMeta

TOKENS, EXPERTS, TOPK, DEVICES, GROUPS, INSIDE = 2000, 64, 6, 8, 8, 0.79

PARTITIONER = """
import json, sys, time
import mtkahypar
asked = json.load(open(sys.argv[1]))
system = mtkahypar.initialize(2)
context = system.context_from_preset(getattr(mtkahypar.PresetType, asked["preset"]))
context.set_partitioning_parameters(asked["blocks"], asked["epsilon"], mtkahypar.Objective.KM1)
mtkahypar.set_seed(asked["seed"])
context.logging = False
graph = system.create_hypergraph(context, asked["experts"], len(asked["edges"]), asked["edges"])
began = time.perf_counter()
parts = graph.partition(context)
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "blocks": [parts.block_id(e) for e in range(asked["experts"])]}))
"""


def make_ids(rng: np.random.Generator, num_tokens: int, num_experts: int, topk: int) -> npt.NDArray[np.uint8]:
    """Return the experts of each token, [tokens, top-k]: most from two hidden groups, some experts more popular."""
    group_E = rng.permutation(num_experts) % GROUPS
    popular_E = np.sqrt(rng.exponential(size=num_experts))
    own_TG = np.argsort(rng.random((num_tokens, GROUPS)), axis=1) < 2
    inside_TE = own_TG[:, group_E]
    share = 2 / GROUPS
    weight_TE = np.where(inside_TE, INSIDE / share, (1 - INSIDE) / (1 - share)) * popular_E
    scores_TE = np.log(weight_TE) + rng.gumbel(size=weight_TE.shape)
    return np.argsort(-scores_TE, axis=1)[:, :topk].astype(np.uint8)


def devices_per_token(ids_TK: npt.NDArray[np.integer], device_E: npt.NDArray[np.integer]) -> float:
    """Return the mean number of devices that hold an expert of a token."""
    return float(np.mean([len(set(row)) for row in device_E[ids_TK].tolist()]))


def spectral_bound(ids_TK: npt.NDArray[np.integer], num_experts: int, num_devices: int) -> float:
    """Return the bound of Donath and Hoffman on mean devices per token, the eigenvalues of the graph as they are."""
    topk = ids_TK.shape[1]
    chosen_TE = np.zeros((len(ids_TK), num_experts))
    chosen_TE[np.arange(len(ids_TK))[:, None], ids_TK] = 1
    graph_EE = chosen_TE.T @ chosen_TE
    np.fill_diagonal(graph_EE, 0)
    values_E = np.linalg.eigvalsh(np.diag(graph_EE.sum(axis=1)) - graph_EE)
    cut = num_experts / num_devices / 2 * values_E[:num_devices].sum() / len(ids_TK)
    sizes = [np.bincount(np.arange(topk) % x) for x in range(1, topk + 1)]
    most_cut = [(topk**2 - float((size**2).sum())) / 2 for size in sizes]
    return 1 + float(np.interp(cut, most_cut, np.arange(topk)))


def make_problem(ids_TLK: npt.NDArray[np.uint8], num_experts: int, num_devices: int) -> PlacementProblem:
    """Return the problem of placing for these tokens on devices that are all alike."""
    num_tokens, num_layers, topk = ids_TLK.shape
    zeros_T = np.zeros(num_tokens, np.uint8)
    load_LE = np.stack(
        [np.bincount(ids_TLK[:, layer].reshape(-1), minlength=num_experts) for layer in range(num_layers)]
    )
    trace = RoutingTrace(
        meta=TraceMeta(
            layer_ids=tuple(range(num_layers)), num_experts=num_experts, topk=topk,
            model="", origin="synthetic", description="hidden groups",
        ),
        request_id_T=np.arange(num_tokens, dtype=np.int32), position_T=np.zeros(num_tokens, np.int32),
        step_T=np.zeros(num_tokens, np.int32), phase_T=zeros_T, modality_T=zeros_T, topk_expert_ids_TLK=ids_TLK,
    )  # fmt: skip
    return PlacementProblem(
        num_layers=num_layers,
        num_experts=num_experts,
        node_of_device_R=np.zeros(num_devices, np.int32),
        expert_load_MLE=np.stack([load_LE, np.zeros_like(load_LE)]),
        trace=trace,
    )


@dataclass
class Found:
    name: str
    devices: list[float]
    seconds: list[float]


def place_by_epsim(problem: PlacementProblem, ids_TK: npt.NDArray[np.uint8], repeats: int) -> Found:
    found = Found("epsim coactivation", [], [])
    POLICIES["coactivation"]().place(problem)  # loads the compiled kernels
    for seed in range(repeats):
        policy = POLICIES["coactivation"](seed=seed)  # type: ignore[call-arg]
        began = time.perf_counter()
        placement = policy.place(problem)
        found.seconds.append(time.perf_counter() - began)
        found.devices.append(devices_per_token(ids_TK, placement.device_of_expert_RLE[0, 0]))
    return found


def place_by_partitioner(python: Path, ids_TK: npt.NDArray[np.uint8], repeats: int) -> Iterator[Found]:
    for preset in ("DEFAULT", "QUALITY", "HIGHEST_QUALITY"):
        found = Found(f"mt-kahypar {preset.lower()}", [], [])
        for seed in range(repeats):
            asked = {
                "preset": preset, "blocks": DEVICES, "epsilon": 0.001, "seed": seed,
                "experts": EXPERTS, "edges": ids_TK.tolist(),
            }  # fmt: skip
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                json.dump(asked, file)
                file.flush()
                done = subprocess.run([str(python), "-c", PARTITIONER, file.name], capture_output=True, text=True)
            if done.returncode:
                print(
                    f"{found.name}, seed {seed}: exit code {done.returncode}: {done.stderr.strip()[-200:]}",
                    file=sys.stderr,
                )
                continue
            answer = json.loads(done.stdout.splitlines()[-1])
            blocks_E = np.array(answer["blocks"])
            sizes = np.bincount(blocks_E, minlength=DEVICES)
            if (sizes != EXPERTS // DEVICES).any():
                print(f"{found.name}, seed {seed}: blocks of {sizes.tolist()} experts", file=sys.stderr)
                continue
            found.seconds.append(answer["seconds"])
            found.devices.append(devices_per_token(ids_TK, blocks_E))
        yield found


def compare(python: Path | None, seed: int, repeats: int) -> None:
    ids_TK = make_ids(np.random.default_rng(seed), TOKENS, EXPERTS, TOPK)
    problem = make_problem(ids_TK[:, None], EXPERTS, DEVICES)
    contiguous = devices_per_token(ids_TK, np.arange(EXPERTS) * DEVICES // EXPERTS)
    print(f"{TOKENS} tokens, top-{TOPK} of {EXPERTS} experts, {DEVICES} devices; contiguous: {contiguous:.4f}")
    rows = [place_by_epsim(problem, ids_TK, repeats)]
    rows += [] if python is None else list(place_by_partitioner(python, ids_TK, repeats))
    print("| | devices per token: best, median | median time | times as long as epsim |\n|---|---|---|---|")
    for row in rows:
        if row.seconds:
            seconds, median = statistics.median(row.seconds), statistics.median(row.devices)
            ratio = seconds / statistics.median(rows[0].seconds)
            print(f"| {row.name} | {min(row.devices):.4f}, {median:.4f} | {1e3 * seconds:.1f} ms | {ratio:.1f} |")
    best = min(rows[0].devices)
    tokens, remote = FitTokens.of(problem.require_trace("")), 1 - 1 / DEVICES
    print("| lower bound | devices per token | gap to the best of epsim | time |\n|---|---|---|---|")
    spectral = spectral_bound(ids_TK, EXPERTS, DEVICES)
    print(f"| spectral | {spectral:.4f} | {100 * (gap(best, spectral) or 0):.1f} % | |")
    for num_iterations in (20, 100, 400):
        began = time.perf_counter()
        bound = transfer_bound_L(
            TransferObjective.uniform(problem.node_of_device_R), tokens,
            num_experts=EXPERTS, slots_per_device=EXPERTS // DEVICES, num_iterations=num_iterations,
        )[0] / remote  # fmt: skip
        print(
            f"| minorants, {num_iterations} iterations | {bound:.4f} | {100 * (gap(best, bound) or 0):.1f} % | "
            f"{time.perf_counter() - began:.2f} s |"
        )


def scale(seed: int) -> None:
    num_layers, num_experts, num_devices, topk, num_tokens = 48, 128, 16, 8, 1_000_000
    ids_TLK = np.empty((num_tokens, num_layers, topk), np.uint8)
    for layer in range(num_layers):  # 20 000 different tokens a layer, drawn again and again
        rng = np.random.default_rng([seed, layer])
        ids_TLK[:, layer] = make_ids(rng, 20_000, num_experts, topk)[rng.integers(0, 20_000, num_tokens)]
    problem = make_problem(ids_TLK, num_experts, num_devices)
    place_by_epsim(make_problem(ids_TLK[:1000, :1], num_experts, num_devices), ids_TLK[:1000, 0], 1)
    began = time.perf_counter()
    POLICIES["coactivation"]().place(problem)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{num_experts} experts x {num_layers} layers x {num_devices} devices x {num_tokens} tokens:", end=" ")
    print(f"{seconds:.1f} s, {peak:.2f} GiB at most, the trace included")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--partitioner-python", type=Path, help="a Python that has mtkahypar; default: without it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", action="store_true", help="the large case instead")
    options = parser.parse_args()
    if options.scale:
        scale(options.seed)
    else:
        compare(options.partitioner_python, options.seed, options.repeats)

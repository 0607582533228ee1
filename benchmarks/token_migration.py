"""What tokens send when they go home after every layer, and when they stay where their first expert was.

The tables of docs/token-migration.md: the six traces in traces/, placements fitted to every second request and judged
by the others, on 2 and 8 devices, with all experts of each token and with its primary expert alone.

Run from the repository's root: python benchmarks/token_migration.py
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from epsim.migration import ModeBytes, bytes_by_mode, least_exchange_s_L
from epsim.model import ModelCard
from epsim.placement import PlacementPolicy, PlacementProblem, balanced
from epsim.placement.policies import Contiguous, ModalityBins
from epsim.placement.token_migration import TokenMigration
from epsim.run import model_and_cluster
from epsim.scenario import load_scenario
from epsim.trace import RoutingTrace
from epsim.trace.file import TraceFile
from epsim.trace.primary import primary_first
from epsim.trace.statistics import expert_load
from epsim.traffic import MessageFormat

SCENARIO = Path("scenarios/digits.yaml")
CLUSTERS = {2: "orin-2x-10gbe", 8: "h200-1x8"}
POLICIES: tuple[PlacementPolicy, ...] = (Contiguous(), ModalityBins(), TokenMigration())


def halves(path: Path, topk: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Return the requests with even and with odd numbers, with the `topk` first experts of each token."""
    trace = TraceFile.open(path)
    ids = trace.requests.request_id_Q
    parts = []
    for own in (ids[::2], ids[1::2]):
        rows = trace.select(own)
        ids_TLK = np.ascontiguousarray(primary_first(rows)[..., :topk])
        meta = replace(rows.meta, topk=topk)
        parts.append(replace(rows, meta=meta, topk_expert_ids_TLK=ids_TLK, gate_weights_TLK=None))
    return parts[0], parts[1]


def problem(trace: RoutingTrace, num_devices: int) -> PlacementProblem:
    return PlacementProblem(
        num_layers=trace.meta.num_layers,
        num_experts=trace.meta.num_experts,
        node_of_device_R=np.zeros(num_devices, np.int32),
        expert_load_MLE=expert_load(trace),
        trace=trace,
    )


def results(card: ModelCard, topk: int) -> Iterator[tuple[str, int, list[ModeBytes]]]:
    """Yield trace, devices, and the bytes under each policy."""
    form = MessageFormat.of(card.hidden_size, "bf16", "bf16")
    for path in sorted(Path("traces").glob("*.arrow")):
        fit, judge = halves(path, topk)
        for num_devices in CLUSTERS:
            placements = [policy.place(problem(fit, num_devices)) for policy in POLICIES]
            homes = balanced(num_devices)
            sent = [bytes_by_mode(judge, placement, homes, card, form) for placement in placements]
            yield path.stem, num_devices, sent


def kb(sent: ModeBytes, name: str) -> float:
    return sent.per_token(getattr(sent, name)) / 1e3


def least_us(sent: ModeBytes, num_devices: int, *names: str) -> float:
    """Return the least time of exchanges one after the other, in µs per prefill token."""
    cluster = model_and_cluster(load_scenario(SCENARIO, [f"cluster={CLUSTERS[num_devices]}"]))[1]
    seconds = sum(float(least_exchange_s_L(getattr(sent, name)[0], cluster).sum()) for name in names)
    return 1e6 * seconds / int(sent.num_tokens_F[0])


def main() -> None:
    card = model_and_cluster(load_scenario(SCENARIO))[0]
    latent = model_and_cluster(load_scenario(SCENARIO, ["model=moonlight"]))[0].attention
    small = replace(card, attention=latent)
    for noun, model in ((f"{card.name}'s attention", card), ("Moonlight's (latent) attention", small)):
        for num_devices in CLUSTERS:
            size = (num_devices - 1) * card.num_layers * model.kv_bytes_per_token
            print(f"Coherence with {noun}, {num_devices} devices: {size / 1e3:.1f} kB per token")
    for topk in (card.topk, 1):
        print(f"\nkB per token, {topk} expert{'s' * (topk > 1)} per token and layer, coherence not counted\n")
        heads = [f"{policy.kind}: {mode}" for policy in POLICIES for mode in ("home", "migrate")]
        print("| trace | devices | " + " | ".join(heads) + " |")
        print("|---|---|" + "---|" * len(heads))
        times = []
        for name, num_devices, each in results(card, topk):
            cells = [kb(sent, mode) for sent in each for mode in ("home_FLRR", "vectors_FLRR")]
            print(f"| {name} | {num_devices} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
            bounds = (
                least_us(each[-1], num_devices, "home_dispatch_FLRR", "home_combine_FLRR"),
                least_us(each[-1], num_devices, "migrate_dispatch_FLRR", "migrate_combine_FLRR"),
                least_us(each[-1], num_devices, "coherence_FLRR"),
            )
            times.append(f"| {name} | {CLUSTERS[num_devices]} | " + " | ".join(f"{t:.3f}" for t in bounds) + " |")
        print("\nLeast time of all exchanges under token_migration, µs per prefill token (lower bounds)\n")
        print("| trace | cluster | home | migrate | coherence |\n|---|---|---|---|---|")
        print("\n".join(times))


if __name__ == "__main__":
    main()

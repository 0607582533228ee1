"""Slow, readable figures of one MoE layer: dictionaries and loops over tokens, float64. Each is a paper's formula."""

import math
from collections.abc import Sequence
from typing import Any

from epsim.trace import RoutingTrace

Token = tuple[int, list[int], list[float]]  # modality, experts, gate weights


def tokens_of(trace: RoutingTrace, layer: int) -> list[Token]:
    """Return the tokens of a trace with gate weights, in one layer (an index)."""
    assert trace.gate_weights_TLK is not None
    return [
        (int(modality), ids.tolist(), [float(w) for w in weights])
        for modality, ids, weights in zip(
            trace.modality_T, trace.topk_expert_ids_TLK[:, layer], trace.gate_weights_TLK[:, layer], strict=True
        )
    ]


def chosen(tokens: Sequence[Token], modality: int, expert: int) -> int:
    return sum(m == modality and expert in ids for m, ids, _ in tokens)


def share(tokens: Sequence[Token], modality: int, expert: int) -> float:
    return chosen(tokens, modality, expert) / sum(len(ids) for m, ids, _ in tokens if m == modality)


def affiliation(tokens: Sequence[Token], expert: int) -> float | None:
    """SMoES eq. 18 for text; None for an expert that was never chosen."""
    text, vision = share(tokens, 0, expert), share(tokens, 1, expert)
    return text / (text + vision) if text + vision else None


def msi(tokens: Sequence[Token], num_experts: int) -> float:
    """SMoES eq. 19 for one layer."""
    found = [affiliation(tokens, e) for e in range(num_experts)]
    return sum(2 * abs(a - 0.5) for a in found if a is not None) / num_experts


def mrd(tokens: Sequence[Token], modality: int, num_experts: int) -> list[float]:
    """SMAR eq. 5 to 9."""
    own = [(ids, weights) for m, ids, weights in tokens if m == modality]
    masses = []
    for e in range(num_experts):
        frequency = sum(e in ids for ids, _ in own) / (len(own[0][0]) * len(own))
        weight = sum(weights[ids.index(e)] / sum(weights) for ids, weights in own if e in ids) / len(own)
        masses.append(frequency * weight)
    return [mass / sum(masses) for mass in masses]


def kl(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(p * math.log(p / q) if q else math.inf for p, q in zip(first, second, strict=True) if p)


def entropy_bits(p: Sequence[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x)


def jensen_shannon(first: Sequence[float], second: Sequence[float]) -> float:
    """Entropy of the middle less the mean entropy, in bits: not the form that epsim computes."""
    middle = [(p + q) / 2 for p, q in zip(first, second, strict=True)]
    return entropy_bits(middle) - (entropy_bits(first) + entropy_bits(second)) / 2


def transfer(trace: RoutingTrace, device: Any, homes: dict[tuple[int, int], int]) -> dict[str, list[float]]:
    """Shares of remote (pairs, visits) by phase and modality; device [L, E], homes by (request, phase)."""
    counts: dict[tuple[int, int], list[int]] = {}
    for t in range(trace.num_tokens):
        phase, modality = int(trace.phase_T[t]), int(trace.modality_T[t])
        home = homes[int(trace.request_id_T[t]), phase]
        for layer, ids in enumerate(trace.topk_expert_ids_TLK[t]):
            remote = sum(int(device[layer][e]) != home for e in ids)
            own = counts.setdefault((phase, modality), [0, 0, 0, 0])
            for at, n in enumerate((remote, len(ids), remote > 0, 1)):
                own[at] += int(n)
    prefill = [a + b for a, b in zip(counts[0, 0], counts[0, 1], strict=True)]
    rows = {"prefill_vision": counts[0, 1], "prefill_text": counts[0, 0], "prefill_all": prefill}
    rows["decode_text"] = counts[1, 0]
    return {name: [row[0] / row[1], row[2] / row[3]] for name, row in rows.items()}

"""The losses of SMoES and SMAR in float64 NumPy: loops that read like the equations, with nothing made fast.

Shapes: L MoE layers, B samples, S columns, E experts, K top-k, M modalities (0 text, 1 vision), N bins, C experts of a
bin. `Routing` is a pass; `tokens` of it are pairs (i, j): sample and column, without padding.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TEXT, VISION = 0, 1
SMOOTHING = 1e-6


@dataclass
class Routing:
    gate_LBSE: np.ndarray
    picks_LBSK: np.ndarray
    is_text_BS: np.ndarray
    is_token_BS: np.ndarray

    @property
    def num_layers(self) -> int:
        return self.gate_LBSE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.gate_LBSE.shape[3]

    @property
    def topk(self) -> int:
        return self.picks_LBSK.shape[3]

    def tokens(self, modality: int | None = None) -> list[tuple[int, int]]:
        return [
            (int(i), int(j))
            for i, j in np.argwhere(self.is_token_BS)
            if modality is None or (TEXT if self.is_text_BS[i, j] else VISION) == modality
        ]

    def picked(self, layer: int, token: tuple[int, int]) -> set[int]:
        return {int(e) for e in self.picks_LBSK[(layer, *token)]}

    def gate(self, layer: int, token: tuple[int, int], expert: int) -> float:
        return float(self.gate_LBSE[(layer, *token, expert)])


def picks(routing: Routing, layer: int, modality: int, expert: int) -> int:
    """C of SMoES eq. 10."""
    return sum(expert in routing.picked(layer, token) for token in routing.tokens(modality))


def bins_after(routings: Sequence[Routing], num_bins: int, decay: float) -> list[list[list[int]]]:
    """SMoES eq. 10 and 11: the experts of each bin of each layer."""
    found = []
    for layer in range(routings[0].num_layers):
        bias = []
        for e in range(routings[0].num_experts):
            mean = {TEXT: 0.0, VISION: 0.0}
            for routing in routings:
                for m in mean:
                    mean[m] = decay * mean[m] + (1 - decay) * picks(routing, layer, m, e)
            total = mean[TEXT] + mean[VISION]
            bias.append((mean[TEXT] / total if total else 0.5, e))
        experts = [e for _, e in sorted(bias)]
        size = len(experts) // num_bins
        found.append([experts[size * k : size * (k + 1)] for k in range(num_bins)])
    return found


def mean_gate(routing: Routing, layer: int, i: int, experts: Iterable[int], score_LBS: np.ndarray, m: int) -> float:
    """S-bar of SMoES eq. 12."""
    experts = list(experts)
    above = below = 0.0
    for token in routing.tokens():
        if token[0] == i:
            score = float(score_LBS[(layer, *token)])
            share = score if m == TEXT else 1 - score
            above += sum(share * routing.gate(layer, token, e) for e in experts)
            below += share
    return above / (len(experts) * below) if below else 0.0


def joint(
    routing: Routing, layer: int, i: int, bins: Sequence[Sequence[int]], score_LBS: np.ndarray
) -> list[list[float]]:
    """P_i(m, B_k) of SMoES eq. 13."""
    mass = [[mean_gate(routing, layer, i, experts, score_LBS, m) for experts in bins] for m in (TEXT, VISION)]
    total = sum(map(sum, mass))
    return [[value / total for value in row] for row in mass]


def information(p: Sequence[Sequence[float]]) -> float:
    """SMoES eq. 14, of one sample in one layer."""
    of_modality = [sum(row) for row in p]
    of_bin = [sum(column) for column in zip(*p, strict=True)]
    return sum(
        p[m][k] * math.log(p[m][k] / (of_modality[m] * of_bin[k]))
        for m in range(len(p))
        for k in range(len(p[m]))
        if p[m][k] > 0
    )


def information_loss(routing: Routing, experts_LNC: np.ndarray, score_LBS: np.ndarray, counts_B: np.ndarray) -> float:
    """SMoES eq. 15."""
    return -_sum_of_means(routing, experts_LNC, score_LBS, counts_B, information)


def divergence_loss(routing: Routing, experts_LNC: np.ndarray, score_LBS: np.ndarray, counts_B: np.ndarray) -> float:
    """The inter-bin KL, as we read it."""

    def divergence(p: Sequence[Sequence[float]]) -> float:
        return symmetric_kl(*([value / sum(row) for value in row] for row in p))

    return -_sum_of_means(routing, experts_LNC, score_LBS, counts_B, divergence)


def _sum_of_means(routing, experts_LNC, score_LBS, counts_B, of_joint) -> float:
    samples = np.flatnonzero(counts_B)
    return sum(
        of_joint(joint(routing, layer, int(i), experts_LNC[layer].tolist(), score_LBS)) / len(samples)
        for layer in range(routing.num_layers)
        for i in samples
    )


def balance_loss(routing: Routing) -> float:
    """SMoES eq. 1."""
    every = range(routing.num_experts)
    return sum(
        routing.num_experts * _sum_f_p(routing, layer, every, routing.tokens()) for layer in range(routing.num_layers)
    )


def bin_balance_loss(routing: Routing, experts_LNC: np.ndarray) -> float:
    """SMoES eq. 16; tokens in a bin are those that picked one of its experts."""
    loss = 0.0
    for layer in range(routing.num_layers):
        for experts in experts_LNC[layer].tolist():
            tokens = [token for token in routing.tokens() if routing.picked(layer, token) & set(experts)]
            loss += len(experts) * _sum_f_p(routing, layer, experts, tokens)
    return loss


def _sum_f_p(routing: Routing, layer: int, experts: Iterable[int], tokens: Sequence[tuple[int, int]]) -> float:
    total = 0.0
    for e in experts if tokens else ():
        frequency = sum(e in routing.picked(layer, token) for token in tokens) / len(tokens)
        total += frequency * sum(routing.gate(layer, token, e) for token in tokens) / len(tokens)
    return total


def weight(routing: Routing, layer: int, token: tuple[int, int], expert: int) -> float:
    """SMAR eq. 5."""
    picked = routing.picked(layer, token)
    if expert not in picked:
        return 0.0
    return routing.gate(layer, token, expert) / sum(routing.gate(layer, token, e) for e in picked)


def routing_distribution(routing: Routing, layer: int, modality: int) -> list[float]:
    """SMAR eq. 6 to 9."""
    tokens = routing.tokens(modality)
    mass = []
    for e in range(routing.num_experts):
        frequency = sum(e in routing.picked(layer, token) for token in tokens) / (routing.topk * len(tokens))
        mean_weight = sum(weight(routing, layer, token, e) for token in tokens) / len(tokens)
        mass.append(frequency * mean_weight)
    return [value / sum(mass) for value in mass]


def routing_distance(routing: Routing, layer: int) -> float:
    """SMAR eq. 10, smoothed."""
    return symmetric_kl(*(routing_distribution(routing, layer, m) for m in (VISION, TEXT)))


def symmetric_kl(first: Sequence[float], second: Sequence[float]) -> float:
    """SMAR eq. 10 to 12 of two distributions that get a little mass everywhere."""
    a, b = ([(q + SMOOTHING) / (1 + len(row) * SMOOTHING) for q in row] for row in (first, second))
    there = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    back = sum(y * math.log(y / x) for x, y in zip(a, b, strict=True))
    return (there + back) / 2


def band_loss(distances: Iterable[float], lowest: float, highest: float) -> float:
    """SMAR eq. 13, summed over layers."""
    return sum(lowest - d if d < lowest else d - highest if d > highest else 0.0 for d in distances)

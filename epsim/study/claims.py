"""Sentences of docs/specialise.md that follow from figures: each is a function of a `Summary`."""

from collections.abc import Mapping
from itertools import combinations
from math import hypot
from statistics import fmean

from epsim.study.methods import IN_TABLE_S10, published_specialisation
from epsim.study.published import WAYS, transfer_changes
from epsim.study.summary import Run, Summary, msi, ratio

KINDS = ("image", "text")
MANY_ERRORS = 2.0


def listed(words: list[str]) -> str:
    """Return "a, b and c"; "none" of nothing."""
    if len(words) < 2:
        return "".join(words) or "none"
    return f"{', '.join(words[:-1])} and {words[-1]}"


def above_soft(summary: Summary) -> str:
    """Return which methods specialise more than soft routing."""
    means = _mean_msi(summary)
    others = [method for method in means if method != summary.baseline]
    lower = [f"`{method}`" for method in others if means[method] <= means.get(summary.baseline, float("nan"))]
    if not others or summary.baseline not in means:
        return ""
    if not lower:
        return f"Each of the {len(others)} other methods has a higher MSI than soft routing."
    higher = f"{len(others) - len(lower)} of the {len(others)} other methods"
    return f"{higher} have a higher MSI than soft routing; not so: {listed(lower)}."


def order_of_methods(summary: Summary) -> str:
    """Return how many pairs of methods stand in the paper's order by MSI."""
    means, paper = _mean_msi(summary), published_specialisation()
    known = [(means[name], row.msi) for name, row in paper.items() if name in means and row.msi is not None]
    pairs = [(a, b) for a, b in combinations(known, 2) if a[1] != b[1]]
    if not pairs:
        return ""
    same = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    return (
        f"Of the {len(pairs)} pairs of methods that the paper's MSI tells apart, {same} stand in the same order here "
        f"({100 * same / len(pairs):.0f} %; half of them would by chance)."
    )


def _mean_msi(summary: Summary) -> dict[str, float]:
    found = {method: summary.over_seeds(method, msi) for method in summary.methods}
    return {method: estimate.mean for method, estimate in found.items() if estimate is not None}


def infinite_distances(summary: Summary) -> str:
    """Return where the MRD distance is infinite without smoothing."""
    some = [
        f"`{method}`" for method in summary.methods if any(run["num_one_sided_experts"] for run in summary.runs(method))
    ]
    if not some:
        return "No expert is used by one modality alone, so the distance is finite without smoothing too."
    return (
        f"Without smoothing the distance is infinite where some expert is used by one modality alone: {listed(some)}."
    )


def accuracy_differences(summary: Summary) -> str:
    """Return how many differences to soft routing go beyond what the number of test prompts allows.

    All models answer the same prompts: equal ones differ by no more than two independent samples of prompts would.
    """
    far, number = [], 0
    for method in summary.methods:
        for kind in KINDS:
            distance = _distance(summary, method, kind) if method != summary.baseline else None
            if distance is not None:
                number += 1
                if abs(distance) > MANY_ERRORS:
                    far.append(f"`{method}`, {kind} ({distance:+.1f})")
    if not number:
        return ""
    return (
        f"Of {number} differences to soft routing, {len(far)} exceed {MANY_ERRORS:g} standard errors of the prompts "
        f"(at most one in twenty would by chance, if all models answered every prompt with the same probability; other "
        f"seeds move accuracies too, which ± shows)" + (f": {'; '.join(far)} standard errors." if far else ".")
    )


def _distance(summary: Summary, method: str, kind: str) -> float | None:
    """Return the difference of mean accuracies in standard errors of the prompts; None where there is none."""
    mine, base = (_accuracy(summary, name, kind) for name in (method, summary.baseline))
    if mine is None or base is None or not (error := hypot(mine[1], base[1])):
        return None
    return (mine[0] - base[0]) / error


def _accuracy(summary: Summary, method: str, kind: str) -> tuple[float, float] | None:
    """Return the mean over seeds, and its standard error were the prompts of every seed others."""
    found = _accuracies(summary, method, kind)
    if not found:
        return None
    mean = fmean(one["accuracy"] for one in found)
    return mean, hypot(*(one["standard_error"] for one in found)) / len(found)


def prompt_error(summary: Summary, method: str, kind: str) -> float | None:
    """Return the standard error of an accuracy that the number of prompts alone makes, mean over seeds.

    More seeds do not bring it down: the prompts are the same for all.
    """
    found = [one["standard_error"] for one in _accuracies(summary, method, kind)]
    return fmean(found) if found else None


def _accuracies(summary: Summary, method: str, kind: str) -> list[Mapping[str, float]]:
    """Return accuracy and standard error of the runs that have them."""
    return [run["accuracy"][kind] for run in summary.runs(method) if run["accuracy"][kind]["accuracy"] is not None]


def placement_alone(summary: Summary) -> str:
    """Return what modality bins do to soft routing, which no loss made for them, beside the trained methods."""
    cell = ("without_dedup", "prefill_vision")
    found = [
        f"`{method}`, {placement.replace('_', ' ')}: {100 * estimate.mean:.1f} %"
        for method in IN_TABLE_S10
        for placement in (("contiguous", "modality_bins") if method == summary.baseline else ("modality_bins",))
        if (estimate := summary.over_seeds(method, ratio(placement, *cell))) is not None
    ]
    return f"What placement does alone, and what training adds, in remote pairs of vision tokens: {'; '.join(found)}."


def transfer_signs(summary: Summary) -> str:
    """Return in how many cells the change against the baseline goes the way of all five benchmarks."""
    same = number = 0
    against = []
    for method, name in IN_TABLE_S10.items():
        if method == summary.baseline or method not in summary.methods:
            continue
        for cell, changes in transfer_changes(name).items():
            if min(changes) < 0 < max(changes):
                continue
            ours = summary.against_baseline(method, ratio("modality_bins", *cell), ratio("contiguous", *cell))
            if ours is None:
                continue
            number += 1
            agrees = ours.mean * sum(changes) > 0
            same += agrees
            if not agrees:
                against.append(
                    f"{name} {cell[1].replace('_', ' ')} {cell[0].replace('_', ' ')} ({100 * ours.mean:+.0f} %)"
                )
    if not number:
        return ""
    return f"Where all five benchmarks of the paper change the same way, so do {same} of {number} cells here" + (
        f"; not so: {'; '.join(against)}." if against else "."
    )


def uneven_devices(summary: Summary) -> str:
    """Return how far from half the load of a device is."""
    shares = []
    for method in summary.methods:
        found = summary.over_seeds(method, _larger_share)
        if found is not None:
            shares.append((found.mean, method))
    if not shares:
        return ""
    (low, even), (high, uneven) = min(shares), max(shares)
    return (
        f"With modality bins the busier of the two devices serves from {100 * low:.0f} % (`{even}`) to "
        f"{100 * high:.0f} % (`{uneven}`) of all routed pairs."
    )


def _larger_share(run: Run) -> float | None:
    share_R = run["placements"]["modality_bins"]["device_share"]["all"]
    return None if share_R is None else float(max(share_R))


def transfer_cells() -> list[tuple[str, str]]:
    """Return the columns of table S10 in its order."""
    return [cell for way in WAYS for cell in transfer_changes("attention-soft") if cell[0] == way]

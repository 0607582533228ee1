"""The uncalibrated Orin preset beside SMoES table S11 (MMMU): the table of docs/simulator.md.

Run from the repository's root: python benchmarks/s11_presets.py
"""

from pathlib import Path

from epsim.run import simulate
from epsim.scenario import load_scenario

# TTFT and TPOT in s by batch size: Bo et al., SMoES (CVPR 2026), supplement, table S11, MMMU.
PUBLISHED = {
    "baseline": {1: (2.810, 0.786), 8: (7.949, 1.414), 32: (17.626, 2.552)},
    "attention-soft": {1: (2.519, 0.703), 8: (6.203, 1.287), 32: (13.638, 2.309)},
}


def preset_times(method: str) -> dict[int, tuple[float, float]]:
    """Return mean TTFT and TPOT by batch size as the shipped scenario predicts them."""
    results = simulate(load_scenario(Path(f"scenarios/s10/mmmu-{method}.yaml"))).results
    return {b["batch_size"]: (b["ttft_s"]["mean"], b["tpot_s"]["mean"]) for b in results["batch_sizes"]}


def main() -> None:
    preset = {method: preset_times(method) for method in PUBLISHED}
    print("| batch | method | TTFT published | preset | TPOT published | preset |")
    print("|---|---|---|---|---|---|")
    for size in PUBLISHED["baseline"]:
        changes = [
            100 * (source["attention-soft"][size][metric] / source["baseline"][size][metric] - 1)
            for metric in (0, 1)
            for source in (PUBLISHED, preset)
        ]
        for method in PUBLISHED:
            pairs = zip(PUBLISHED[method][size], preset[method][size], strict=True)
            print(f"| {size} | {method} | " + " | ".join(f"{a:.3f} s | {b:.3f} s" for a, b in pairs) + " |")
        print(f"| {size} | difference | " + " | ".join(f"{change:+.1f} %" for change in changes) + " |")


if __name__ == "__main__":
    main()

"""Published routing statistics: table S10 of SMoES as `TransferRatios`; its benchmarks and methods.

Source: Bo et al., "SMoES", CVPR 2026, arXiv 2604.23996, supplement, table S10: "Cross-GPU EP transfer ratio
at prefill and decode stages for OLMoE", two devices, percent. P is prefill, D decode, V vision tokens, T text
tokens.
"""

from dataclasses import dataclass

from epsim.errors import TraceError


@dataclass(frozen=True, kw_only=True)
class TransferRatios:
    """Shares of what crosses to the other of two devices: prefill vision, prefill text, decode text tokens.

    Attributes:
        pairs_frac: "without DeDup": of the (token, expert) pairs, those whose expert is remote. P_V, P_T,
        D_T.
        tokens_frac: "with DeDup": of the tokens, those with at least one remote expert. P_V, P_T, D_T.
        pairs_vt_frac: `pairs_frac` over all prefill tokens, as printed.
        tokens_vt_frac: `tokens_frac` over all prefill tokens, as printed.
    """

    pairs_frac: tuple[float, float, float]
    tokens_frac: tuple[float, float, float]
    pairs_vt_frac: float
    tokens_vt_frac: float


# Percent of the tokens of a benchmark that are prefill vision, prefill text, decode text.
TOKEN_MIX_PERCENT = {
    "MMMU": (79, 19, 2),
    "SQA-IMG": (65, 30, 5),
    "POPE": (86, 11, 3),
    "GQA": (86, 11, 3),
    "TextVQA": (80, 17, 3),
}
BENCHMARKS = tuple(TOKEN_MIX_PERCENT)
METHODS = ("baseline", "attention-soft", "gaussian-soft")

# Without DeDup P_V, P_T, P_V+T, D_T, then with DeDup P_V, P_T, P_V+T, D_T.
_PERCENT = {
    ("MMMU", "baseline"): (42.7, 70.4, 48.0, 37.4, 97.7, 99.5, 98.0, 86.5),
    ("MMMU", "attention-soft"): (8.8, 71.7, 20.7, 34.3, 33.6, 98.9, 46.1, 88.9),
    ("MMMU", "gaussian-soft"): (3.3, 76.7, 17.3, 16.0, 15.0, 99.3, 31.1, 43.3),
    ("SQA-IMG", "baseline"): (42.5, 74.1, 52.6, 49.0, 97.5, 99.7, 98.2, 94.9),
    ("SQA-IMG", "attention-soft"): (8.4, 76.3, 30.1, 41.7, 33.2, 99.3, 54.3, 90.0),
    ("SQA-IMG", "gaussian-soft"): (2.7, 80.3, 27.5, 17.7, 13.0, 99.2, 40.6, 49.9),
    ("POPE", "baseline"): (42.9, 85.7, 47.8, 37.7, 97.8, 100.0, 98.1, 87.8),
    ("POPE", "attention-soft"): (8.0, 88.2, 17.1, 31.4, 33.4, 99.9, 41.0, 84.4),
    ("POPE", "gaussian-soft"): (1.8, 91.5, 12.0, 14.5, 9.0, 99.8, 19.4, 40.8),
    ("GQA", "baseline"): (43.0, 85.5, 47.9, 38.3, 97.9, 100.0, 98.1, 89.2),
    ("GQA", "attention-soft"): (8.2, 87.7, 17.4, 32.1, 34.0, 99.9, 41.7, 84.8),
    ("GQA", "gaussian-soft"): (1.9, 90.9, 12.2, 16.2, 9.3, 99.8, 19.8, 42.4),
    ("TextVQA", "baseline"): (43.6, 72.5, 48.6, 43.1, 97.9, 99.1, 98.1, 90.7),
    ("TextVQA", "attention-soft"): (8.9, 72.0, 19.9, 34.5, 35.8, 97.1, 46.5, 82.6),
    ("TextVQA", "gaussian-soft"): (2.6, 77.2, 15.6, 21.0, 12.6, 97.5, 27.4, 47.1),
}


def transfer_ratios(benchmark: str, method: str) -> TransferRatios:
    """Return the row of table S10; raises TraceError for a benchmark or method that it does not have."""
    for name, value, known in (("benchmark", benchmark, BENCHMARKS), ("method", method, METHODS)):
        if value not in known:
            raise TraceError(f'{name}: "{value}" is not in table S10; write one of {", ".join(known)}')
    percent = _PERCENT[benchmark, method]
    pairs, tokens = ([value / 100 for value in percent[i : i + 4]] for i in (0, 4))
    return TransferRatios(
        pairs_frac=(pairs[0], pairs[1], pairs[3]),
        tokens_frac=(tokens[0], tokens[1], tokens[3]),
        pairs_vt_frac=pairs[2],
        tokens_vt_frac=tokens[2],
    )

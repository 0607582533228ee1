"""How far experts specialise by modality, from counts: MSI (SMoES), MRD distance (SMAR), Jensen-Shannon divergence.

Pure functions of small float64 arrays; `epsim.trace.routing_counts` makes the counts. With a modality missing they
return NaN. Letters: M modality (text, vision), L MoE layers, E experts.
"""

import numpy as np
import numpy.typing as npt

from epsim.trace.meta import Modality

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
TEXT, VISION = int(Modality.TEXT), int(Modality.VISION)
KL_SMOOTHING = 1e-6


def load_distribution(load_MLE: Counts) -> Floats:
    """Return the share of each expert in a modality's routed pairs, [M, L, E]: rows add up to 1, NaN without pairs."""
    return _normalised(load_MLE.astype(np.float64))


def text_affiliation(load_MLE: Counts) -> Floats:
    """Return the probability [L, E] that an expert belongs to text (SMoES eq. 18).

    The share of the expert in the text tokens' routed pairs, over that plus its share in the vision tokens'. NaN for an
    expert that no token chose, and everywhere if a modality is missing.
    """
    share_MLE = load_distribution(load_MLE)
    total_LE = share_MLE.sum(axis=0)
    return _ratio(share_MLE[TEXT], total_LE)


def specialization_score(load_MLE: Counts) -> Floats:
    """Return 2 * text affiliation - 1, [L, E]: -1 only vision, 0 both alike, 1 only text; NaN as the affiliation.

    The "symmetric expansion of MSI" of SMoES figures S5 to S9.
    """
    return 2 * text_affiliation(load_MLE) - 1


def specialization_index(load_MLE: Counts) -> Floats:
    """Return the MSI of each layer, [L] (SMoES eq. 19): the mean over experts of |specialization score|, 0 to 1.

    An expert that no token chose counts as 0, for the equation leaves it open. NaN if a modality is missing.
    """
    score_LE = np.abs(specialization_score(load_MLE))
    msi_L: Floats = np.nansum(score_LE, axis=1) / score_LE.shape[1]
    return np.where(np.isnan(score_LE).all(axis=1), np.nan, msi_L)


def modality_routing_distribution(load_MLE: Counts, gate_mass_MLE: Floats) -> Floats:
    """Return the MRD of each modality, [M, L, E], a row adds up to 1 (SMAR eq. 6 to 9); NaN for a missing modality.

    gate_mass_MLE: sum over a modality's tokens of the gate weight, normalised within the top-k (eq. 5). The mass of an
    expert is Q = F R, frequency times mean weight; their denominators, equal for all experts, cancel in eq. 8.
    """
    return _normalised(load_distribution(load_MLE) * _normalised(gate_mass_MLE))


def symmetric_kl(first_LE: Floats, second_LE: Floats) -> Floats:
    """Return half the sum of both Kullback-Leibler divergences of two distributions, [L], in nats (SMAR eq. 10 to 12).

    Infinite where some expert has mass in one of the two alone.
    """
    return np.maximum(0.5 * (_kl(first_LE, second_LE) + _kl(second_LE, first_LE)), 0.0)  # rounding


def smoothed(distribution_LE: Floats, epsilon: float = KL_SMOOTHING) -> Floats:
    """Return (q + epsilon) / (1 + E epsilon), the distribution with a little mass on every expert."""
    return np.asarray((distribution_LE + epsilon) / (1 + distribution_LE.shape[-1] * epsilon))


def jensen_shannon(first_LE: Floats, second_LE: Floats) -> Floats:
    """Return the Jensen-Shannon divergence of two distributions, [L], in bits: 0 equal, 1 no expert in common."""
    middle_LE = (first_LE + second_LE) / 2
    bits_L: Floats = 0.5 * (_kl(first_LE, middle_LE) + _kl(second_LE, middle_LE)) / np.log(2)
    return np.clip(bits_L, 0.0, 1.0)  # rounding


def _kl(first_LE: Floats, second_LE: Floats) -> Floats:
    """Return KL(first || second) in nats, with 0 log 0 = 0; NaN where either holds NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_LE = first_LE * np.log(first_LE / second_LE)
    return np.asarray(np.where(first_LE == 0, 0 * second_LE, terms_LE).sum(axis=1))


def _normalised(mass_MLE: Floats) -> Floats:
    return _ratio(mass_MLE, mass_MLE.sum(axis=-1, keepdims=True))


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Return part / whole, NaN where the whole is 0 or NaN."""
    return np.asarray(np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0))

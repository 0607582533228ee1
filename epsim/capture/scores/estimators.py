"""Soft modality scores by name: `ScoreEstimator`, what all of them can do, and `make_score`.

A score says of a token in a MoE layer how much of it is text: 1 text, 0 vision. "attention" follows the mixing of
tokens through the layers; "gaussian", "gmm2" and "gmm4" compare a token with statistics of each modality, which
`make_fit` gathers first.

Shapes: B requests of a batch, S columns of a pass, L MoE layers.
"""

from typing import Protocol

from torch import Tensor

from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.options import COMPONENTS, SCORE_NAMES
from epsim.capture.scores.attention import AttentionScore
from epsim.capture.scores.gaussian import GaussianFit, GaussianScore
from epsim.capture.scores.gaussian_statistics import BETA, TAU_FACTOR, GaussianStatistics
from epsim.errors import InputError


class ScoreEstimator(Protocol):
    """Scores of the tokens that a model's decoder runs over, pass by pass.

    Per batch of requests: `start_batch`; then for each pass (prefill, a chunk of it, a decode step) `start_pass`, the
    decoder, `scores_BSL`. No call waits for the device, except `attach`.
    """

    name: str
    """The trace's column is `modality_score_<name>`."""

    def attach(self, model: MoeModel) -> None:
        """Put hooks on `model`, once. Raises InputError if it cannot be scored."""

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""

    def start_batch(self) -> None:
        """Forget what is kept of the last batch of requests."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Get ready for a pass that the decoder runs next."""

    def scores_BSL(self) -> Tensor:
        """Return the scores of the pass that just ran: float32 [B, S, L], in [0, 1]; at padding anything finite."""


def make_score(name: str, statistics: GaussianStatistics | None = None) -> ScoreEstimator:
    """Return the estimator called `name`.

    Args:
        name: one of SCORE_NAMES.
        statistics: what a Gaussian score needs, as many components as its name says.

    Raises InputError for another name, and where statistics are missing, in the way, or of other components.
    """
    if name not in SCORE_NAMES:
        raise InputError(f'"{name}" is not a modality score; write one of {", ".join(SCORE_NAMES)}')
    if name == "attention":
        if statistics is not None:
            raise InputError('the score "attention" takes no statistics; leave them out')
        return AttentionScore()
    if statistics is None:
        raise InputError(f'the score "{name}" needs statistics of both modalities; fit them first')
    if statistics.num_components != COMPONENTS[name]:
        raise InputError(
            f'the score "{name}" needs statistics with {COMPONENTS[name]} Gaussians per modality, '
            f"these have {statistics.num_components}; fit them for this score"
        )
    return GaussianScore(statistics)


def make_fit(name: str, *, beta: float = BETA, tau_factor: float = TAU_FACTOR, seed: int = 0) -> GaussianFit:
    """Return what gathers the statistics for the score called `name`.

    Args:
        name: "gaussian", "gmm2" or "gmm4".
        beta: decay per batch, eq. 5-7.
        tau_factor: temperature of eq. 9 in units of the hidden size.
        seed: of the start of the mixtures.

    Raises InputError for a score that needs no statistics, and for numbers out of range.
    """
    if name not in COMPONENTS:
        raise InputError(f'"{name}" is not a score that is fitted; write one of {", ".join(COMPONENTS)}')
    if not 0 < beta <= 1:
        raise InputError(f"beta: {beta!r} must be above 0 and at most 1; write e.g. {BETA}")
    if not tau_factor > 0:
        raise InputError(f"tau_factor: {tau_factor!r} must be above 0; write e.g. {TAU_FACTOR}")
    return GaussianFit(COMPONENTS[name], beta=beta, tau_factor=tau_factor, seed=seed)

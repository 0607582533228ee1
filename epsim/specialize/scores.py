"""Soft modality scores while a model trains: `TrainingScore`, `make_training_score`.

"attention" is that of captures (SMoES eq. 2-4). The Gaussian scores (eq. 5-9, table S5) take in each batch first and
then score it, as the statistics are "continuously updated from token batches". "hard" is the label (tables 2, S3).

Shapes: B samples, S columns, T = B S tokens, L MoE layers, D hidden size. A score is the share of text, 0 to 1.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.options import COMPONENTS
from epsim.capture.scores.attention import AttentionScore
from epsim.capture.scores.estimators import make_fit
from epsim.capture.scores.gaussian import InputHooks
from epsim.capture.scores.gaussian_statistics import GaussianStatistics

State = dict[str, Any]


class TrainingScore(Protocol):
    """Scores of the tokens of a training batch; a `Watcher` of the model. No score carries gradients."""

    def attach(self, model: MoeModel) -> None:
        """Put hooks on the model."""

    def detach(self) -> None:
        """Take them away."""

    def start_batch(self) -> None:
        """Forget the last batch."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Get ready for the pass that runs next."""

    def scores_LBS(self) -> Tensor:
        """Return the scores of the pass that just ran, float32 [L, B, S]; once per pass."""

    def state_dict(self) -> State:
        """Return what must be kept for training to go on as if it had not stopped."""

    def load_state_dict(self, state: State) -> None:
        """Take up such a state; after `attach`."""


def make_training_score(name: str, *, beta: float, tau_factor: float, seed: int) -> TrainingScore:
    """Return the score called "attention", "gaussian", "gmm2", "gmm4" or "hard".

    beta: decay of eq. 5-7; tau_factor: temperature of eq. 9 in units of D; seed: of the start of mixtures.
    """
    if name == "attention":
        return _Attention()
    if name == "hard":
        return _Hard()
    assert name in COMPONENTS
    return OnlineGaussian(name, beta=beta, tau_factor=tau_factor, seed=seed)


class _Attention(AttentionScore):
    def scores_LBS(self) -> Tensor:
        return self.scores_BSL().permute(2, 0, 1)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing is kept from batch to batch."""


class _Hard:
    def attach(self, model: MoeModel) -> None:
        self._num_layers = len(model.layer_ids)

    def detach(self) -> None:
        """There are no hooks."""

    def start_batch(self) -> None:
        """Nothing is kept from batch to batch."""

    def start_pass(self, forward_pass: ForwardPass) -> None:
        self._is_text_BS = forward_pass.is_text_BS

    def scores_LBS(self) -> Tensor:
        return self._is_text_BS.to(torch.float32).expand(self._num_layers, -1, -1)

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing is kept from batch to batch."""


class OnlineGaussian:
    """Gaussian statistics that each batch updates before it is scored under them.

    x is the router's input, as in captures. The inputs are kept without gradients until the pass has run; autograd
    holds the same memory.
    """

    def __init__(self, name: str, *, beta: float, tau_factor: float, seed: int) -> None:
        self._fit = make_fit(name, beta=beta, tau_factor=tau_factor, seed=seed)
        self._hooks = InputHooks(name)
        self._inputs: list[Tensor] = []

    @property
    def statistics(self) -> GaussianStatistics:
        """The statistics as they are now."""
        return self._fit.statistics

    def attach(self, model: MoeModel) -> None:
        """Hook the experts of `model`, and begin with no statistics."""
        self._fit.attach(model)
        self._hooks.attach(model, lambda layer, x_TD: self._inputs.append(x_TD.detach()))

    def detach(self) -> None:
        """Take the hooks off; the statistics stay."""
        self._hooks.detach()
        self._fit.detach()

    def start_batch(self) -> None:
        """Take in the batch before, if that has not been done."""
        self._fit.start_batch()

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Take which tokens are of which modality."""
        self._shape_BS = forward_pass.is_text_BS.shape
        self._inputs = []
        self._fit.start_pass(forward_pass)

    @torch.no_grad()
    def scores_LBS(self) -> Tensor:
        """Update the statistics with the pass that just ran, and return its scores under them, float32 [L, B, S]."""
        density = self._fit.statistics.density()
        scores_LT = torch.stack([density.score(layer, x_TD) for layer, x_TD in enumerate(self._inputs)])
        self._inputs = []
        return torch.where(scores_LT.isfinite(), scores_LT, 0.5).view(-1, *self._shape_BS)

    def state_dict(self) -> State:
        """Return the sums of eq. 5-7."""
        return self._fit.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take up such sums."""
        self._fit.load_state_dict(state)

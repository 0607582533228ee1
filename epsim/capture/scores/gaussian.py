"""The Gaussian-statistics modality score of SMoES (arXiv 2604.23996, eq. 5-9): `GaussianFit`, then `GaussianScore`.

`GaussianFit` gathers `GaussianStatistics` while a model reads prompts; `GaussianScore` scores with statistics that no
longer change. Both see x as the first argument of the experts' forward: the normed hidden vector that the router gets
too. The paper writes g = softmax(W_gate x_ij) and LL(x_ij) with the same x_ij. The residual stream would be another
reading, in which the score gets sharper.

Shapes: B requests of a batch, S columns of this pass, T = B S, L MoE layers, M = 2 modalities (text, vision), D hidden
size. A score is the share of text, from 0 to 1; that of vision is what is left to 1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from epsim.capture.model import ForwardPass, MoeModel
from epsim.capture.scores.gaussian_statistics import (
    BETA,
    NUM_MODALITIES,
    SUMS,
    TAU_FACTOR,
    Density,
    FittedModel,
    GaussianStatistics,
    Moments,
    hard_weights,
    moments,
    stacked,
)
from epsim.capture.scores.mixture import responsibilities, seed_components
from epsim.capture.scores.statistics_file import fitted_model
from epsim.errors import InputError
from epsim.trace.meta import Phase

OnInput = Callable[[int, Tensor], None]


class GaussianScore:
    """The score of each MoE layer's input under statistics that were fitted before: a `ScoreEstimator`.

    Its name is "gaussian" with one Gaussian per modality, "gmm2" or "gmm4" with two or four. Nothing is kept from one
    pass to the next, so a column's score does not depend on how the columns were cut into passes.
    """

    def __init__(self, statistics: GaussianStatistics) -> None:
        self.statistics = statistics
        self.name = score_name(statistics.num_components)
        self._hooks = InputHooks(self.name)
        self._density: Density | None = None

    def attach(self, model: MoeModel) -> None:
        """Hook the experts of `model`.

        Raises InputError if the statistics are of another model or hold no tokens of one modality, or if this
        estimator is attached already.
        """
        require_same_model(self.statistics.model, model)
        missing = self.statistics.missing_modalities()
        if missing:
            raise InputError(
                f"{self.name} score: the statistics hold no {' and no '.join(missing)} tokens; "
                "fit them on prompts that have both images and text"
            )
        self._hooks.attach(model, self._take)
        self._density = self.statistics.to(model.device).density()
        self.start_batch()

    def detach(self) -> None:
        """Take the hooks off; without an attached model nothing happens."""
        self._hooks.detach()
        self.start_batch()

    def start_batch(self) -> None:
        """Forget the last pass."""
        self._scores: list[Tensor] = []

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Take which columns of the pass are padding."""
        self._is_token_BS = forward_pass.is_token_BS
        self._scores = []

    def scores_BSL(self) -> Tensor:
        """Return the scores of the pass that just ran: float32 [B, S, L]; 1 at padding."""
        if len(self._scores) != len(self.statistics.model.layer_ids):
            raise RuntimeError(f"{self.name} score: no pass has run since start_pass")
        scores_BSL = torch.stack(self._scores, dim=-1).view(*self._is_token_BS.shape, -1)
        return torch.where(self._is_token_BS.unsqueeze(-1), scores_BSL, 1.0)

    @torch.no_grad()
    def _take(self, layer: int, x_TD: Tensor) -> None:
        if self._density is None or len(self._scores) != layer:
            raise RuntimeError(f"{self.name} score: start_pass must come before the decoder runs")
        self._scores.append(self._density.score(layer, x_TD))


class GaussianFit:
    """Statistics of the prompts that a model reads while this is attached; call it as a `ScoreEstimator`.

    The prefill of a batch is one update, whatever the size of its chunks: they are merged exactly first. Labels are
    the hard ones. Decode steps are not taken in. `statistics` is what came out; it has no scores itself.
    """

    def __init__(
        self, num_components: int = 1, *, beta: float = BETA, tau_factor: float = TAU_FACTOR, seed: int = 0
    ) -> None:
        self.name = score_name(num_components)
        self._num_components, self._beta, self._tau_factor, self._seed = num_components, beta, tau_factor, seed
        self._hooks = InputHooks(self.name)
        self._statistics: GaussianStatistics | None = None
        self._weight_TM: Tensor | None = None
        self._batch: list[Moments] = []
        self._kept: list[list[Tensor]] = []
        self._kept_weights: list[Tensor] = []

    def attach(self, model: MoeModel) -> None:
        """Hook the experts of `model` and begin with no statistics.

        Raises InputError if this is attached already.
        """
        self._hooks.attach(model, self._take)
        self._statistics = GaussianStatistics.empty(
            fitted_model(model),
            num_components=self._num_components,
            beta=self._beta,
            tau_factor=self._tau_factor,
            device=model.device,
        )
        self._is_started = [self._num_components == 1] * NUM_MODALITIES
        self._begin()

    def detach(self) -> None:
        """Finish the batch and take the hooks off; without an attached model nothing happens."""
        self.start_batch()
        self._hooks.detach()

    @property
    def statistics(self) -> GaussianStatistics:
        """What was gathered so far, with the batch that is under way. Raises RuntimeError before `attach`."""
        if self._statistics is None:
            raise RuntimeError(f"{self.name} statistics: no model has been attached")
        self.start_batch()
        return self._statistics

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of eq. 5-7 and which mixtures have begun, to go on from with `load_state_dict`."""
        sums = {name: getattr(self.statistics, name) for name in SUMS}
        return sums | {"is_started": torch.tensor(self._is_started)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such sums; after `attach`."""
        for name in SUMS:
            getattr(self.statistics, name).copy_(state[name])
        self._is_started = state["is_started"].tolist()
        self._begin()

    def start_batch(self) -> None:
        """Take in the batch that was under way, as one update; one that not all layers have seen is dropped."""
        self._weight_TM = None
        if self._statistics is None or not self._batch:
            return
        if len(self._batch) < len(self._statistics.model.layer_ids):  # interrupted in its first chunk
            self._begin()
            return
        with torch.no_grad():
            batch = stacked(self._batch)
            if not all(self._is_started):
                batch = self._start_components(batch)
            self._statistics.absorb(batch)
        self._begin()

    def start_pass(self, forward_pass: ForwardPass) -> None:
        """Take the hard labels of a prefill pass; a decode step ends the prefill."""
        if forward_pass.phase is Phase.DECODE:
            self.start_batch()
            return
        is_token_T = forward_pass.is_token_BS.flatten()
        self._weight_TM = hard_weights(forward_pass.is_text_BS.flatten(), is_token_T)
        self._is_token_T1 = is_token_T.unsqueeze(-1)
        if not all(self._is_started):
            self._kept_weights.append(self._weight_TM.view(*forward_pass.is_token_BS.shape, NUM_MODALITIES))

    @torch.no_grad()
    def _take(self, layer: int, x_TD: Tensor) -> None:
        if self._weight_TM is None:
            return
        x_TD = torch.where(self._is_token_T1, x_TD.detach(), 0.0)
        if self._density is None:
            weight_TMC = self._weight_TM.unsqueeze(-1).expand(-1, -1, self._num_components)
        else:
            weight_TMC = responsibilities(self._density, layer, x_TD, self._weight_TM)
        if not all(self._is_started):
            self._kept[layer].append(x_TD.view(*self._kept_weights[-1].shape[:2], -1))
        chunk = moments(x_TD, weight_TMC)
        if layer == len(self._batch):
            self._batch.append(chunk)
        else:
            self._batch[layer] = self._batch[layer].merged(chunk)

    def _begin(self) -> None:
        assert self._statistics is not None
        self._batch = []
        self._kept = [[] for _ in self._statistics.model.layer_ids]
        self._kept_weights = []
        has_mixture = self._num_components > 1 and any(self._is_started)
        self._density = self._statistics.density() if has_mixture else None

    def _start_components(self, batch: Moments) -> Moments:
        """Return `batch` with the moments of split tokens for each modality that comes for the first time."""
        weight_TM = torch.cat(self._kept_weights, dim=1).flatten(0, 1)
        present_M = (weight_TM.sum(dim=0) > 0).tolist()
        for modality in range(NUM_MODALITIES):
            if self._is_started[modality] or not present_M[modality]:
                continue
            for layer in range(len(self._kept)):
                split = self._split(layer, modality, weight_TM[:, modality])
                for name in ("count_MC", "mean_MCD", "deviation_MCD"):
                    getattr(batch, name)[layer, modality] = getattr(split, name)[0]
            self._is_started[modality] = True
        return batch

    def _split(self, layer: int, modality: int, weight_T: Tensor) -> Moments:
        x_TD = torch.cat(self._kept[layer], dim=1).flatten(0, 1)
        draws_C = np.random.default_rng([self._seed, layer, modality]).random(self._num_components)
        return moments(x_TD, seed_components(x_TD, weight_T, draws_C).unsqueeze(1))


class InputHooks:
    """Forward pre-hooks on the experts of each MoE layer: they hand on the layer's index and the input [T, D]."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._model: MoeModel | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self, model: MoeModel, on_input: OnInput) -> None:
        if self._model is not None:
            raise InputError(f"{self._name} score: it is attached to {self._model.name}; detach it first")
        self._model = model
        for index, layer_id in enumerate(model.layer_ids):
            hook = _hook(index, on_input)
            experts: nn.Module = model.layers[layer_id].mlp.experts
            self._handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._model, self._handles = None, []


def _hook(index: int, on_input: OnInput) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_input(index, args[0] if args else kwargs["hidden_states"])

    return hook


def score_name(num_components: int) -> str:
    """Return the name of the score with this many Gaussians per modality: "gaussian", "gmm2", "gmm4"."""
    return "gaussian" if num_components == 1 else f"gmm{num_components}"


def require_same_model(fitted: FittedModel, model: MoeModel) -> None:
    """Raise InputError unless the statistics are of `model`: its name, MoE layers, width and router weights."""
    found = fitted_model(model)
    for what in ("name", "layer_ids", "hidden_size", "checksum"):
        theirs, ours = getattr(fitted, what), getattr(found, what)
        if theirs != ours:
            words = "other weights" if what == "checksum" else f"{what} {theirs!r} instead of {ours!r}"
            raise InputError(
                f"the Gaussian statistics are of another model than {model.name}: {words}; fit them on this model"
            )

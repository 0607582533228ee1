"""What a stage of training does in a step: `Task`, of answers or of cells; its result is a `StepOutcome`.

Shapes: B samples, C cells of a scene, D width of the vision encoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsim.capture.forward import Watcher
from epsim.capture.model import MoeModel
from epsim.capture.prompts.scenes import INK_NAMES, SIDE
from epsim.errors import InputError
from epsim.scenario.train import StageSpec
from epsim.specialize.balance import load_balance
from epsim.specialize.forward import run_examples
from epsim.specialize.methods import Method, Term
from epsim.specialize.observer import GateObserver
from epsim.specialize.routed import RoutedPass
from epsim.specialize.source import ExampleSource

NUM_DIGITS, NUM_INKS = 10, len(INK_NAMES)


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step's forward pass gave.

    Attributes:
        loss: of the task, in nats.
        is_right_B: bool [B], the whole answer was predicted.
        terms: what a method adds.
        picks_LME: how often each expert was picked by each modality; None without experts.
    """

    loss: Tensor
    is_right_B: Tensor
    terms: Mapping[str, Term] = field(default_factory=dict)
    picks_LME: Tensor | None = None

    @cached_property
    def objective(self) -> Tensor:
        """The loss with the weighted terms (SMoES eq. 17, SMAR eq. 14)."""
        return self.loss + sum(term.weight * term.value for term in self.terms.values())


class Task(Protocol):
    """What is learnt in a stage. `head` is trained with it and thrown away after it."""

    head: nn.Module

    def run(self, step: int) -> StepOutcome:
        """Run the forward pass of a step, whose data depend on seed, stage and step alone."""


class AnswerTask:
    """Answers to prompts, with or without images: language modelling of the answer's tokens."""

    def __init__(
        self,
        stage: StageSpec,
        stage_index: int,
        model: MoeModel,
        source: ExampleSource,
        observer: GateObserver,
        method: Method | None,
    ) -> None:
        self.head: nn.Module = nn.Module()
        self._stage = stage
        self._model, self._stage_index, self._source = model, stage_index, source
        self._observer, self._method = observer, method

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """What must be told of every pass while hooks are on the model."""
        return (self._observer, *(self._method.watchers if self._method else ()))

    def run(self, step: int) -> StepOutcome:
        """Run the examples of a step."""
        batch = self._source.batch(self._stage_index, step).to(self._model.device)
        predicted = run_examples(self._model, batch, self.watchers)
        routed = self._observer.routed()
        return StepOutcome(
            loss=predicted.loss(),
            is_right_B=predicted.is_right_B(),
            terms=self._method.terms(routed) if self._method else self._plain_terms(routed),
            picks_LME=routed.num_picks_LME,
        )

    def _plain_terms(self, routed: RoutedPass) -> Mapping[str, Term]:
        if not self._stage.balance_weight:
            return {}
        return {"balance": Term(weight=self._stage.balance_weight, value=load_balance(routed))}


class CellTask:
    """Digit and ink of each cell of a scene, read off the mean of its patches: what the vision encoder learns.

    It stands for the pretraining that CLIP has behind it.
    """

    def __init__(self, model: MoeModel, stage_index: int, source: ExampleSource, seed: int) -> None:
        vision = model.module.config.vision_config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head: nn.Module = nn.Linear(vision.hidden_size, NUM_DIGITS + NUM_INKS).to(model.device)
        self._model, self._stage_index, self._source = model, stage_index, source
        self._patches_per_side = vision.image_size // vision.patch_size
        if self._patches_per_side % SIDE:
            raise InputError(
                f"model.vision: {self._patches_per_side} patches a side cannot be shared out among {SIDE} cells; "
                "write an image_size that is an even multiple of patch_size"
            )

    def run(self, step: int) -> StepOutcome:
        """Classify the cells of a step's scenes."""
        cells = self._source.cells(self._stage_index, step).to(self._model.device)
        logits_BCV = self.head(self._cell_features(cells.pixel_values))
        digits_BCV, inks_BCV = logits_BCV.split((NUM_DIGITS, NUM_INKS), dim=-1)
        loss = F.cross_entropy(digits_BCV.flatten(0, 1), cells.digits_BC.flatten())
        loss = loss + F.cross_entropy(inks_BCV.flatten(0, 1), cells.inks_BC.flatten())
        right_BC = (digits_BCV.argmax(-1) == cells.digits_BC) & (inks_BCV.argmax(-1) == cells.inks_BC)
        return StepOutcome(loss=loss, is_right_B=right_BC.all(dim=1))

    def _cell_features(self, pixels: Tensor) -> Tensor:
        """Return the mean over the patches of each cell of what the projector is given, [B, C, D]."""
        inner: Any = self._model.module.model
        layer = self._model.module.config.vision_feature_layer
        states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        cell = self._patches_per_side // SIDE
        grid = states.view(len(pixels), SIDE, cell, SIDE, cell, -1)
        cells_BCD: Tensor = grid.mean(dim=(2, 4)).flatten(1, 2)
        return cells_BCD

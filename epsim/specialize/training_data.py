"""What a training run learns from and is tested on: `TrainingData`, the built-in scenes or prompts of files.

What is drawn follows from seed, stage and step alone: a run that goes on after a stop sees what it would have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from epsim.capture.models.processor import Processor
from epsim.capture.prompts.requests import Prompt, PromptSet, RequestError, read_prompts
from epsim.capture.prompts.scenes import random_scene, scene_prompt, text_only_prompt, text_scene_prompt
from epsim.scenario.train import DataSpec
from epsim.specialize.examples import CellsBatch, encode_cells, require_answer

Task = Literal["text", "multimodal"]
_TRAIN, _TEST, _CELLS = range(3)  # each draws from a stream of its own


@dataclass(frozen=True, kw_only=True)
class PromptsByImage:
    """Prompts with images, and without."""

    with_image: tuple[Prompt, ...]
    text_only: tuple[Prompt, ...]

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "PromptsByImage":
        """Return the prompts in their order."""
        with_image = tuple(prompt for prompt in prompts if prompt.images)
        return cls(with_image=with_image, text_only=tuple(prompt for prompt in prompts if not prompt.images))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Prompts with answers: of files, or where `train` and `test` are None, the built-in scenes."""

    train: PromptSet | None = None
    test: PromptSet | None = None

    @classmethod
    def load(cls, spec: DataSpec) -> "TrainingData":
        """Read the files that `spec` names, if any; raises RequestError at the first line that is wrong.

        Paths are taken as they are: relative ones from the current directory.
        """
        if spec.train is None or spec.test is None:
            return cls()
        data = cls(train=read_prompts(Path(spec.train)), test=read_prompts(Path(spec.test)))
        for prompt in (*(data.train or ()), *(data.test or ())):
            require_answer(prompt)
        return data

    def check(self, task: Task, text_only: float, field: str) -> None:
        """Raise RequestError, with `field`, if a file lacks the prompts that a stage learns from."""
        if self.train is None:
            return
        share = 1.0 if task == "text" else text_only
        train = self._train_by_image
        for words, is_drawn, prompts in (
            ("with", share < 1, train.with_image),
            ("without", share > 0, train.text_only),
        ):
            if is_drawn and not prompts:
                raise RequestError(
                    f'{field}: task "{task}" learns from prompts {words} an image, and {self.train.source["file"]} has '
                    "none; add some, or change task or text_only"
                )

    def prompts(
        self, task: Task, text_only: float, *, batch_size: int, seed: int, stage_index: int, step: int
    ) -> list[Prompt]:
        """Return what is learnt from in a step: "text" without images, "multimodal" a share `text_only` without."""
        rng = np.random.default_rng([_TRAIN, seed, stage_index, step])
        share = 1.0 if task == "text" else text_only
        has_image_B = rng.random(batch_size) >= share
        names = [f"stage {stage_index}, step {step}, sample {row}" for row in range(batch_size)]
        return [self._prompt(rng, name, bool(has)) for name, has in zip(names, has_image_B, strict=True)]

    def held_out(self, num: int, num_text: int, seed: int) -> PromptsByImage:
        """Return `num` prompts to be tested on with images and `num_text` without, or as many as the file has.

        None of the built-in ones is learnt from. Those without images are scenes in words: a piece of a text has no one
        right answer.
        """
        if self.test is not None:
            by_image = PromptsByImage.of(self.test)
            return PromptsByImage(with_image=by_image.with_image[:num], text_only=by_image.text_only[:num_text])
        rng = np.random.default_rng([_TEST, seed])
        return PromptsByImage(
            with_image=tuple(scene_prompt(rng, f"test {i}", held_out=True) for i in range(num)),
            text_only=tuple(text_scene_prompt(rng, f"text test {i}", held_out=True) for i in range(num_text)),
        )

    @cached_property
    def _train_by_image(self) -> PromptsByImage:
        return PromptsByImage.of(self.train or ())

    def _prompt(self, rng: np.random.Generator, name: str, has_image: bool) -> Prompt:
        if self.train is None:
            return scene_prompt(rng, name, held_out=False) if has_image else text_only_prompt(rng, name, held_out=False)
        prompts = self._train_by_image.with_image if has_image else self._train_by_image.text_only
        return prompts[rng.integers(len(prompts))]


def cells_batch(processor: Processor, *, batch_size: int, seed: int, stage_index: int, step: int) -> CellsBatch:
    """Return built-in scenes for the task "cells" of a step, on the host.

    Files have no cells: whatever a run learns from, these are the built-in scenes.
    """
    rng = np.random.default_rng([_CELLS, seed, stage_index, step])
    scenes = [random_scene(rng, held_out=False) for _ in range(batch_size)]
    return encode_cells(scenes, processor)

"""The batches of a training run, stage by stage and step by step: `ExampleSource`."""

from collections.abc import Iterator

from epsim.capture.models.processor import Processor
from epsim.scenario.train import TrainSpec
from epsim.specialize.examples import CellsBatch, ExampleBatch, encode_examples
from epsim.specialize.training_data import TrainingData, cells_batch


class ExampleSource:
    """Data of a run; what a step gets depends on the run's seed, the stage and the step alone."""

    def __init__(self, spec: TrainSpec, processor: Processor) -> None:
        """Read the files that the run learns from; raises RequestError if they lack what a stage needs."""
        self._spec, self._processor = spec, processor
        self._data = TrainingData.load(spec.data)
        for stage in spec.stages:
            if stage.task != "cells":
                self._data.check(stage.task, stage.text_only, f"stages[{stage.name}]")

    def batch(self, stage_index: int, step: int) -> ExampleBatch:
        """Return the prompts and answers of a step, on the host."""
        stage = self._spec.stages[stage_index]
        assert stage.task != "cells"
        prompts = self._data.prompts(
            stage.task,
            stage.text_only,
            batch_size=stage.batch_size,
            seed=self._spec.seed,
            stage_index=stage_index,
            step=step,
        )
        return encode_examples(prompts, self._processor)

    def cells(self, stage_index: int, step: int) -> CellsBatch:
        """Return the scenes and their cells of a step, on the host."""
        size = self._spec.stages[stage_index].batch_size
        return cells_batch(self._processor, batch_size=size, seed=self._spec.seed, stage_index=stage_index, step=step)

    def held_out(self, *, with_image: bool, batch_size: int) -> Iterator[ExampleBatch]:
        """Return held-out prompts, the same for every method and seed, in batches on the host."""
        data = self._spec.data
        found = self._data.held_out(data.num_test, data.num_test_text, 0)
        prompts = found.with_image if with_image else found.text_only
        for first in range(0, len(prompts), batch_size):
            yield encode_examples(prompts[first : first + batch_size], self._processor)

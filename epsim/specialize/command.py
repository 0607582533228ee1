"""The whole of `epsim train`: from a `TrainSpec` to a folder with a trained model, `train`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epsim import __version__
from epsim.capture.model import MoeModel
from epsim.capture.models.device import circumstances
from epsim.capture.models.processor import load_processor
from epsim.errors import EpsimError
from epsim.scenario.train import StageSpec, TrainSpec
from epsim.specialize.build import build_model
from epsim.specialize.evaluate import accuracy
from epsim.specialize.export import export
from epsim.specialize.interrupt import DeferredInterrupt, deferred_interrupts
from epsim.specialize.log import TrainingLog, Window
from epsim.specialize.methods import Method, make_method
from epsim.specialize.run_folder import RunFolder, State, common_stages, read_state, write_state
from epsim.specialize.source import ExampleSource
from epsim.specialize.stage import DivergedError, StageRun
from epsim.specialize.tasks import AnswerTask

CountSteps = Callable[[str, int], AbstractContextManager[Callable[[int, str], None]]]  # a stage and its steps: a bar


@dataclass(frozen=True, kw_only=True)
class TrainOutcome:
    """What a run left: steps in all stages, its folder, what ended it early, and what to say of it.

    num_steps: those that were made; of a run that ended early, those that need not be made again.
    """

    num_steps: int
    folder: Path
    stopped_by: KeyboardInterrupt | EpsimError | None
    lines: list[str]

    @property
    def can_go_on(self) -> bool:
        """Whether to go on from `last.pt` makes sense: a run that diverged would diverge again."""
        return not isinstance(self.stopped_by, DivergedError)


def train(
    spec: TrainSpec,
    folder: Path,
    *,
    start: Path | None = None,
    resume: bool = False,
    device: str = "auto",
    num_threads: int | None = None,
    count: CountSteps,
    say: Callable[[str], None],
) -> TrainOutcome:
    """Train the stages of `spec` one after the other and leave what `RunFolder` says in `folder`.

    Args:
        start: folder of another run: the stages in common, from the first on, are taken from there.
        resume: go on with the run in `folder`; on the CPU the same losses to the bit as without the break.
        device: "auto", "cpu", "cuda", "cuda:1".
        count: called with each stage's name and steps; its context yields advance(steps done, note).
        say: told in a line what is about to happen.

    Ctrl-C ends the run after the step that is under way. That, and a loss that is not a number, leave `last.pt` of the
    last step that was good, to go on from; a second Ctrl-C, at once, leaves the one that was there.
    """
    files = RunFolder(folder)
    done = common_stages(spec, start) if start is not None else []
    state = files.resume(spec) if resume else None
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model = build_model(spec, device)
    with files.locked():
        if state is None:
            files.begin(spec)
        run = _Run(spec, files, model, count, say)
        say(f"{model.name}: {sum(stage.steps for stage in spec.stages)} steps in {_stages(spec)} on {model.device}")
        if state is not None:
            run.load_state_dict(state)
            state = None  # as large as the model with its optimizer
        elif start is not None:
            run.take_over(RunFolder(start), done)
        return run.all_stages()


class _Run:
    def __init__(
        self, spec: TrainSpec, files: RunFolder, model: MoeModel, count: CountSteps, say: Callable[[str], None]
    ) -> None:
        self._spec, self._files, self._model, self._count, self._say = spec, files, model, count, say
        self._processor = load_processor(model)
        self._source = ExampleSource(spec, self._processor)
        self._log = TrainingLog(files.path)
        self._method: Method | None = None
        self._results: dict[str, Any] = {}
        self._pending: State | None = None
        self._steps_saved = 0  # in `last.pt`, of the stage that is under way

    def all_stages(self) -> TrainOutcome:
        stopped_by: KeyboardInterrupt | EpsimError | None = None
        if not self._pending:
            self._log.begin()
        try:
            with deferred_interrupts() as interrupts:
                for index, stage in enumerate(self._spec.stages):
                    if stage.name not in self._results:
                        self._stage(index, stage, interrupts.raise_if_asked)
                self._finish()
        except (KeyboardInterrupt, EpsimError) as error:
            stopped_by = error
        num_steps = sum(result["steps"] for result in self._results.values()) + self._steps_saved
        return TrainOutcome(
            num_steps=num_steps, folder=self._files.path, stopped_by=stopped_by, lines=self._lines(stopped_by)
        )

    def load_state_dict(self, state: State) -> None:
        """Take up a run where `last.pt` left it."""
        self._model.module.load_state_dict(state["weights"])
        self._results = state["results"]
        self._log.load_state_dict(state["log"])
        self._take_up_method(state)
        if state["stage"] is not None:
            self._steps_saved = state["stage"]["step"]
            self._pending = state["stage"]

    def take_over(self, other: RunFolder, stages: list[str]) -> None:
        """Begin with the weights of another run after these stages."""
        for name in stages:
            stage = read_state(other.stage(name))
            self._results[name] = stage["result"] | {"taken_from": str(other.path)}
        self._model.module.load_state_dict(stage["weights"])
        self._take_up_method(stage)
        self._say(f"{', '.join(stages)}: taken from {other.path}")

    def _take_up_method(self, state: State) -> None:
        """Take up the method of a stage before, which later stages, captures and the saved model need as it was."""
        if state.get("method") is None:
            return
        self._method = make_method(self._spec.method, self._model, self._spec.seed)
        self._method.attach(self._model)
        self._method.load_state_dict(state["method"])
        self._method.detach()

    def _stage(self, index: int, stage: StageSpec, raise_if_asked: Callable[[], None]) -> None:
        if stage.specialize and self._method is None:
            self._method = make_method(self._spec.method, self._model, self._spec.seed)
        method = self._method if stage.specialize else None
        with (
            StageRun(self._spec, index, self._model, self._source, method) as run,
            self._count(stage.name, stage.steps) as advance,
        ):
            if self._pending is not None:
                run.load_state_dict(self._pending)
                self._pending = None
            self._steps(run, advance, raise_if_asked)
            result = self._result(run)
        self._save_stage(stage, result)
        self._results[stage.name] = result
        if stage is not self._spec.stages[-1]:
            self._save_last(None)
        self._steps_saved = 0

    def _steps(self, run: StageRun, advance: Callable[[int, str], None], raise_if_asked: Callable[[], None]) -> None:
        stage, spec = run.stage, self._spec
        advance(run.step, "")
        try:
            while run.step < stage.steps:
                raise_if_asked()
                began = time.monotonic()
                run.advance()
                run.seconds += time.monotonic() - began
                if run.step % spec.log_every == 0 or run.step == stage.steps:
                    row = self._log.add(
                        stage.name, run.step, run.window, learning_rate=run.learning_rate, seconds=run.seconds
                    )
                    run.window = Window()
                    advance(run.step, f"loss {row['loss']:.3f}")
                if run.step % spec.checkpoint_every == 0 and run.step < stage.steps:
                    self._save_last(run)
        except (DeferredInterrupt, EpsimError):
            self._save_last(run)
            raise

    def _save_last(self, run: StageRun | None) -> None:
        """Keep what the run goes on from: in a stage, or between two."""
        self._files.save_last(
            {
                "spec": self._spec.model_dump(mode="json"),
                "stage": None if run is None else run.state_dict(),
                "weights": self._model.module.state_dict(),
                "results": self._results,
                "log": self._log.state_dict(),
                "method": self._method_state(),
            }
        )
        self._steps_saved = 0 if run is None else run.step

    def _result(self, run: StageRun) -> dict[str, Any]:
        """Return what came out of a stage; accuracy of stages that learn answers."""
        result: dict[str, Any] = {"steps": run.step, "seconds": run.seconds}
        if not isinstance(run.task, AnswerTask):
            return result
        self._model.module.eval()
        for kind in ("image", "text"):
            held_out = self._source.held_out(with_image=kind == "image", batch_size=run.stage.batch_size)
            result[kind] = accuracy(self._model, held_out, run.task.watchers)
        return result

    def _save_stage(self, stage: StageSpec, result: dict[str, Any]) -> None:
        """Keep the weights at the end of a stage."""
        state = {"weights": self._model.module.state_dict(), "result": result, "method": self._method_state()}
        write_state(self._files.stage(stage.name), state)

    def _method_state(self) -> State | None:
        return None if self._method is None else self._method.state_dict()

    def _finish(self) -> None:
        self._log.save_experts()
        export(self._model, self._processor, self._method, self._files, self._spec.name)
        self._files.save_results(self._final_results())

    def _final_results(self) -> dict[str, Any]:
        """Return `results.json`."""
        model = self._model
        return {
            "name": self._spec.name,
            "model": model.name,
            "num_parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "stages": self._results,
            "ran_on": {
                **circumstances(model.dtype, model.device),
                "threads": torch.get_num_threads(),
                "epsim": __version__,
            },
        }

    def _lines(self, stopped_by: BaseException | None) -> list[str]:
        """Return what to say at the end."""
        lines = []
        for name, result in self._results.items():
            right = [f"{kind} {_percent(result[kind])}" for kind in ("image", "text") if result.get(kind)]
            lines.append(f"{name}: {result['steps']} steps, {result['seconds']:.0f} s" + ", ".join(["", *right]))
        if stopped_by is None:
            lines.append(f"wrote {self._files.model}: epsim trace --model {self._files.model} -o FILE")
        return lines


def _stages(spec: TrainSpec) -> str:
    return "one stage" if len(spec.stages) == 1 else f"{len(spec.stages)} stages"


def _percent(found: dict[str, Any]) -> str:
    if found["accuracy"] is None:
        return "not tested"
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f} % right of {found['num_prompts']}"

"""Training runs: same losses after a break, what ends one early, and what a run leaves."""

import csv
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from epsim.capture.modality_gate import ModalityGate
from epsim.capture.models.load import load_model
from epsim.capture.models.source import ModelSource
from epsim.errors import InputError, OutputError
from epsim.scenario.load_train import load_train
from epsim.scenario.train import TrainSpec
from epsim.specialize import command
from epsim.specialize.command import TrainOutcome, train
from epsim.specialize.interrupt import DeferredInterrupt
from epsim.specialize.log import Window
from epsim.specialize.observer import GateObserver
from epsim.specialize.run_folder import RunFolder, read_state
from epsim.specialize.tasks import StepOutcome

TRAIN = Path(__file__).parent.parent / "scenarios" / "train"
SMALL = (
    "model.num_layers=2", "model.hidden_size=32", "model.num_experts=8", "model.topk=2", "model.expert_ffn_size=16",
    "data.num_test=8", "data.num_test_text=4", "stages[vision].steps=2", "stages[text].steps=4",
    "stages[align].steps=2", "stages[instruct].steps=6", "log_every=2", "checkpoint_every=3",
    "stages[vision].batch_size=4", "stages[text].batch_size=4", "stages[align].batch_size=4",
    "stages[instruct].batch_size=4",
)  # fmt: skip
METHODS = {
    "soft": "{kind: soft}",
    "binning": "{kind: smoes, objective: none, num_bins: 4}",
    "attention": "{kind: smoes, weight: 0.1, num_bins: 4}",
    "gaussian": "{kind: smoes, score: gaussian, weight: 0.1, num_bins: 4}",
    "gmm2": "{kind: smoes, score: gmm2, weight: 0.1, num_bins: 4}",
    "hard-score": "{kind: smoes, score: hard, weight: 0.1, num_bins: 4}",
    "kl": "{kind: smoes, objective: kl, weight: 0.1, num_bins: 4}",
    "smar": "{kind: smar, weight: 0.1}",
    "partition": "{kind: partition, text_experts: 3, vision_experts: 3, shared_experts: 2}",
}


def small_spec(*more: str, method: str = METHODS["soft"]) -> TrainSpec:
    return load_train(TRAIN / "digits.yaml", [*SMALL, f"method={method}", *more])


@contextmanager
def no_bar(label: str, num_steps: int) -> Iterator[Callable[[int, str], None]]:
    yield lambda step, note: None


def run(spec: TrainSpec, folder: Path, **options: Any) -> TrainOutcome:
    return train(spec, folder, device="cpu", num_threads=1, count=no_bar, say=lambda line: None, **options)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the log without the column that holds time."""
    with (folder / "log.csv").open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_state(folder / "stage-instruct.pt")["weights"])


class StopAt:
    """A bar that interrupts, as Ctrl-C would, when a stage has done so many steps."""

    def __init__(self, stage: str, step: int) -> None:
        self._stage, self._step = stage, step

    @contextmanager
    def __call__(self, label: str, num_steps: int) -> Iterator[Callable[[int, str], None]]:
        def advance(step: int, note: str) -> None:
            if label == self._stage and step >= self._step:
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_interrupted_goes_on_to_the_bit(tmp_path: Path, method: str) -> None:
    spec = small_spec(method=METHODS[method])
    whole = run(spec, tmp_path / "whole")
    assert whole.stopped_by is None
    stopped = train(
        spec, tmp_path / "cut", device="cpu", num_threads=1, count=StopAt("instruct", 2), say=lambda line: None
    )
    assert isinstance(stopped.stopped_by, KeyboardInterrupt)
    assert not (tmp_path / "cut" / "results.json").exists()
    assert run(spec, tmp_path / "cut", resume=True).stopped_by is None
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert np.array_equal(
        np.load(tmp_path / "cut" / "experts.npz")["score_WLE"],
        np.load(tmp_path / "whole" / "experts.npz")["score_WLE"],
        equal_nan=True,
    )


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 5 of instruct, checkpoint_every 3: step 4 and 5 are made again, and logged once."""
    spec = small_spec()
    run(spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(command.RunFolder, "save_results", lambda *args: pytest.fail("must not come so far"))
        patch.setattr(command, "Window", Killed(4))
        with pytest.raises(SystemExit):
            run(spec, tmp_path / "cut")
    run(spec, tmp_path / "cut", resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.skipif("EPSIM_TEST_DEVICE" not in os.environ, reason="for another device than the CPU")
@pytest.mark.parametrize("method", ["gmm2", "smar"])
@pytest.mark.parametrize("first", ["cpu", os.environ.get("EPSIM_TEST_DEVICE", "cpu")])
def test_a_run_goes_on_on_an_accelerator(tmp_path: Path, first: str, method: str) -> None:
    """Step 7 is within a row of the log."""
    spec = small_spec("log_every=5", "stages[instruct].steps=12", method=METHODS[method])
    device = os.environ["EPSIM_TEST_DEVICE"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.StageRun, "advance", interrupted_at("instruct", 7))
        train(spec, tmp_path / "run", device=first, num_threads=1, count=no_bar, say=lambda line: None)
    outcome = train(spec, tmp_path / "run", resume=True, device=device, count=no_bar, say=lambda line: None)
    assert outcome.stopped_by is None
    assert [row["step"] for row in rows(tmp_path / "run")][-3:] == ["5", "10", "12"]


class Killed:
    """Stands for `Window`, of which one is made after each row of the log; after so many the process ends."""

    def __init__(self, left: int) -> None:
        self._left, self._real = left, command.Window

    def __call__(self) -> Any:
        self._left -= 1
        if not self._left:
            raise SystemExit
        return self._real()


def interrupted_at(
    stage: str, step: int, what: type[BaseException] = DeferredInterrupt
) -> Callable[[command.StageRun], None]:
    """Return a step that is interrupted when a stage has done so many."""
    advance = command.StageRun.advance

    def interrupted(run: command.StageRun) -> None:
        if run.stage.name == stage and run.step == step:
            raise what
        advance(run)

    return interrupted


def then_plain(spec: TrainSpec) -> TrainSpec:
    """Return the run with a last stage in which the method is not in place."""
    plain = spec.stages[-1].model_copy(update={"name": "plain", "specialize": False, "steps": 4})
    return spec.model_copy(update={"stages": [*spec.stages, plain]})


@pytest.mark.parametrize("method", ["smar", "binning"])
def test_a_method_outlives_a_break_in_a_stage_without_it(tmp_path: Path, method: str) -> None:
    spec = then_plain(small_spec(method=METHODS[method]))
    run(spec, tmp_path / "whole")
    train(spec, tmp_path / "cut", device="cpu", num_threads=1, count=StopAt("plain", 2), say=lambda line: None)
    run(spec, tmp_path / "cut", resume=True)
    ours, theirs = (read_state(tmp_path / name / "stage-plain.pt") for name in ("cut", "whole"))
    assert all(torch.equal(ours["weights"][name], tensor) for name, tensor in theirs["weights"].items())
    (mine, wanted) = (state["method"] if method == "smar" else state["method"]["bins"] for state in (ours, theirs))
    assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())
    assert all(bool(tensor.any()) for tensor in wanted.values())


@pytest.mark.parametrize("method", ["smar", "partition"])
def test_biases_and_masks_are_taken_from_another_run_with_its_weights(tmp_path: Path, method: str) -> None:
    spec = small_spec(method=METHODS[method])
    run(spec, tmp_path / "first")
    run(then_plain(spec), tmp_path / "second", start=tmp_path / "first")
    gates = [ModalityGate.load(tmp_path / name / "model").state_dict() for name in ("first", "second")]
    assert gates[0].keys() == gates[1].keys()
    assert all(torch.equal(gates[1][name], tensor) for name, tensor in gates[0].items())


def test_a_second_interrupt_leaves_the_checkpoint_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while weights are changed in step 5 of instruct, checkpoint_every 3: step 3 was the last whole one."""
    monkeypatch.setattr(command.StageRun, "advance", interrupted_at("instruct", 4, KeyboardInterrupt))
    outcome = run(small_spec(), tmp_path / "run")
    assert isinstance(outcome.stopped_by, KeyboardInterrupt)
    assert read_state(tmp_path / "run" / "last.pt")["stage"]["step"] == 3
    assert outcome.num_steps == 2 + 4 + 2 + 3


@pytest.mark.parametrize("method", ["gmm2", "binning"])
def test_a_step_that_fails_leaves_no_trace_in_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Memory runs out after the forward pass of step 4 of instruct; when there is enough again, it is made anew."""
    spec = small_spec(method=METHODS[method])
    run(spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        backward, left = torch.autograd.backward, iter(range(2 + 4 + 2 + 3))

        def out_of_memory(objective: torch.Tensor) -> None:
            if next(left, None) is None:
                raise torch.OutOfMemoryError
            backward(objective)

        patch.setattr(torch.autograd, "backward", out_of_memory)
        outcome = run(spec, tmp_path / "cut")
    assert str(outcome.stopped_by) == "cpu: out of memory; write a smaller stages[instruct].batch_size"
    assert outcome.num_steps == 2 + 4 + 2 + 3
    run(spec, tmp_path / "cut", resume=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def full_for_safetensors(*args: object, **kwargs: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("target", "fails", "file"),
    [
        ("torch.save", full, "stage-vision.pt"),
        ("csv.DictWriter.writerows", full, "log.csv"),
        ("numpy.savez_compressed", full, "experts.npz"),
        ("transformers.PreTrainedModel.save_pretrained", full_for_safetensors, "model"),
    ],
)
def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fails: Callable[..., None], file: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(target, fails)
        try:
            found: object = run(small_spec(), tmp_path / "run").stopped_by
        except OutputError as error:  # before the first step
            found = error
    assert isinstance(found, OutputError)
    assert str(found).startswith(f"{tmp_path / 'run' / file}: cannot be written: ")
    assert "\n" not in str(found)
    assert not list((tmp_path / "run").glob(".*"))
    if (tmp_path / "run" / "last.pt").exists():
        assert run(small_spec(), tmp_path / "run", resume=True).stopped_by is None


def test_sums_of_a_window_go_on_where_the_model_is() -> None:
    """They are read from a file to the host; "meta" stands for an accelerator."""
    outcome = StepOutcome(
        loss=torch.tensor(1.0), is_right_B=torch.tensor([True]), picks_LME=torch.ones(2, 2, 4, dtype=torch.int64)
    )
    window, resumed = Window(), Window()
    window.add(outcome, torch.tensor(1.0))
    resumed.load_state_dict(window.state_dict(), torch.device("meta"))
    state = resumed.state_dict()
    assert {tensor.device.type for tensor in (state["picks"], *state["sums"].values())} == {"meta"}
    assert set(state["sums"]) == {"loss", "objective", "gradient_norm", "accuracy"}


def test_tests_at_the_end_of_a_stage_keep_no_pass_but_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    detach = GateObserver.detach
    monkeypatch.setattr(GateObserver, "detach", lambda self: (kept.append(len(self._layers)), detach(self))[1])
    run(small_spec(), tmp_path / "run")
    assert kept == [0, 2, 2, 2]  # cells has no routers; then 2 MoE layers


def test_a_checkpoint_with_masks_is_not_trained(tmp_path: Path) -> None:
    run(small_spec(method=METHODS["partition"]), tmp_path / "run")
    again = small_spec(f"model={{checkpoint: {tmp_path / 'run' / 'model'}}}")
    with pytest.raises(InputError, match=r"^model\.checkpoint: .* write a checkpoint without modality_gate"):
        run(again, tmp_path / "again")


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(tmp_path: Path) -> None:
    run(small_spec(), tmp_path / "a")
    run(small_spec(), tmp_path / "b")
    run(small_spec("seed=1"), tmp_path / "c")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_each_stage_moves_what_it_trains_and_nothing_else(tmp_path: Path) -> None:
    run(small_spec(), tmp_path / "run")
    vision, text, align, instruct = (
        read_state(tmp_path / "run" / f"stage-{name}.pt")["weights"] for name in ("vision", "text", "align", "instruct")
    )
    for before, after, moved in (
        (vision, text, ("language_model.", "lm_head.")),
        (text, align, ("multi_modal_projector.",)),
        (align, instruct, ("language_model.", "lm_head.", "multi_modal_projector.")),
    ):
        for name in before:
            if not any(part in name for part in moved):
                assert torch.equal(before[name], after[name]), name
        for part in moved:
            assert any(part in name and not torch.equal(before[name], after[name]) for name in before), part


def test_stages_in_common_are_taken_from_another_run(tmp_path: Path) -> None:
    run(small_spec(), tmp_path / "soft")
    attention = small_spec(method=METHODS["attention"])
    run(attention, tmp_path / "alone")
    run(attention, tmp_path / "started", start=tmp_path / "soft")
    alone, started = weights(tmp_path / "alone"), weights(tmp_path / "started")
    assert all(torch.equal(alone[name], started[name]) for name in alone)
    assert [row["stage"] for row in rows(tmp_path / "started")] == ["instruct"] * 3
    results = json.loads((tmp_path / "started" / "results.json").read_text())
    assert results["stages"]["text"]["taken_from"] == str(tmp_path / "soft")


def test_a_run_with_nothing_in_common_is_no_start(tmp_path: Path) -> None:
    run(small_spec(), tmp_path / "soft")
    with pytest.raises(InputError, match="no stage in common"):
        run(small_spec("seed=3"), tmp_path / "other", start=tmp_path / "soft")
    with pytest.raises(InputError, match="holds no training run"):
        run(small_spec(), tmp_path / "other", start=tmp_path / "nothing")
    assert not (tmp_path / "other").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_step(tmp_path: Path) -> None:
    # a step takes 99 times each weight from it: beyond float32 after 20
    spec = small_spec("stages[text].learning_rate=10", "stages[text].weight_decay=10", "stages[text].steps=60")
    outcome = run(spec, tmp_path / "run")
    assert outcome.stopped_by is not None
    assert "stage text, step" in str(outcome.stopped_by)
    assert "learning_rate" in str(outcome.stopped_by)
    last = read_state(tmp_path / "run" / "last.pt")
    assert all(bool(tensor.isfinite().all()) for tensor in last["weights"].values())
    assert f"step {last['stage']['step'] + 1}:" in str(outcome.stopped_by)


@pytest.mark.parametrize(("resume", "message"), [(False, "run that is complete"), (True, "the run in .* is complete")])
def test_a_run_that_is_complete_is_not_run_over(tmp_path: Path, resume: bool, message: str) -> None:
    run(small_spec(), tmp_path / "run")
    with pytest.raises(InputError, match=message):
        run(small_spec(), tmp_path / "run", resume=resume)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked(), pytest.raises(InputError, match="another process trains into it"):
        run(small_spec(), tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files"):
        run(small_spec(), tmp_path / "run")


def test_a_stage_that_is_complete_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the first steps of align, before any checkpoint of that stage."""
    spec = small_spec("checkpoint_every=100")
    run(spec, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(command, "Window", Killed(4))  # a row of vision, two of text, one of align
        with pytest.raises(SystemExit):
            run(spec, tmp_path / "cut")
    assert read_state(tmp_path / "cut" / "last.pt")["stage"] is None
    (tmp_path / "cut" / "stage-text.pt").unlink()
    run(spec, tmp_path / "cut", resume=True)
    assert not (tmp_path / "cut" / "stage-text.pt").exists()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    train(small_spec(), tmp_path / "run", device="cpu", num_threads=1, count=StopAt("text", 2), say=lambda line: None)
    with pytest.raises(InputError, match=r"another YAML \(stages\[3\].steps is 6 there and 7 here\)"):
        run(small_spec("stages[instruct].steps=7"), tmp_path / "run", resume=True)
    (tmp_path / "run" / "last.pt").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(InputError, match="is damaged"):
        run(small_spec(), tmp_path / "run", resume=True)


def test_the_yaml_in_the_folder_is_that_of_the_run(tmp_path: Path) -> None:
    spec = small_spec(method=METHODS["smar"])
    run(spec, tmp_path / "run")
    assert load_train(tmp_path / "run" / "train.yaml") == spec
    assert yaml.safe_load((tmp_path / "run" / "train.yaml").read_text())["method"]["kind"] == "smar"


def test_a_trained_model_can_be_trained_further(tmp_path: Path) -> None:
    run(small_spec(), tmp_path / "first")
    more = f"model={{checkpoint: {tmp_path / 'first' / 'model'}}}"
    stage = "stages=[{name: instruct, task: multimodal, trains: [language], steps: 2, batch_size: 4,"
    stage += " learning_rate: 0.001, specialize: true}]"
    spec = load_train(TRAIN / "digits.yaml", [more, stage, "data.num_test=4", f"method={METHODS['attention']}"])
    assert run(spec, tmp_path / "second").stopped_by is None
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize("method", ["soft", "smar", "partition"])
def test_the_model_that_is_left_predicts_as_the_one_that_was_trained(tmp_path: Path, method: str) -> None:
    """Weights come back to the bit, and the gate of biases or masks with them."""
    run(small_spec(method=METHODS[method]), tmp_path / "run")
    model = load_model(ModelSource(checkpoint=str(tmp_path / "run" / "model"), dtype="float32", device="cpu"))
    assert model.name == "OLMoE on digits, soft routing"
    assert (model.modality_gate is not None) == (method != "soft")
    found = model.module.state_dict()
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(found[name], tensor), name

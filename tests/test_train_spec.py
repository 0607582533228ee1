"""Training files: loading, bases, overrides and mistakes; `epsim train` around a training that is made up here."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml

from epsim.capture.models.backbones import BACKBONES
from epsim.cli import main
from epsim.console import count_steps
from epsim.errors import EpsimError, ScenarioError
from epsim.scenario.load_train import load_train, train_yaml
from epsim.scenario.train import (
    Backbone,
    CheckpointSpec,
    DrawnModelSpec,
    PartitionSpec,
    SmarSpec,
    SmoesSpec,
    TrainSpec,
)

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "scenarios" / "train").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "model": {"backbone": "olmoe"},
    "method": {"kind": "soft"},
    "stages": [
        {"name": "text", "task": "text", "trains": ["language"], "steps": 3, "learning_rate": 0.1},
        {
            "name": "instruct",
            "task": "multimodal",
            "trains": ["projector", "language"],
            "steps": 5,
            "learning_rate": 0.1,
            "specialize": True,
        },
    ],
}


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "minimal.yaml", MINIMAL)


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(ScenarioError) as error:
        load_train(path, overrides)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


# --- what ships


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_load_and_say_the_same_written_out(path: Path, tmp_path: Path) -> None:
    spec = load_train(path)
    assert path.read_text().startswith("# ")
    (tmp_path / "out.yaml").write_text(train_yaml(spec))
    assert load_train(tmp_path / "out.yaml") == spec


def test_shipped_methods() -> None:
    specs = {path.stem: load_train(path) for path in SHIPPED}
    assert len({spec.name for name, spec in specs.items() if name != "digits"}) == len(specs) - 1  # soft is digits
    assert specs["soft"] == specs["digits"]
    smoes = {name: spec.method for name, spec in specs.items() if isinstance(spec.method, SmoesSpec)}
    assert {name: (m.objective, m.score, m.weight, m.binning) for name, m in smoes.items()} == {
        "binning": ("none", "attention", 0.0001, "adaptive"),
        "attention": ("mutual_information", "attention", 0.3, "adaptive"),
        "attention-fixed": ("mutual_information", "attention", 0.3, "fixed"),
        "gaussian": ("mutual_information", "gaussian", 0.3, "adaptive"),
        "gmm2": ("mutual_information", "gmm2", 0.3, "adaptive"),
        "hard-score": ("mutual_information", "hard", 0.3, "adaptive"),
        "kl": ("kl", "attention", 0.1, "adaptive"),
        "olmoe-full": ("mutual_information", "attention", 0.0001, "adaptive"),
        "tiny": ("mutual_information", "attention", 0.3, "adaptive"),
    }
    parts = {name: spec.method for name, spec in specs.items() if isinstance(spec.method, PartitionSpec)}
    assert {name: (m.text_experts, m.vision_experts, m.shared_experts) for name, m in parts.items()} == {
        "hard": (32, 32, 0),
        "hard-48-16": (48, 16, 0),
        "moiie": (16, 16, 32),
        "moiie-24-24-16": (24, 24, 16),
        "moiie-32-16-16": (32, 16, 16),
    }
    assert specs["smar"].method == SmarSpec(kind="smar", weight=0.1)


def test_backbones_are_those_that_can_be_run() -> None:
    assert get_args(Backbone) == tuple(BACKBONES)


# --- bases and overrides


def test_own_keys_replace_those_of_the_base_whole(tmp_path: Path) -> None:
    smoes = {"kind": "smoes", "weight": 0.5, "decay": 0.5}
    write(tmp_path / "shared" / "a.yaml", {**MINIMAL, "method": smoes, "seed": 7})
    write(tmp_path / "shared" / "b.yaml", {"base": "a.yaml", "method": {"kind": "smoes", "weight": 0.25}})
    path = write(tmp_path / "c.yaml", {"base": "shared/b.yaml", "name": "c"})
    spec = load_train(path)
    assert (spec.name, spec.seed) == ("c", 7)
    assert spec.method == SmoesSpec(kind="smoes", weight=0.25)  # the decay of a.yaml went with its method


def test_overrides_come_after_keys_and_the_command_line_last(tmp_path: Path) -> None:
    overrides = {"stages[instruct].steps": 50, "model.topk": 4, "seed": 1}
    write(tmp_path / "a.yaml", {**MINIMAL, "overrides": overrides})
    path = write(tmp_path / "b.yaml", {"base": "a.yaml", "seed": 2, "overrides": {"stages[0].steps": 30}})
    spec = load_train(path, ["stages[instruct].steps=300", "model.num_experts=16"])
    assert [stage.steps for stage in spec.stages] == [30, 300]
    assert spec.seed == 2  # a key of b.yaml over an override of its base
    assert isinstance(spec.model, DrawnModelSpec)
    assert (spec.model.topk, spec.model.num_experts) == (4, 16)


@pytest.mark.parametrize("target", ["method.kind", "method[kind]"])
def test_another_method_starts_afresh(target: str, minimal: Path) -> None:
    overrides = ["method.kind=smoes", "method.decay=0.5", f"{target}=smar", "method.weight=0.5"]
    assert load_train(minimal, overrides).method == SmarSpec(kind="smar", weight=0.5)
    kept = load_train(minimal, ["method={kind: smoes, decay: 0.5}", f"{target}=smoes"]).method
    assert kept == SmoesSpec(kind="smoes", decay=0.5)


def test_a_checkpoint_and_a_drawn_model_take_each_others_place(minimal: Path) -> None:
    drawn = ["model.hidden_size=64"]
    checkpoint = load_train(minimal, [*drawn, "model.checkpoint=owner/model"])
    assert checkpoint.model == CheckpointSpec(checkpoint="owner/model")
    for backbone in ("model.backbone", "model[backbone]"):
        again = load_train(minimal, [*drawn, "model.checkpoint=owner/model", f"{backbone}=mixtral"])
        assert again.model == DrawnModelSpec(backbone="mixtral")
    assert load_train(minimal, [*drawn, "model.backbone=mixtral"]).model == DrawnModelSpec(
        backbone="mixtral", hidden_size=64
    )


def test_paths_are_relative_to_the_file_they_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = {"train": "a.jsonl", "test": "../b.jsonl"}, {"checkpoint": "llava"}
    write(tmp_path / "shared" / "a.yaml", {**MINIMAL, "data": data, "model": model})
    (tmp_path / "shared" / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    path = write(tmp_path / "mine" / "b.yaml", {"base": "../shared/a.yaml", "overrides": {"data.test": "c.jsonl"}})
    (tmp_path / "mine" / "c.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    spec = load_train(Path("mine/b.yaml"))
    assert spec.model == CheckpointSpec(checkpoint="llava")  # a name: there is no such folder
    assert spec.data.train is not None
    assert spec.data.test == str(tmp_path / "mine" / "c.jsonl")
    assert Path(spec.data.train).samefile("shared/a.jsonl")

    (tmp_path / "shared" / "llava").mkdir()
    found = load_train(path).model
    assert isinstance(found, CheckpointSpec)
    assert Path(found.checkpoint).samefile("shared/llava")
    assert load_train(path, ["data.train=b.jsonl"]).data.train == str(
        tmp_path / "b.jsonl"
    )  # relative to where the command runs


def test_a_full_size_model_has_no_sizes_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**MINIMAL, "model": {"backbone": "olmoe", "full_size": True}})
    assert yaml.safe_load(train_yaml(load_train(path)))["model"] == {"backbone": "olmoe", "full_size": True}


# --- mistakes: path, value, rule, mend

MISTAKES = {
    # fields
    "name=5": "name: 5 is not text; write text, in quotes if it looks like a number",
    "modle=1": "modle: is not a known field; "
    'did you mean "model"?',
    "method.decay=0.5": "method.decay: is not a known field; known are balance_weight, kind",
    "stages[instruct].step=3": 'stages[1].step: is not a known field; did you mean "steps"?',
    "model.vision.patchsize=4": 'model.vision.patchsize: is not a known field; did you mean "patch_size"?',
    # kinds
    "method.kind=smoe": 'method.kind: "smoe" is not known; write one of soft, smoes, smar, partition',
    "method=soft": 'method: "soft" is not a mapping of fields; write e.g. {kind: soft}',
    "method={}": "method.kind: is missing; write one of partition, smar, smoes, soft",
    "method={kind: partition, text_experts: 32}": "method.vision_experts: is missing; write it",
    "model.backbone=olmo": 'model.backbone: "olmo" is not known; '
    "write olmoe, deepseekmoe, moonlight, qwen3-moe or mixtral",
    "model=olmoe": 'model: "olmoe" is not a mapping of fields; write e.g. {backbone: ...}',
    "model={}": "model.backbone: is missing; write one of olmoe, deepseekmoe, moonlight, qwen3-moe, mixtral",
    "model={checkpoint: a, backbone: olmoe}": "model.backbone: is not a known field; known are checkpoint",
    "model.checkpoint=''": 'model.checkpoint: "" is empty; write at least one character',
    "stages[0].task=cell": 'stages[0].task: "cell" is not known; write cells, text or multimodal',
    "stages[1].trains=[visoin]": 'stages[1].trains[0]: "visoin" is not known; write vision, projector or language',
    "stages[1].trains=vision": 'stages[1].trains: "vision" is not a list; write e.g. [vision]',
    "stages[1].trains={a: 1}": 'stages[1].trains: {"a": 1} is not a list; write one with [ ]',
    "stages=3": "stages: 3 is not a list; write e.g. [3]",
    "stages=[]": "stages: [] is empty; write at least one entry",
    "stages[0].specialize=1": "stages[0].specialize: 1 is neither true nor false; write one of them, without quotes",
    # ranges
    "seed=-1": "seed: -1 is below 0; write 0 or more",
    "stages[0].steps=0": "stages[0].steps: 0 is not above 0; write a larger number",
    "stages[0].steps=1.5": "stages[0].steps: 1.5 is not a whole number; write e.g. 1",
    "stages[0].text_only=2": "stages[0].text_only: 2 is above 1; write 1 or less",
    "stages[0].learning_rate=2e-5": 'stages[0].learning_rate: "2e-5" is not a finite number; write e.g. 0.00002',
    "stages[0].learning_rate=fast": 'stages[0].learning_rate: "fast" is not a finite number; write e.g. 0.5',
    "method={kind: smoes, decay: 1}": "method.decay: 1 is not below 1; write a smaller number",
    "model.hidden_size=65544": "model.hidden_size: 65544 is above 65536; write 65536 or less",
    "model.num_layers=1001": "model.num_layers: 1001 is above 1000; write 1000 or less",
    # what one field says of another
    "model.topk=65": "model: topk 65 must be at most num_experts 64",
    "model.hidden_size=100": "model: hidden_size 100 must be a multiple of 2 num_heads = 8",
    "model.vision.patch_size=7": "model.vision: image_size 64 must be a multiple of patch_size 7",
    "model.vision.num_heads=3": "model.vision: hidden_size 64 must be a multiple of num_heads 3",
    "model={backbone: olmoe, full_size: true, topk: 8}": "model: full_size true takes all sizes from the model card; "
    "leave topk out",
    "method={kind: smar, min_distance: 3}": "method: min_distance 3.0 must be at most max_distance 2.0",
    "method={kind: smoes, num_bins: 7}": "training: method.num_bins 7 must divide model.num_experts 64",
    "method={kind: partition, text_experts: 32, vision_experts: 16}": "training: method.text_experts 32, "
    "vision_experts 16 and shared_experts 0 are 48 together; they must be model.num_experts 64",
    "method={kind: partition, text_experts: 60, vision_experts: 4}": "training: method.vision_experts 4 and "
    "shared_experts 0 must be at least model.topk 8 together",
    "stages[0].name=instruct": "stages: instruct, instruct must be different names; name each stage once",
    "stages[0].name=a/b": 'stages[0].name: "a/b" is not a name; write letters, digits and _, a letter first',
    "stages[0].trains=[vision, language]": "stages[0]: task text reaches language alone; write trains: [language]",
    "stages[1].trains=[vision, vision]": "stages[1].trains: [vision, vision] names a part twice; write each once",
    "data={train: a.jsonl}": "data: train and test belong together; write both files, or none",
    "data={train: a.jsonl, test: b.jsonl}": 'data.train: "a.jsonl" is not a file; '
    "write the path of prompts with answers (JSONL)",
    # overrides themselves
    "seed": '--set "seed": write path=value, e.g. stages[instruct].steps=300',
    "a..b=1": '--set "a..b": not a path; write names as in stages[instruct].steps',
    "stages[x].steps=3": '--set "stages[x].steps": there is no entry x; write one of 0 to 1, text, instruct',
    "seed.x=3": '--set "seed.x": seed is 0, which has no fields; write seed=...',
    "seed=[": "--set \"seed=[\": the value is not YAML (line 1, column 2: expected the node content, but found "
    "'<stream end>'); write it as in a file",
    "base=a.yaml": '--set "base": base cannot be set; write it in a file',
    "overrides={}": '--set "overrides": overrides cannot be set; set the field itself',
}  # fmt: skip


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.yaml", {**MINIMAL, "seed": 0})
    assert mistake(path, override) == MISTAKES[override]


def test_methods_that_would_not_act(minimal: Path) -> None:
    idle = "training: method smar acts in stages with specialize: true, and there is none; write it into one"
    assert mistake(minimal, "method.kind=smar", "stages[1].specialize=false") == idle
    cells = ["stages[0].task=cells", "stages[0].trains=[vision]", "stages[0].specialize=true"]
    assert mistake(minimal, *cells) == "stages[0]: task cells has no experts; leave specialize out"


FILES = {
    "name: [1": "a.yaml: not valid YAML: line 1, column 9: expected ',' or ']', but got '<stream end>'",
    "": "a.yaml: the file is empty; write the fields of a training",
    "- 1": "a.yaml: [1] is not a mapping; write the fields of a training",
    "{}": "name: is missing; write it (and 3 more)",
    "bas: b.yaml": 'bas: is not a known field; did you mean "base"?',
    "1: x": "name: is missing; write it (and 4 more)",
    "base: 3": "a.yaml: base: 3 is not a path; write that of a training file, or leave it out",
    "base:": "a.yaml: base: null is not a path; write that of a training file, or leave it out",
    "base: b.yaml": "a.yaml: base: b.yaml: cannot be read: No such file or directory; "
    "write the path of a training file",
    "base: loop.yaml": "a.yaml: base: loop.yaml: cannot be read: Too many levels of symbolic links; "
    "write the path of a training file",
    'base: "a\\0"': r'a.yaml: base: "a\u0000" is not a path; write that of a training file, or leave it out',
    "overrides: 0": "overrides: 0 is not a mapping of paths to values; write e.g. {stages[instruct].steps: 300}",
    "base: a.yaml": 'a.yaml: base: "a.yaml" leads back to itself; write all fields into one of the files',
    "overrides: [a]": 'overrides: ["a"] is not a mapping of paths to values; write e.g. {stages[instruct].steps: 300}',
    "overrides: {stages.x: 1}": 'overrides "stages.x": there is no entry x; write one of 0 to 1, text, instruct',
}


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_wrong(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_dump(MINIMAL) + text if "stages.x" in text else text
    Path("a.yaml").write_text(written)
    Path("loop.yaml").symlink_to("loop.yaml")
    assert mistake(Path("a.yaml")) == FILES[text]


def test_bases_in_a_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a.yaml"), {"base": "sub/b.yaml"})
    write(Path("sub/b.yaml"), {"base": "../a.yaml"})
    rule = 'sub/b.yaml: base: "../a.yaml" leads back to itself; write all fields into one of the files'
    assert mistake(Path("a.yaml")) == rule


# --- the command


@dataclass
class Outcome:
    """What a training says of itself."""

    folder: Path
    num_steps: int = 8
    stopped_by: KeyboardInterrupt | EpsimError | None = None
    can_go_on: bool = True
    lines: list[str] = field(default_factory=lambda: ["all went well"])


@dataclass
class Training:
    """Stands for `epsim.specialize.command`: keeps what it was asked, and does as it is told."""

    end: Callable[[Path], Outcome] = Outcome
    asked: list[tuple[TrainSpec, Path, dict[str, Any]]] = field(default_factory=list)

    def train(self, spec: TrainSpec, folder: Path, **how: Any) -> Outcome:
        self.asked.append((spec, folder, how))
        how["say"]("stage instruct")
        with how["count"]("instruct", 5) as advance:
            advance(5, "loss 1.00")
        return self.end(folder)


@dataclass
class Cli:
    """`epsim train` in this process and in a folder of its own."""

    training: Training
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["epsim", "train", *words])
        with pytest.raises(SystemExit) as exit_info:
            main()
        printed = self.capsys.readouterr()
        return int(exit_info.value.code or 0), printed.out, printed.err


@pytest.fixture
def cli(minimal: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    monkeypatch.chdir(minimal.parent)
    training = Training()
    module = ModuleType("epsim.specialize.command")
    module.train = training.train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Cli(training, monkeypatch, capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_training_is_asked_for_what_the_options_say(cli: Cli) -> None:
    Path("first").mkdir()
    options = [
        "-o",
        "out/run",
        "--start",
        "first",
        "--resume",
        "--device",
        "cuda:1",
        "--threads",
        "2",
        "--set",
        "seed=3",
    ]
    code, out, err = cli("minimal.yaml", *options)
    assert (code, out, err) == (0, "all went well\n", "stage instruct\n")
    ((spec, folder, how),) = cli.training.asked
    assert (spec.seed, folder, how["start"]) == (3, Path("out/run"), Path("first"))
    assert (how["resume"], how["device"], how["num_threads"]) == (True, "cuda:1", 2)

    cli("minimal.yaml", "-o", "out/run")
    _, _, how = cli.training.asked[-1]
    assert (how["start"], how["resume"], how["device"], how["num_threads"]) == (None, False, "auto", None)


def test_show_prints_a_training_file_and_trains_nothing(cli: Cli) -> None:
    code, out, _ = cli("minimal.yaml", "--show", "--set", "method.kind=smar")
    assert code == 0
    Path("shown.yaml").write_text(out)
    assert load_train(Path("shown.yaml")) == load_train(Path("minimal.yaml"), ["method.kind=smar"])
    assert not cli.training.asked


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "train: no folder to write; write e.g. epsim train minimal.yaml -o out/minimal"),
        (["-o", "run", "--threads", "0"], "--threads 0: must be from 1 to 1024"),
        (["-o", "run", "--start", "x"], "--start x: is not a folder; write the one of an earlier run"),
        (["-o", "minimal.yaml"], "minimal.yaml: is not a folder; name another path"),
        (["-o", "run", "--set", "seed=x"], 'seed: "x" is not a whole number; write e.g. 1'),
    ],
)
def test_options_that_cannot_work(cli: Cli, words: list[str], line: str) -> None:
    assert cli("minimal.yaml", *words) == (2, "", f"epsim: {line}\n")
    assert not cli.training.asked
    assert not Path("run").exists()


def stopped(by: KeyboardInterrupt | EpsimError, *, can_go_on: bool = True) -> Callable[[Path], Outcome]:
    def end(folder: Path) -> Outcome:
        folder.mkdir()
        if can_go_on:
            (folder / "last.pt").touch()
        return Outcome(folder, stopped_by=by, lines=[])

    return end


def test_an_interrupted_training_says_how_to_go_on(cli: Cli) -> None:
    cli.training.end = stopped(KeyboardInterrupt())
    code, out, err = cli("minimal.yaml", "-o", "my run", "--set", "stages[0].steps=4")
    assert (code, out) == (130, "")
    way = "epsim train minimal.yaml -o 'my run' --set 'stages[0].steps=4' --resume"
    assert err == f"stage instruct\nepsim: interrupted; my run holds 8 steps; go on with: {way}\n"


def test_an_error_after_some_steps(cli: Cli) -> None:
    cli.training.end = stopped(EpsimError("no room\non the disk"))
    code, _, err = cli("minimal.yaml", "-o", "run", "--resume")
    assert code == 2
    way = "epsim train minimal.yaml -o run --resume"
    assert err.splitlines()[1:] == [f"epsim: no room on the disk; run holds 8 steps; go on with: {way}"]


def test_a_run_that_diverged_is_not_gone_on_with(cli: Cli) -> None:
    def diverged(folder: Path) -> Outcome:
        folder.mkdir()
        (folder / "stage-text.pt").touch()
        return Outcome(folder, stopped_by=EpsimError("loss is nan"), lines=[], can_go_on=False)

    cli.training.end = diverged
    code, _, err = cli("minimal.yaml", "-o", "run")
    way = "begin again into another folder, with --start run for the stages that are complete"
    assert (code, err.splitlines()[1]) == (2, f"epsim: loss is nan; run holds the last good step; {way}")


def test_interrupted_before_there_is_anything_to_go_on_from(cli: Cli) -> None:
    cli.training.end = stopped(KeyboardInterrupt(), can_go_on=False)
    code, _, err = cli("minimal.yaml", "-o", "run")
    assert (code, err.splitlines()[1]) == (130, "epsim: interrupted; run holds nothing to go on from; start again")

    def at_once(folder: Path) -> Outcome:
        os.kill(os.getpid(), signal.SIGTERM)  # as Ctrl-C
        return Outcome(folder)

    cli.training.end = at_once
    code, _, err = cli("minimal.yaml", "-o", "run")
    assert (code, err.splitlines()[1]) == (
        130,
        "epsim: interrupted before anything was done; run holds nothing new",
    )


def test_showing_loads_no_torch(minimal: Path) -> None:
    code = (
        "import sys; from epsim.cli import app; "
        f"app(['train', {str(minimal)!r}, '--show'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


def test_the_bar_says_steps_and_a_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with count_steps("instruct", 4) as advance:
        advance(1, "loss 9.00")
    assert capsys.readouterr().err == ""  # not a terminal

    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "120")
    with count_steps("instruct [a]", 4) as advance:
        advance(2, "loss 1.23")
        advance(3, "[b] loss 1.20")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "instruct [a]" in shown
    assert "3/4 steps, [b] loss 1.20" in shown

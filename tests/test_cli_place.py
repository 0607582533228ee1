"""`epsim place` and `epsim study placement`: what they print and write, and mistakes in one line."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.lab import mixed_trace, write_question
from rich.console import Console

from epsim import cli
from epsim.compare import parse_axes, with_settings
from epsim.errors import InputError
from epsim.lab.question import Choice, Question
from epsim.lab.trial import Sample, Trial, run_trial
from epsim.placement import POLICIES
from epsim.placement.file import read_placement_file
from epsim.report.heat_map import CIVIDIS, heat_map, pair_maps
from epsim.report.placement import placement_tables
from epsim.scenario import load_raw
from epsim.study.placement import WITH_PARAMETERS, PlacementStudy, run_placement_study, traces_of
from epsim.study.placement_document import BEGIN, END, write_placement_document
from epsim.study.placement_tables import sizes_table

Run = Callable[..., str]
OLMOE = Path(__file__).parent.parent / "epsim/presets/models/olmoe.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory with a trace and a scenario."""
    monkeypatch.chdir(tmp_path)
    write_question(tmp_path, mixed_trace())
    return tmp_path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `all` be three quick policies, and one that cannot be had without a parameter."""
    policies = {kind: POLICIES[kind] for kind in ("contiguous", "random", "modality_bins", "file")}
    for module in ("epsim.lab.question", "epsim.study.placement"):
        monkeypatch.setattr(f"{module}.POLICIES", policies)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line on the trace and returns what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["epsim", "place", "trace.arrow", "--scenario", "small.yaml", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        assert not exit_info.value.code, printed.err
        return printed.out

    return run


@pytest.mark.usefixtures("few")
def test_the_tables_and_the_files(folder: Path, run: Run) -> None:
    printed = run(
        "--policy", "all", "--seeds", "2", "--pairs", "--best", "bytes", "--out", "p.json", "--heat-map", "maps"
    )  # fmt: skip
    assert "fitted to 5 requests, judged on 5 others; means over 2 splits with 95 % intervals" in printed
    assert "file: left out: placement.path: is missing" in printed
    assert "a row sends, a column receives" in printed
    written = read_placement_file(folder / "p.json")
    assert (written.layer_ids, written.num_experts, written.num_devices) == ((0, 1), 8, 2)
    assert "all 10 requests of trace.arrow" in written.description
    assert (folder / "maps" / "heat-map.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_the_same_again_but_for_the_time_to_place(run: Run) -> None:
    found = [json.loads(run("--policy", "contiguous", "--policy", "random,seed=2", "--json")) for _ in range(2)]
    for values in found:
        for policy in values["policies"]:
            assert policy["metrics"].pop("time_to_place_s")["mean"] > 0
    assert found[0] == found[1]
    assert [policy["policy"] for policy in found[0]["policies"]] == ["contiguous", "random,seed=2"]
    assert found[0]["policies"][1]["placement"] == {"policy": "random", "seed": 2}


def test_one_seed_says_that_it_has_no_intervals(run: Run) -> None:
    printed = run("--policy", "contiguous", "--policy", "modality_bins", "--seeds", "1")
    assert "one split: no intervals" in printed
    assert "[" not in printed.split("routing: captured")[1]


def test_out_takes_the_first_policy_asked_for(folder: Path, run: Run) -> None:
    run("--policy", "modality_bins", "--baseline", "contiguous", "--seeds", "1", "--out", "p.json")
    assert read_placement_file(folder / "p.json").policy == "modality_bins"


MISTAKES = {
    "no policy": ((), "--policy: is missing"),
    "unknown policy": (("--policy", "best"), 'placement.policy: "best" is not known; write one of contiguous'),
    "unknown parameter": (("--policy", "contiguous,x=1"), "placement.x: is not a known field"),
    "bad parameter": (("--policy", "random,seed=-1"), "placement.seed: -1 is below 0"),
    "parameter missing": (("--policy", "file"), "placement.path: is missing"),
    "no such file": (("--policy", "file,path=no.json"), "no.json"),
    "not YAML": (("--policy", "random,seed=[1"), "is not YAML"),
    "parameter twice": (("--policy", "random,seed=1,seed=2"), "seed is there twice"),
    "policy twice": (("--policy", "random", "--policy", "random"), 'random": is there twice'),
    "bins": (("--policy", "modality_bins,num_bins=3"), "3 does not divide 8 experts"),
    "no seeds": (("--policy", "random", "--seeds", "0"), "--seeds: 0 is below 1"),
    "share": (("--policy", "random", "--fit-share", "1.5"), "1.5 is not between 0 and 1"),
    "batches": (("--policy", "random", "--set", "workload.batch_sizes=[8]"), "8 needs as many held-out requests"),
    "metric": (("--policy", "random", "--best", "price", "--out", "p.json"), "write one of bytes, devices"),
    "no second token": (
        ("--policy", "random", "--best", "tpot", "--out", "p.json", "--set", "workload.max_output_tokens=1"),
        "--best tpot: no request has a second token; write one of bytes, devices, ttft, balance",
    ),
    "best without out": (("--policy", "random", "--best", "bytes"), "name a file with --out"),
    "out is the trace": (("--policy", "random", "--out", "trace.arrow"), "is read for this"),
    "out is a policy's file": (
        ("--policy", "file,path=a.json", "--policy", "random", "--out", "./a.json"), "a.json: is read for this",
    ),
    "out is a model": (("--policy", "random", "--model", "m.yaml", "--out", "m.yaml"), "m.yaml: is read for this"),
    "out is a cluster": (("--policy", "random", "--cluster", "c.yaml", "--out", "c.yaml"), "c.yaml: is read for this"),
    "out is an override": (("--policy", "random", "--set", "@o.yaml", "--out", "o.yaml"), "o.yaml: is read for this"),
    "placement set": (("--policy", "random", "--set", "placement.policy=random"), "write policies with --policy"),
    "trace set": (("--policy", "random", "--set", "trace.kind=zipf"), "name the file as the argument"),
    "other parallelism": (("--policy", "random", "--set", "parallelism.kind=pd"), "policies are compared under ep"),
    "model of another shape": (("--policy", "random", "--set", "model.moe.topk=4"), "has top-k 2, model"),
    "uneven": (
        ("--policy", "random", "--cluster", "h100-2x8"), "8 experts do not divide over 16 devices",
    ),
    "baseline does not apply": (
        ("--policy", "all", "--baseline", "modality_bins,num_bins=3"),
        '--baseline "modality_bins,num_bins=3": placement.num_bins: 3 does not divide 8 experts',
    ),
    "baseline of all lacks a parameter": (
        ("--policy", "all", "--baseline", "file"), '--baseline "file": placement.path: is missing',
    ),
    "baseline of a replay does not apply": (
        ("--policy", "all", "--baseline", "modality_bins,num_bins=3", "--replay", "--every", "4"),
        '--baseline "modality_bins,num_bins=3": placement.num_bins: 3 does not divide 8 experts',
    ),
    "unknown cluster": (("--policy", "random", "--cluster", "h100"), 'cluster: "h100" is not a preset'),
}  # fmt: skip


def complaint(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> str:
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["epsim", "place", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert exit_info.value.code == 2
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("epsim: ")
    assert sorted(folder.rglob("*")) == before
    return printed.err


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = MISTAKES[name]
    said = complaint(("trace.arrow", "--scenario", "small.yaml", *arguments), monkeypatch, capsys, folder)
    assert words in said


def test_out_is_no_file_that_the_scenario_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own").mkdir()
    (folder / "own/card.yaml").write_text(OLMOE.read_text())
    text = (folder / "small.yaml").read_text()
    (folder / "own/s.yaml").write_text(text.replace("model: olmoe", "model: card.yaml"))
    arguments = ("trace.arrow", "--scenario", "own/s.yaml", "--policy", "random", "--out", "own/card.yaml")
    assert "--out own/card.yaml: is read for this" in complaint(arguments, monkeypatch, capsys, folder)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("trace: other.arrow", "trace is what this command sets; name the file as the argument"),
        ("trace.path: other.arrow", "trace is what this command sets; name the file as the argument"),
        ("trace: null", "trace is what this command sets; name the file as the argument"),
        ("placement: {policy: random}", "placement is what this command sets; write policies with --policy"),
        ("placement: null", "placement is what this command sets; write policies with --policy"),
    ],
)
def test_a_file_of_overrides_sets_neither_trace_nor_placement(
    field: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "other").mkdir()
    write_question(folder / "other", mixed_trace(seed=1))
    (folder / "other" / "trace.arrow").rename(folder / "other.arrow")
    (folder / "own.yaml").write_text(f"overrides: {{homes.policy: balanced, {field}}}\n")
    arguments = ("trace.arrow", "--scenario", "small.yaml", "--policy", "random", "--set", "@own.yaml")
    said = complaint(arguments, monkeypatch, capsys, folder)
    assert f'--set "@own.yaml": {words}' in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.arrow", "--policy", "random", "--cluster", "h100-2x8"), "no.arrow"),
        (("small.yaml", "--policy", "random", "--cluster", "h100-2x8"), "small.yaml: it is not an Arrow IPC file"),
        (("trace.arrow", "--policy", "random", "--cluster", "h100-2x8"), "is of 'small', which is no preset"),
        (("trace.arrow", "--policy", "random", "--model", "olmoe"), "--cluster: is missing"),
        (("trace.arrow", "--policy", "random", "--model", "olmo-1b", "--cluster", "h100-2x8"), "has no MoE layers"),
    ],
)
def test_wrong_traces_and_missing_models_are_one_line(
    arguments: tuple[str, ...],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in complaint(arguments, monkeypatch, capsys, folder)


def test_too_few_requests_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_question(folder, mixed_trace(2, 1))
    said = complaint(("trace.arrow", "--scenario", "small.yaml", "--policy", "random"), monkeypatch, capsys, folder)
    assert "3 requests are too few" in said


def test_an_interrupt_writes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epsim.lab.experiment.run_trial", interrupted)
    words = ["trace.arrow", "--scenario", "small.yaml", "--policy", "random", "--out", "p.json"]
    monkeypatch.setattr(sys, "argv", ["epsim", "place", *words])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 130
    assert "no file was written" in capsys.readouterr().err
    assert not (folder / "p.json").exists()


def test_a_grid_of_placements_takes_whole_sections(folder: Path) -> None:
    raw = load_raw(folder / "small.yaml")
    axes = parse_axes(["placement={policy: contiguous},{policy: random, seed: 3},{policy: file, path: mine.json}"])
    chosen = [with_settings(raw, {"placement": value}).placement.model_dump() for value in axes["placement"]]
    assert chosen == [
        {"policy": "contiguous"},
        {"policy": "random", "seed": 3},
        {"policy": "file", "path": "mine.json"},
    ]


def test_both_tables_have_the_same_time_to_place_and_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 1 and 3 s the median is 2 s (the later of the two is 3 s); of 1 and 4 GB the most is 4 GB (the mean 2.5 GB).
    def known(question: Question, choice: Choice, sample: Sample, *rest: Any, **words: Any) -> Trial:
        trial, first = run_trial(question, choice, sample, *rest, **words), sample.split.seed == 0
        own = {"time_to_place_s": 1.0 if first else 3.0, "replica_memory_bytes": 1e9 if first else 4e9}
        return replace(trial, values={**trial.values, **own})

    monkeypatch.setattr("epsim.lab.experiment.run_trial", known)
    words = ("--policy", "contiguous", "--seeds", "2", "--set", "workload.batch_sizes=[1]")
    found = json.loads(run(*words, "--json"))
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(placement_tables(found))
    for text in (captured.get(), sizes_table({"trace": found})):
        assert any("contiguous" in line and "4 GB" in line and "2 s" in line for line in text.splitlines())


def drawn(num_devices: int, num_policies: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    maps = rng.random((num_policies, num_devices, num_devices)) * 1e6 * (1 - np.eye(num_devices))
    maps[0, 0, 1] = 2e6  # the most
    maps[0, 1, 0] = 0.0
    return {
        "devices": [f"d{r}" for r in range(num_devices)],
        "node_of_device": [r // 2 for r in range(num_devices)],
        "design": {"num_held_out": 3},
        "trace": {"name": "t.arrow", "kind": "captured", "description": "by hand"},
        "policies": [{"policy": f"p{i}", "sent_bytes": sizes.tolist()} for i, sizes in enumerate(maps)],
    }


@pytest.mark.parametrize("num_devices", [2, 8, 32])
def test_pair_maps_show_numbers_or_tenths_of_the_most(num_devices: int) -> None:
    console = Console(width=1000)
    with console.capture() as captured:
        console.print(pair_maps(drawn(num_devices)))
    lines = captured.get().splitlines()
    first = next(line.split() for line in lines if line.startswith("    0 "))
    assert first[:3] == ["0", "-", "2.00" if num_devices <= 8 else "9"]
    if num_devices > 8:
        assert any("tenths of 2 MB, the most in any map" in line for line in lines)
    assert max(map(len, lines[3:])) < 110


def test_the_figure_is_drawn_for_many_devices_and_its_colours_are_those_of_the_terminal() -> None:
    import matplotlib

    assert heat_map(drawn(9, 2)).startswith(b"\x89PNG")
    shades = [matplotlib.colormaps["cividis"](step / 9) for step in range(10)]
    assert [matplotlib.colors.to_hex(shade) for shade in shades] == list(CIVIDIS)


def study(folder: Path, num_seeds: int = 1) -> PlacementStudy:
    return PlacementStudy(
        folder=Path("out"), scenarios=(Path("small.yaml"),), traces=traces_of(Path(".")), num_seeds=num_seeds
    )


@pytest.mark.usefixtures("few")
def test_a_study_runs_what_is_not_done_and_fills_its_document(folder: Path, run: Run) -> None:
    asked = [word for policy in ("all", *WITH_PARAMETERS) for word in ("--policy", policy)]
    (folder / "values.json").write_text(run(*asked, "--seeds", "1", "--json"))
    (folder / "stub.py").write_text("import sys, pathlib\nprint(pathlib.Path('values.json').read_text())\n")
    said: list[str] = []
    program = (sys.executable, "stub.py")
    cases, failures = run_placement_study(study(folder), jobs=1, say=said.append, program=program)
    assert not failures
    assert "1 of 1 comparisons to run" in said[0]
    assert not list(study(folder).tasks())
    assert len(list(study(folder, num_seeds=3).tasks())) == 1  # values of other splits
    captured = (folder / "trace.arrow").read_bytes()
    assert cases[Path("small.yaml"), Path("trace.arrow")]["trace"]["sha256"] == hashlib.sha256(captured).hexdigest()
    write_question(folder, mixed_trace(seed=1))  # another capture of that name and size
    assert len(list(study(folder).tasks())) == 1
    (folder / "trace.arrow").write_bytes(captured)

    (folder / "doc.md").write_text(f"before\n{BEGIN}\nformer\n{END}\nafter\n")
    paths = write_placement_document(folder / "doc.md", cases, "epsim study placement -o out")
    text = (folder / "doc.md").read_text()
    assert text.startswith(f"before\n{BEGIN}")
    assert text.endswith(f"{END}\nafter\n")
    assert "former" not in text
    assert "`epsim study placement -o out`" in text
    assert "| `contiguous` |" in text
    assert "`file` (placement.path: is missing" in text
    assert folder / "images" / "placement-small.png" in paths
    assert write_placement_document(folder / "doc.md", cases, "epsim study placement -o out")
    assert (folder / "doc.md").read_text() == text


@pytest.mark.usefixtures("few")
def test_a_study_says_what_failed(folder: Path) -> None:
    (folder / "stub.py").write_text("import sys\nprint('epsim: it broke', file=sys.stderr)\nsys.exit(2)\n")
    cases, failures = run_placement_study(
        study(folder), jobs=1, say=lambda line: None, program=(sys.executable, "stub.py")
    )
    assert not cases
    assert "it broke" in failures[0]


def test_a_document_without_marks_is_refused(folder: Path) -> None:
    (folder / "doc.md").write_text(f"{BEGIN}\n")
    with pytest.raises(InputError, match="lacks <!-- epsim study placement: end -->"):
        write_placement_document(folder / "doc.md", {}, "")
    with pytest.raises(InputError, match="cannot be read"):
        write_placement_document(folder / "no.md", {}, "")
    with pytest.raises(InputError, match="has no traces"):
        traces_of(folder / "nowhere")

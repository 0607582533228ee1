"""The study of training methods: its children, what is measured of a run, means over seeds, the page, and errors."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.captured import by_hand, captured_like

from epsim import cli
from epsim.errors import InputError, OutputError
from epsim.interrupt import stop_at_hangup
from epsim.report.evolution import expert_colour
from epsim.report.routing_panels import MODALITY_COLOURS, NOTHING_COLOUR
from epsim.scenario.load_train import train_yaml
from epsim.study import children, claims, sections
from epsim.study.children import Task, run_tasks
from epsim.study.document import document, write_document
from epsim.study.measure import measure
from epsim.study.methods import METHODS, choose, published_specialisation
from epsim.study.plan import NUM_REQUESTS, Study, StudyFolder, shortened
from epsim.study.published import table_s10, time_changes, transfer_changes
from epsim.study.specialise import progress, run_study
from epsim.study.summary import Estimate, Summary, msi, ratio
from epsim.study.summary import time as simulated
from epsim.study.times import BASELINE, BATCH_SIZES, SETTINGS, simulated_times
from epsim.trace import RoutingTrace
from epsim.trace.file import TraceWriter

ROOT = Path(__file__).parent.parent
CONFIG, SCENARIO = ROOT / "scenarios" / "train", ROOT / "scenarios" / "digits.yaml"

# Stands for epsim: a training leaves what the study reads of one, a capture a copy of a trace. Words in FAIL fail.
STUB = """\
import json, os, pathlib, shutil, signal, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
target = pathlib.Path(words[words.index("-o") + 1])
case = f"{target.parent.name}-{target.stem}"
with (here / "calls.txt").open("a") as file:
    file.write(json.dumps(words) + chr(10))
if (here / "FAIL").exists() and case in (here / "FAIL").read_text().split():
    print("working"); print("epsim: it broke", file=sys.stderr); sys.exit(2)
if (here / "SLOW").exists():
    def stop(number, frame):
        (here / "stopped.txt").write_text("once"); sys.exit(130)
    signal.signal(signal.SIGTERM, stop)
    (here / "started.txt").touch(); time.sleep(60)
if words[0] == "trace":
    shutil.copy(here / "trace.arrow", target)
else:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / f"{case}.yaml", target / "train.yaml")
    found = {"accuracy": 0.5, "standard_error": 0.1, "num_prompts": 25}
    stage = {"steps": 1, "seconds": 60.0, "image": found, "text": found}
    ran_on = {"device": "cpu", "dtype": "float32", "torch": "2", "transformers": "5", "epsim": "0.1.0"}
    results = {"stages": {"instruct": stage}, "num_parameters": 10**6, "ran_on": ran_on}
    (target / "results.json").write_text(json.dumps(results))
"""


def write(path: Path, trace: RoutingTrace) -> Path:
    with TraceWriter(path, trace.meta) as writer:
        writer.write(trace)
    return path


def made_up(num_requests: int = NUM_REQUESTS) -> RoutingTrace:
    return captured_like(layer_ids=(0, 1), num_experts=8, topk=2, num_requests=num_requests, lengths=(6, 3, 2))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(folder=StudyFolder(tmp_path / "out"), methods=("soft", "smar"), num_seeds=2, config=CONFIG)


@pytest.fixture
def stub(tmp_path: Path, study: Study) -> tuple[str, ...]:
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "stub.py").write_text(STUB)
    for seed, method in study.cases:
        (folder / f"seed-{seed}-{method}.yaml").write_text(train_yaml(study.spec(seed, method)))
    write(folder / "trace.arrow", made_up())
    return sys.executable, str(folder / "stub.py")


def calls(stub: Sequence[str]) -> list[list[str]]:
    path = Path(stub[1]).parent / "calls.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(study: Study, stub: Sequence[str], jobs: int = 4) -> tuple[list[str], list[str]]:
    """Run the tasks and return the failures, and all that was said."""
    said: list[str] = []
    failures = run_tasks(study.tasks(), program=stub, jobs=jobs, say=said.append, poll_s=0.01)
    return failures, said


# children


def test_soft_comes_first_and_the_others_start_from_it(study: Study, stub: tuple[str, ...]) -> None:
    failures, said = run(study, stub)
    assert not failures
    assert len(said) == 8  # two seeds, two methods, training and capture
    assert {line.split()[0] for line in said} == {f"[{i}/8]" for i in range(1, 9)}
    asked = calls(stub)
    for seed in range(2):
        base, other = (str(study.folder.run(seed, method)) for method in study.methods)
        trained = [words for words in asked if words[0] == "train" and f"seed={seed}" in words]
        assert [words[words.index("-o") + 1] for words in trained] == [base, other]
        assert "--start" not in trained[0]
        assert trained[1][trained[1].index("--start") + 1] == base
        assert all(words[words.index("--threads") + 1] == "1" for words in trained)
    captured = [words for words in asked if words[0] == "trace"]
    assert captured[0][captured[0].index("--builtin") + 1] == "scenes"


def test_what_is_complete_is_not_run_again(study: Study, stub: tuple[str, ...]) -> None:
    run(study, stub)
    assert study.tasks() == []
    study.folder.trace(1, "smar").unlink()
    (again,) = study.tasks()
    assert (again.arguments[0], again.needs) == ("trace", None)


def test_an_incomplete_training_is_resumed(study: Study, stub: tuple[str, ...]) -> None:
    run(study, stub)
    folder = study.folder.run(0, "smar")
    (folder / "results.json").unlink()
    (folder / "last.pt").touch()
    training, capture = study.tasks()
    assert "--resume" in training.arguments
    assert "--start" not in training.arguments
    assert training.leaves == study.folder.trace(0, "smar")  # the earlier trace goes away
    assert capture.needs == training.label


def test_a_trace_of_fewer_requests_is_captured_again(study: Study, stub: tuple[str, ...]) -> None:
    run(study, stub)
    write(study.folder.trace(0, "soft"), made_up(NUM_REQUESTS - 1))
    assert [task.label for task in study.tasks()] == ["seed 0, soft, trace"]


def test_a_run_of_another_training_file_is_in_the_way(study: Study, stub: tuple[str, ...]) -> None:
    run(study, stub)
    other = Study(
        folder=study.folder, methods=study.methods, num_seeds=2, config=CONFIG, overrides=("stages[instruct].steps=7",)
    )
    with pytest.raises(InputError, match=r"seed-0/soft: holds a run of another training file; remove it, or name ano"):
        other.tasks()


def test_a_failure_is_one_line_and_the_others_go_on(study: Study, stub: tuple[str, ...]) -> None:
    (Path(stub[1]).parent / "FAIL").write_text("seed-0-soft seed-1-smar")
    failures, said = run(study, stub)
    log = study.folder.log(0, "soft", "train")
    assert f"seed 0, soft, training: failed: epsim: it broke (all of it: {log})" in failures
    assert "seed 0, smar, training: not run, for this failed: seed 0, soft, training" in failures
    assert "seed 0, smar, trace: not run, for this failed: seed 0, smar, training" in failures
    assert len(failures) == 4 + 2  # all of seed 0 but for nothing, training and capture of the other
    assert study.has_trace(1, "soft")
    assert progress(study).endswith("holds 1 of 4 trained models and 1 traces")
    assert any(line.startswith("[8/8]") for line in said)


def test_a_failed_task_leaves_nothing(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.touch()
    task = Task(label="one", arguments=("-c", "import sys; sys.exit(3)"), log=tmp_path / "log", leaves=left)
    failures = run_tasks([task], program=[sys.executable], jobs=1, say=lambda line: None, poll_s=0.01)
    assert failures == [f"one: failed: exit code 3 (all of it: {tmp_path / 'log'})"]
    assert not left.exists()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    task = Task(label="one", arguments=("-c", ""), log=tmp_path / "log" / "one.txt")
    with pytest.raises(OutputError, match=r"log/one.txt: cannot be written: "):
        run_tasks([task], program=[sys.executable], jobs=1, say=lambda line: None, poll_s=0.01)


def test_no_more_children_than_jobs(tmp_path: Path) -> None:
    # Each notes when it begins and ends; with two at once, of six, never more than two are under way.
    script = tmp_path / "note.py"
    script.write_text(
        "import sys, time\n"
        f"note = open({str(tmp_path / 'notes')!r}, 'a')\n"
        "print(1, file=note, flush=True); time.sleep(0.05); print(-1, file=note, flush=True)\n"
    )
    tasks = [Task(label=str(i), arguments=(), log=tmp_path / f"{i}.log") for i in range(6)]
    run_tasks(tasks, program=[sys.executable, str(script)], jobs=2, say=lambda line: None, poll_s=0.01)
    under_way = np.cumsum([int(line) for line in (tmp_path / "notes").read_text().split()])
    assert len(under_way) == 12
    assert under_way.max() <= 2


def test_an_interrupt_stops_the_children_once(
    study: Study, stub: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(stub[1]).parent
    (folder / "SLOW").touch()
    nap = time.sleep

    def interrupted(seconds: float) -> None:
        if (folder / "started.txt").exists():
            raise KeyboardInterrupt
        nap(seconds)

    monkeypatch.setattr(children.time, "sleep", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(study, stub, jobs=1)
    assert time.monotonic() - began < 20
    assert (folder / "stopped.txt").read_text() == "once"


@pytest.mark.parametrize(("before", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_lost_terminal_stops_a_study_but_under_nohup(before: signal.Handlers, stops: bool) -> None:
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
            stop_at_hangup()
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_paths_in_the_working_directory_are_seen_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shortened(tmp_path / "out" / "study") == Path("out/study")
    assert shortened(Path("out")) == Path("out")
    assert shortened(tmp_path.parent / "out") == tmp_path.parent / "out"


# what is measured


def folder_of_run(tmp_path: Path) -> Path:
    stage = {"image": {"accuracy": 0.5, "standard_error": 0.1, "num_prompts": 25}}
    stage["text"] = {"accuracy": None, "standard_error": None, "num_prompts": 0}  # type: ignore[dict-item]
    stages = {"text": {"seconds": 5.0, "taken_from": "soft"}, "instruct": {"seconds": 2.0, **stage}}
    results = {"stages": stages, "ran_on": {"device": "cpu"}, "num_parameters": 7}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_measures_of_a_run_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Top-2 of 4 experts. Vision picks 0 and 1 (4 pairs); text 2 and 3 twice, 0 and 3 in decode: [1, 0, 2, 3] of 6.
    both, ends = (0.5, 0.5), [("V", (0, 1)), ("V", (0, 1)), ("T", (2, 3)), ("T", (2, 3)), ("D", (0, 3))]
    trace = write(tmp_path / "t.arrow", by_hand([(kind, experts, both) for kind, experts in ends]))
    monkeypatch.setattr("epsim.study.measure.simulated_times", lambda scenario, trace: [])
    found = measure(folder_of_run(tmp_path), trace, SCENARIO, stage="instruct")
    # Affiliation with text: 1/6 / (1/2 + 1/6) = 1/4, 0, 1, 1; scores -1/2, -1, 1, 1: MSI 3.5 / 4.
    assert found["msi"] == pytest.approx(0.875)
    assert found["msi_by_layer"] == pytest.approx([0.875])
    assert found["num_one_sided_experts"] == 3
    assert found["idle_experts_frac"] == 0
    assert found["accuracy"]["image"]["accuracy"] == 0.5
    assert found["seconds"] == 2.0  # without the stage that was taken from another run
    # Bins: experts 0, 1 on one device with the prefill, 2, 3 on the other with the decode.
    bins = found["placements"]["modality_bins"]
    assert bins["transfer_ratio"]["without_dedup"] == pytest.approx(
        {"prefill_vision": 0.0, "prefill_text": 1.0, "prefill_all": 0.5, "decode_text": 0.5}
    )
    (vision,), (text,) = bins["prefill_devices"], bins["decode_devices"]
    assert {vision, text} == {0, 1}
    assert bins["device_share"]["prefill"][vision] == pytest.approx(4 / 8)
    assert bins["device_share"]["decode"][vision] == pytest.approx(1 / 2)
    assert bins["device_share"]["all"][text] == pytest.approx(5 / 10)
    assert bins["device_balancedness"] == pytest.approx({"prefill": 1.0, "decode": 1.0, "all": 1.0})


def test_times_are_of_every_setting_and_batch_size(tmp_path: Path) -> None:
    rows = simulated_times(SCENARIO, write(tmp_path / "t.arrow", made_up(9)))
    sizes = [size for size in BATCH_SIZES if size <= 9]
    assert [(row["setting"], row["batch_size"]) for row in rows] == [
        (name, size) for name in SETTINGS for size in sizes
    ]
    assert all(row["ttft_s"] > 0 and row["tpot_s"] > 0 for row in rows)
    times = {(row["setting"], row["batch_size"]): row["ttft_s"] for row in rows}
    assert times[BASELINE, 8] > times[BASELINE, 1]  # nine batches of one, one batch of eight


def test_results_that_lack_the_stage_are_one_line(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.arrow", made_up(2))
    with pytest.raises(
        InputError, match=r"results.json: has no 'other', as a run with stage other has; train the run a"
    ):
        measure(folder_of_run(tmp_path), trace, SCENARIO, stage="other")
    for damaged in ("{", "[]", '{"stages": 3}', '{"stages": {"instruct": {}}}'):
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(InputError, match="train the run anew"):
            measure(tmp_path, trace, SCENARIO, stage="instruct")


# means over seeds


def test_estimates_by_hand() -> None:
    # 1, 2, 6: mean 3, squares of differences 4 + 1 + 9 = 14, variance 7, standard error sqrt(7 / 3).
    found = Estimate.of([1.0, 2.0, 6.0])
    assert (found.mean, found.standard_error) == (3.0, pytest.approx((7 / 3) ** 0.5))
    assert found.text(2) == "3.00 ± 1.53"
    assert Estimate.of([0.25]).text(1, 100, "+") == "+25.0"


def made_up_run(seed: int, method: str, *, msi: float, vision: float, ttft_s: float) -> dict[str, Any]:
    """Return a run whose modality bins leave a share `vision` of vision pairs remote, half of them in order."""

    def placed(share: float) -> dict[str, Any]:
        columns = {"prefill_vision": share, "prefill_text": 0.75, "prefill_all": 0.5, "decode_text": 0.25}
        return {
            "transfer_ratio": {"without_dedup": columns, "with_dedup": dict.fromkeys(columns, 0.9)},
            "prefill_devices": [1],
            "decode_devices": [0],
            "device_share": {"prefill": [0.25, 0.75], "decode": [0.5, 0.5], "all": [0.375, 0.625]},
            "device_balancedness": {"prefill": 0.667, "decode": 1.0, "all": 0.8},
        }

    times = [
        {"setting": name, "batch_size": size, "ttft_s": ttft_s * (1 if name == BASELINE else 0.8), "tpot_s": 0.1}
        for name in SETTINGS
        for size in BATCH_SIZES
    ]
    found = {"accuracy": 0.5 + 0.1 * (method == "smar"), "standard_error": 0.02, "num_prompts": 600}
    return {
        "seed": seed, "method": method, "seconds": 90.0, "num_parameters": 1_250_000,
        "ran_on": {"device": "cpu", "dtype": "float32", "torch": "2", "transformers": "5", "epsim": "0.1.0"},
        "layer_ids": [0, 1], "msi": msi, "msi_by_layer": [msi + 0.1, msi - 0.1],
        "mrd_distance_nats": None, "mrd_distance_nats_by_layer": [None, 1.0],
        "mrd_distance_smoothed_nats": 1.5, "mrd_distance_smoothed_nats_by_layer": [2.0, 1.0],
        "idle_experts_frac": 0.125,
        "num_one_sided_experts": int(method == "smar"), "num_one_sided_experts_by_layer": [0, 0],
        "accuracy": {"image": found, "text": found},
        "placements": {"contiguous": placed(0.5), "modality_bins": placed(vision)},
        "times": times,
    }  # fmt: skip


def made_up_study(study: Study) -> dict[str, Any]:
    runs = [
        made_up_run(0, "soft", msi=0.3, vision=0.4, ttft_s=1.0),
        made_up_run(0, "smar", msi=0.5, vision=0.2, ttft_s=1.0),
        made_up_run(1, "soft", msi=0.4, vision=0.4, ttft_s=2.0),
        made_up_run(1, "smar", msi=0.7, vision=0.1, ttft_s=2.0),
    ]
    return {
        "date": "2026-01-02", "folder": "out/study", "config": "scenarios/train", "scenario": "scenarios/digits.yaml",
        "overrides": [], "seeds": [0, 1], "methods": {name: METHODS[name] for name in study.methods},
        "stages": dict.fromkeys(study.methods, "instruct"), "num_requests": 64,
        "training": study.spec(0, "soft").model_dump(mode="json"),
        "baseline": {"method": "soft", "setting": BASELINE}, "runs": runs, "failures": [],
    }  # fmt: skip


@pytest.fixture
def summary(study: Study) -> Summary:
    return Summary(made_up_study(study))


def test_changes_are_against_the_same_seed(summary: Summary) -> None:
    found = summary.over_seeds("smar", msi)
    assert found == Estimate.of([0.5, 0.7])
    # Of seed 0: 0.2 / 0.5 - 1 = -0.6; of seed 1: 0.1 / 0.5 - 1 = -0.8.
    cell = ("without_dedup", "prefill_vision")
    change = summary.against_baseline("smar", ratio("modality_bins", *cell), ratio("contiguous", *cell))
    assert change is not None
    assert (change.mean, change.standard_error) == (pytest.approx(-0.7), pytest.approx(0.1))
    faster = summary.against_baseline("smar", simulated("bins, sync", 1, "ttft_s"), simulated(BASELINE, 1, "ttft_s"))
    assert faster is not None
    assert (faster.mean, faster.standard_error) == (pytest.approx(-0.2), pytest.approx(0, abs=1e-12))
    assert [one and one.mean for one in summary.layers("smar", "mrd_distance_nats")] == [None, 1.0]
    assert summary.over_seeds("kl", msi) is None


def test_sentences_follow_from_the_figures(summary: Summary) -> None:
    assert claims.above_soft(summary) == "Each of the 1 other methods has a higher MSI than soft routing."
    # Soft .35 < SMAR .6 here, .205 < .485 in the paper.
    assert claims.order_of_methods(summary).startswith("Of the 1 pairs of methods that the paper's MSI tells apart, 1 ")
    assert claims.infinite_distances(summary).endswith(": `smar`.")
    # 0.1 in errors of sqrt(2) x 0.02 / sqrt(2 seeds) = 0.02: 5 of them.
    assert "2 exceed 2 standard errors" in claims.accuracy_differences(summary)
    assert "`smar`, image (+5.0)" in claims.accuracy_differences(summary)
    assert claims.prompt_error(summary, "soft", "image") == pytest.approx(0.02)  # however many seeds
    assert "`soft`, contiguous: 50.0 %; `soft`, modality bins: 40.0 %" in claims.placement_alone(summary)
    assert "from 62 % (`smar`) to 62 % (`soft`)" in claims.uneven_devices(summary)
    assert claims.transfer_signs(summary) == ""  # SMAR is not in table S10


def test_fewer_than_soft_are_named(study: Study) -> None:
    content = made_up_study(study)
    for run in content["runs"]:
        run["msi"] = 0.2 if run["method"] == "smar" else 0.3
    summary = Summary(content)
    assert claims.above_soft(summary).startswith("0 of the 1 other methods have a higher MSI")
    assert "0 stand in the same order here (0 %" in claims.order_of_methods(summary)


# published figures


def test_every_method_has_its_training_file_and_its_row() -> None:
    assert set(published_specialisation()) == set(METHODS)
    assert all((CONFIG / f"{name}.yaml").is_file() for name in METHODS)
    assert published_specialisation()["gmm2"].msi is None
    assert published_specialisation()["attention"].msi == 0.62


def test_published_changes_by_hand() -> None:
    # MMMU: 42.7 -> 8.8 without dedup; S11: TTFT 2.810 -> 2.519 s at batch 1.
    assert transfer_changes("attention-soft")["without_dedup", "prefill_vision"][0] == pytest.approx(8.8 / 42.7 - 1)
    assert time_changes(1, "ttft_s")["MMMU"] == pytest.approx(2.519 / 2.810 - 1)
    assert table_s10("MMMU", "baseline")["with_dedup", "prefill_all"] == pytest.approx(0.98)


def test_chosen_methods() -> None:
    assert choose("kl, gaussian") == ("soft", "gaussian", "kl")
    with pytest.raises(InputError, match='--methods: "gausian" is not a method; write some of soft,binning'):
        choose("gausian,kl")


# the page


def test_the_page_says_what_the_study_holds(study: Study) -> None:
    content = made_up_study(study)
    text = document(content, Path("docs/specialise.md"), {"specialise-msi-by-layer.png"})
    assert "| `smar` | SMAR [1.5, 2.0] | 0.600 ± 0.100 | 0.485 | table 1 | 12.5 ± 0.0 | 1.50 ± 0.00 |" in text
    assert "| `smar` | bins, async | -20.0 ± 0.0 |" in text
    assert "| MMMU | -10.4 | -22.0 | -22.6 |" in text
    assert "6.0 minutes of training" in text
    assert "1.25 million parameters" in text
    assert "(../scenarios/digits.yaml)" in text
    assert "`epsim study specialise -o out/study --seeds 2 --methods soft,smar --docs docs/specialise.md`" in text
    assert "images/specialise-msi-by-layer.png" in text
    assert "specialise-evolution.png" not in text  # there is none
    assert "Incomplete" not in text
    assert not [line for line in text.splitlines() if "{" in line]
    assert text == document(made_up_study(study), Path("docs/specialise.md"), {"specialise-msi-by-layer.png"})


def test_missing_runs_are_said(study: Study) -> None:
    content = made_up_study(study)
    content["runs"] = content["runs"][:1] + content["runs"][2:3]
    text = document(content, Path("docs/specialise.md"), ())
    assert "**Incomplete: 2 of 4 runs are missing.**" in text
    content["runs"] = made_up_study(study)["runs"][1::2]  # without soft routing
    text = document(content, Path("docs/specialise.md"), ())
    assert "| `smar` | bins, async | - |" in text


def test_rows_for_the_screen(summary: Summary) -> None:
    rows = sections.table_rows(summary)
    assert all(len(row) == len(sections.COLUMNS) for row in rows)
    assert rows[1][:5] == ("smar", "0.600 ± 0.100", "60.0 ± 0.0", "60.0 ± 0.0", "15.0 ± 5.0")


def test_experts_have_the_colour_that_they_end_with() -> None:
    assert expert_colour(np.array([-1.0, 0.9])) == MODALITY_COLOURS["text"]
    assert expert_colour(np.array([0.5, -0.9, np.nan])) == MODALITY_COLOURS["vision"]
    assert expert_colour(np.array([1.0, 0.1])) == NOTHING_COLOUR
    assert expert_colour(np.array([np.nan])) == NOTHING_COLOUR


# all of it


def test_from_children_to_the_page(study: Study, stub: tuple[str, ...], tmp_path: Path) -> None:
    study, said = dataclasses.replace(study, num_seeds=1), list[str]()
    outcome = run_study(study, SCENARIO, jobs=4, say=said.append, program=stub)
    content = json.loads(study.folder.study.read_text())
    assert content == outcome.study
    assert [(run["seed"], run["method"]) for run in content["runs"]] == study.cases
    assert content["stages"] == {"soft": "instruct", "smar": "instruct"}
    again = run_study(study, SCENARIO, jobs=4, say=said.append, program=stub)
    assert len(calls(stub)) == 4
    assert {**again.study, "date": ""} == {**outcome.study, "date": ""}

    scores_WLE = np.linspace(-1, 1, 3 * 2 * 8, dtype=np.float32).reshape(3, 2, 8)
    for seed, method in study.cases:
        with (study.folder.run(seed, method) / "experts.npz").open("wb") as file:
            np.savez(file, stage=np.array(["align", "instruct", "instruct"]), step=[10, 10, 20], score_WLE=scores_WLE)
    written = write_document(tmp_path / "docs" / "page.md", outcome.study, study.folder)
    names = [path.name for path in written]
    assert names == [
        "specialise-msi-by-layer.png",
        "specialise-mrd-by-layer.png",
        "specialise-evolution.png",
        "specialise-routing-soft.png",
        "page.md",
    ]
    text = written[-1].read_text()
    assert all(f"(images/{name})" in text for name in names[:-1])


def test_nothing_complete_is_an_error(study: Study, stub: tuple[str, ...]) -> None:
    (Path(stub[1]).parent / "FAIL").write_text("seed-0-soft seed-1-soft")
    with pytest.raises(InputError, match="out: no run is complete, so there is nothing to measure"):
        run_study(study, SCENARIO, jobs=2, say=lambda line: None, program=stub)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "study: no folder to write; write e.g. epsim study specialise -o out/study"),
        (("-o", "out", "--methods", "x"), '--methods: "x" is not a method; write some of soft,'),
        (("-o", "out", "--config", "nowhere"), "nowhere: is not there; run in the root of epsim's repository, or"),
        (("-o", "out", "--config", str(CONFIG), "--scenario", "no.yaml"), "no.yaml: is not there; run in the root"),
        (
            ("-o", "out", "--config", str(CONFIG), "--scenario", "file.txt"),
            "file.txt: the file is empty; write the fields",
        ),
        (
            ("-o", "out", "--config", str(CONFIG), "--scenario", str(SCENARIO), "--docs", "."),
            ".: it is a directory; name",
        ),
        (
            ("-o", "out", "--config", str(CONFIG), "--scenario", str(SCENARIO), "--set", "seed=3"),
            "write how many with --s",
        ),
        (
            ("-o", "out", "--config", str(CONFIG), "--scenario", str(SCENARIO), "--set", "method[kind]=soft"),
            "methods are",
        ),
        (("-o", "file.txt", "--config", str(CONFIG), "--scenario", str(SCENARIO)), "file.txt: is not a folder"),
        (("-o", "out", "--config", str(CONFIG), "--scenario", str(SCENARIO), "--set", "x=1"), "x: is not a known"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    monkeypatch.setattr(sys, "argv", ["epsim", "study", "specialise", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

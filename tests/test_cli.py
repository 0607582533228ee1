"""The command line: what it prints, what it writes, and that both are the same every time."""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from epsim import __version__, cli
from epsim.trace import check_trace
from epsim.trace.file import TraceFile

ROOT = Path(__file__).parent.parent
# Two decode steps (the third output token ends the request); 2 + 3 = 5 prompt tokens; OLMoE has 16 MoE layers, top-8.
SCENARIO = """\
name: 'tiny [/bold] :smile:'
model: olmoe
cluster: orin-2x-10gbe
trace: {kind: uniform, vision_tokens: 2, text_tokens: 3, output_tokens: 3}
homes: {policy: by_modality}
transmission: {mode: async, num_chunks: 2}
workload: {batch_sizes: [1, 2], num_batches: 2}
"""
NUM_STEPS = 2 * 2 * 3  # batch sizes x batches x (prefill and two decode steps)
Run = Callable[..., str]


@pytest.fixture
def epsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command line in an empty folder with tiny.yaml and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")  # of no effect: the output is not a terminal
    (tmp_path / "tiny.yaml").write_text(SCENARIO)

    def run(*arguments: str, says: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["epsim", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        printed = capsys.readouterr()
        assert (exit_info.value.code, printed.err) == (0, says)
        return printed.out

    return run


def process(*arguments: str, cwd: Path) -> bytes:
    """Return what the command prints on stdout in a process of its own."""
    command = [sys.executable, "-m", "epsim.cli", *arguments]
    return subprocess.run(command, capture_output=True, check=True, cwd=cwd).stdout


def test_version_and_help(epsim: Run) -> None:
    assert epsim("--version") == f"epsim {__version__}\n"
    for command in ("simulate", "compare", "scenario", "trace"):
        assert command in epsim("--help")
    for group, names in {"scenario": ("schema", "show"), "trace": ("info", "check", "export", "make", "stats")}.items():
        text = epsim(group, "-h")
        assert all(name in text for name in names)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['epsim', '--help']\nimport epsim.cli\n"
        "try:\n    epsim.cli.main()\nexcept SystemExit:\n    pass\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "simulate" in done.stdout
    heavy = {"torch", "numba", "scipy", "networkx", "pyarrow", "numpy", "pydantic", "simpy", "pandas", "matplotlib"}
    assert not heavy & set(done.stderr.split())


def test_unknown_option_is_bad_input() -> None:
    command = [sys.executable, "-m", "epsim.cli", "simulate", "--speed"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "--speed" in done.stderr
    assert "Traceback" not in done.stderr


# simulate


def test_tables(epsim: Run) -> None:
    text = epsim("simulate", "tiny.yaml")
    assert text.startswith("tiny [/bold] :smile:\n")  # a name is no markup
    for heading in (
        "OLMoE-1B-7B-0125 on orin-2x-10gbe; ep; placement contiguous, async in 2 chunks, dedup device, fidelity event",
        "homes: prefill on orin0, decode on orin1",
        "routing: SYNTHETIC: ",
        "Latency and throughput (means over requests)",
        "Transfer ratios in %",
        "Where the prefill goes",
        "Where a decode step goes",
        "Busiest links",
        "Memory of the fullest device",
    ):
        assert heading in text, heading
    assert "…" not in text
    assert "\x1b" not in text


def test_one_output_token_has_no_decode_table(epsim: Run) -> None:
    text = epsim("simulate", "tiny.yaml", "--set", "workload.max_output_tokens=1")
    assert "Where the prefill goes" in text
    assert "Where a decode step goes" not in text


def test_a_drawn_trace_in_a_file_stays_synthetic(epsim: Run) -> None:
    epsim("trace", "make", "tiny.yaml", "-o", "t.trace", says="wrote t.trace\n")
    text = epsim("simulate", "tiny.yaml", "--set", "trace=t.trace")
    assert "routing: SYNTHETIC: " in text


def test_json_is_results_json(epsim: Run, tmp_path: Path) -> None:
    says = "wrote " + ", ".join(str(Path("out") / name) for name in ("results.json", "steps.parquet", "timeline.json"))
    printed = epsim("simulate", "tiny.yaml", "--json", "--out", "out", says=says + "\n")
    assert printed == (tmp_path / "out" / "results.json").read_text()
    results = json.loads(printed)
    assert [size["batch_size"] for size in results["batch_sizes"]] == [1, 2]
    assert results["trace"]["origin"] == "synthetic"
    assert results["scenario"]["cluster"]["links"][0]["bandwidth"] == "9.41 Gbit/s"


def test_same_seed_same_bytes_in_two_processes(epsim: Run, tmp_path: Path) -> None:
    """Another process has other hash seeds; files and tables must not show it."""
    for folder in ("a", "b"):
        process("simulate", "tiny.yaml", "--out", folder, cwd=tmp_path)
    for name in ("results.json", "steps.parquet", "timeline.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert process("simulate", "tiny.yaml", cwd=tmp_path).decode() == epsim("simulate", "tiny.yaml")


def test_files_of_a_run_are_only_the_three(epsim: Run, tmp_path: Path) -> None:
    process("simulate", "tiny.yaml", "--out", "deep/er", cwd=tmp_path)
    found = sorted(path.name for path in (tmp_path / "deep" / "er").iterdir())
    assert found == ["results.json", "steps.parquet", "timeline.json"]


@pytest.mark.parametrize("fidelity", ["event", "analytic"])
def test_steps_parquet(fidelity: str, epsim: Run, tmp_path: Path) -> None:
    process("simulate", "tiny.yaml", "--out", "out", "--set", f"simulation.fidelity={fidelity}", cwd=tmp_path)
    columns = {
        name: np.array(values) for name, values in pq.read_table(tmp_path / "out" / "steps.parquet").to_pydict().items()
    }
    assert len(columns["step"]) == NUM_STEPS * 2  # two devices
    parts = [name for name in columns if name.endswith("_s") and name not in ("start_s", "duration_s", "kv_exposed_s")]
    assert "dispatch_s" in parts
    total = sum(columns[name] for name in parts)
    np.testing.assert_allclose(total, columns["duration_s"], rtol=1e-9, atol=1e-15)
    # Every (token, layer) has 8 experts: the pairs of both devices are 8 x 16 x tokens.
    pairs: dict[tuple[Any, ...], int] = defaultdict(int)
    tokens = {}
    for row in zip(
        *(columns[name] for name in ("batch_size", "batch", "step", "num_tokens", "served_pairs")), strict=True
    ):
        pairs[row[:3]] += row[4]
        tokens[row[:3]] = row[3]
    assert len(pairs) == NUM_STEPS
    assert tokens[1, 0, 0] == 5
    assert tokens[2, 1, 0] == 10
    assert tokens[2, 1, 2] == 2
    assert all(pairs[step] == 8 * 16 * tokens[step] for step in pairs)


def test_timeline(epsim: Run, tmp_path: Path) -> None:
    overrides = ("--set", "workload.batch_sizes=[1]", "--set", "workload.num_batches=1")
    says = "wrote out/results.json, out/steps.parquet, out/timeline.json\n"
    results = json.loads(epsim("simulate", "tiny.yaml", "--json", "--out", "out", *overrides, says=says))
    events = json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in slices} == {"compute", "tx", "rx"}

    lanes = defaultdict(list)
    for event in slices:
        assert event["dur"] >= 0
        lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():
        lane.sort()
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(lane))

    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts
    assert len(starts) == sum(event["ph"] == "s" for event in events)
    assert starts.keys() == ends.keys()
    assert all(ends[arrow]["ts"] >= starts[arrow]["ts"] for arrow in starts)
    assert all(ends[arrow]["pid"] != starts[arrow]["pid"] for arrow in starts)

    # Prefill and both decode steps are there, in microseconds.
    (size,) = results["batch_sizes"]
    ends_us = [event["ts"] + event["dur"] for event in slices]
    assert max(ends_us) == pytest.approx(size["e2e_s"]["mean"] * 1e6, rel=1e-9)
    ttft_us = size["ttft_s"]["mean"] * 1e6
    assert min(abs(end - ttft_us) for end in ends_us) < 1e-6 * ttft_us


def test_every_lane_of_the_timeline_has_a_name(epsim: Run, tmp_path: Path) -> None:
    process("simulate", "tiny.yaml", "--out", "out", cwd=tmp_path)
    events = json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"]
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "orin0", 1: "orin1"}


def test_timeline_shows_as_many_decode_steps_as_asked(epsim: Run, tmp_path: Path) -> None:
    heads = {}
    for steps in (0, 1, 5):
        process(
            "simulate", "tiny.yaml", "--out", "out", "--set", f"simulation.timeline_decode_steps={steps}", cwd=tmp_path
        )
        events = json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"]
        heads[steps] = sum(event["name"] == "head" for event in events)
    assert heads == {0: 1, 1: 2, 5: 3}  # the head runs once a step, on the request's home


def test_closed_form_has_no_timeline_and_removes_an_older_one(epsim: Run, tmp_path: Path) -> None:
    process("simulate", "tiny.yaml", "--out", "out", cwd=tmp_path)
    assert (tmp_path / "out" / "timeline.json").exists()
    says = "wrote out/results.json, out/steps.parquet\n"
    epsim("simulate", "tiny.yaml", "--out", "out", "--set", "simulation.fidelity=analytic", says=says)
    assert not (tmp_path / "out" / "timeline.json").exists()


def test_no_progress_bar_where_there_is_no_terminal(epsim: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epsim.cli", "simulate", "tiny.yaml"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert done.stderr == b""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_progress_bar_on_a_terminal(epsim: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "epsim.cli", "simulate", "tiny.yaml", "--json"]
    ours, theirs = os.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, check=True, cwd=tmp_path, env={**environment, "TERM": "xterm"}
    )
    shown = os.read(ours, 1 << 20).decode()
    os.close(theirs)
    os.close(ours)
    assert f"/{NUM_STEPS}" in shown
    json.loads(done.stdout)


def test_a_reader_that_leaves_early_gets_no_traceback(epsim: Run, tmp_path: Path) -> None:
    command = f"{sys.executable} -m epsim.cli simulate tiny.yaml | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert done.stdout == "tiny [/bold] :smile:\n"


# compare


AXES = ("--axis", "transmission.mode=sync,async", "--axis", "transmission.dedup=none,device")


def test_compare_prints_a_grid(epsim: Run) -> None:
    text = epsim("compare", "tiny.yaml", *AXES)
    for batch_size in (1, 2):
        assert f"Batch {batch_size}" in text
    rows = [line.split() for line in text.splitlines() if line.lstrip().startswith(("sync", "async"))]
    assert len(rows) == 2 * 2 * 2 * 2  # a table of times and one of bytes for each batch size
    assert sorted({tuple(row[:2]) for row in rows}) == [
        ("async", "device"), ("async", "none"), ("sync", "device"), ("sync", "none"),
    ]  # fmt: skip
    assert [row[:2] for row in rows if "baseline" in row] == [["sync", "none"]] * 2


def read_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_compare_csv(epsim: Run, tmp_path: Path) -> None:
    epsim("compare", "tiny.yaml", *AXES, "--csv", "rows.csv", "--baseline", "transmission.dedup=device")
    rows = read_rows(tmp_path / "rows.csv")
    assert list(rows[0]) == [
        "transmission.mode", "transmission.dedup", "trace_origin", "batch_size", "is_baseline",
        "ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s",
        "prefill_sent_bytes_per_step", "decode_sent_bytes_per_step", "sent_bytes_per_output_token",
        "fullest_device_memory_bytes", "all_devices_memory_bytes",
        "ttft_s_change_percent", "tpot_s_change_percent", "e2e_s_change_percent", "output_tokens_per_s_change_percent",
    ]  # fmt: skip
    base = {row["batch_size"]: row for row in rows if row["is_baseline"] == "True"}
    assert {(row["transmission.mode"], row["transmission.dedup"]) for row in base.values()} == {("sync", "device")}
    for row in rows:
        for metric in ("ttft_s", "tpot_s", "e2e_s", "output_tokens_per_s"):
            change = 100 * (float(row[metric]) / float(base[row["batch_size"]][metric]) - 1)
            assert float(row[f"{metric}_change_percent"]) == pytest.approx(change, abs=1e-9)
    for size in ("1", "2"):  # best first
        times = [float(row["e2e_s"]) for row in rows if row["batch_size"] == size]
        assert times == sorted(times)


def test_a_row_of_a_comparison_is_the_simulation_of_its_scenario(epsim: Run, tmp_path: Path) -> None:
    epsim("compare", "tiny.yaml", "--axis", "cluster.links[ethernet].bandwidth=1 Gbit/s,25 Gbit/s", "--csv", "rows.csv")
    rows = read_rows(tmp_path / "rows.csv")
    override = "cluster.links[ethernet].bandwidth=25 Gbit/s"
    results = json.loads(epsim("simulate", "tiny.yaml", "--json", "--set", override))
    for size in results["batch_sizes"]:
        row = next(
            row for row in rows
            if row["batch_size"] == str(size["batch_size"]) and row["cluster.links[ethernet].bandwidth"] == "25 Gbit/s"
        )  # fmt: skip
        assert float(row["ttft_s"]) == size["ttft_s"]["mean"]
        assert float(row["tpot_s"]) == size["tpot_s"]["mean"]


def test_compare_values_may_be_lists_and_tpot_may_be_missing(epsim: Run, tmp_path: Path) -> None:
    axis = "placement={policy: contiguous},{policy: random, seed: 1}"
    overrides = ("--set", "workload.max_output_tokens=1")
    baseline = "placement={policy: random, seed: 1}"
    text = epsim("compare", "tiny.yaml", "--axis", axis, *overrides, "--baseline", baseline, "--csv", "rows.csv")
    assert "{'policy': 'contiguous'}" in text
    rows = read_rows(tmp_path / "rows.csv")
    assert [row["placement"] for row in rows if row["is_baseline"] == "True"] == ["{'policy': 'random', 'seed': 1}"] * 2
    assert {row["tpot_s"] for row in rows} == {""}


# trace


def test_trace_round_trip(epsim: Run, tmp_path: Path) -> None:
    epsim("trace", "make", "tiny.yaml", "-o", "t.trace", says="wrote t.trace\n")
    epsim("trace", "make", "tiny.yaml", "-o", "z.trace", "--compress", says="wrote z.trace\n")
    # 4 requests (batch 2, two batches) of 5 prompt and 2 decode tokens.
    assert epsim("trace", "check", "t.trace") == "t.trace: 28 tokens, every invariant holds\n"
    assert epsim("trace", "check", "z.trace") == "z.trace: 28 tokens, every invariant holds\n"
    info = epsim("trace", "info", "t.trace")
    assert "4, prompt 5 tokens, decode 2" in info
    assert "16 MoE layers x top-8 of 64 experts" in info
    assert "synthetic" in info
    trace = TraceFile.open(tmp_path / "t.trace")
    check_trace(trace)
    assert trace.num_tokens == 28


def test_a_trace_in_a_file_gives_what_the_drawn_one_gave(epsim: Run) -> None:
    epsim("trace", "make", "tiny.yaml", "-o", "t.trace", says="wrote t.trace\n")
    drawn = json.loads(epsim("simulate", "tiny.yaml", "--json"))
    read = json.loads(epsim("simulate", "tiny.yaml", "--json", "--set", "trace=t.trace"))
    assert read["batch_sizes"] == drawn["batch_sizes"]
    assert read["trace"] == drawn["trace"]


def test_trace_export(epsim: Run, tmp_path: Path) -> None:
    epsim("trace", "make", "tiny.yaml", "-o", "t.trace", says="wrote t.trace\n")
    epsim("trace", "export", "t.trace", "--parquet", says="wrote t.parquet\n")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.num_rows == 28 * 16  # a row per token and layer
    assert {len(ids) for ids in table["expert_ids"].to_pylist()} == {8}
    assert set(table["phase"].to_pylist()) == {"prefill", "decode"}


def test_traces_are_the_same_bytes_every_time(epsim: Run, tmp_path: Path) -> None:
    for name in ("a.trace", "b.trace"):
        process("trace", "make", "tiny.yaml", "-o", name, cwd=tmp_path)
    process("trace", "make", "tiny.yaml", "-o", "c.trace", "--set", "trace.seed=1", cwd=tmp_path)
    first, again, other = ((tmp_path / f"{name}.trace").read_bytes() for name in "abc")
    assert first == again != other


def test_every_output_says_that_the_routing_is_synthetic(epsim: Run, tmp_path: Path) -> None:
    process("simulate", "tiny.yaml", "--out", "out", cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trace"]["origin"] == "synthetic"
    assert json.loads((tmp_path / "out" / "timeline.json").read_text())["otherData"] == {"trace_origin": "synthetic"}
    steps = pq.read_table(tmp_path / "out" / "steps.parquet")
    assert set(steps["trace_origin"].to_pylist()) == {"synthetic"}
    assert "routing: SYNTHETIC" in epsim("compare", "tiny.yaml", *AXES, "--csv", "rows.csv")
    assert {row["trace_origin"] for row in read_rows(tmp_path / "rows.csv")} == {"synthetic"}

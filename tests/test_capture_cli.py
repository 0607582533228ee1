"""`epsim trace` as a user runs it: from words on the command line to a trace, a forecast, or one clear line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from epsim.capture.scores.gaussian_statistics import moments
from epsim.capture.scores.statistics_file import load_statistics
from epsim.cli import main
from epsim.console import count_requests
from epsim.trace import check_trace
from epsim.trace.file import TraceFile

ROOT = Path(__file__).parent.parent
OLMOE = ["--random-init", "olmoe", "--reduced", "--threads", "1"]
SMALL = ["--random-init", "mixtral", "--reduced", "--threads", "1"]


@dataclass(frozen=True)
class Cli:
    """`epsim` in this process and in a folder of its own: `run` what works, `refuse` what is the user's error."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *words: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["epsim", *map(str, words)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        printed = self.capsys.readouterr()
        return int(exit_info.value.code or 0), printed.out, printed.err

    def run(self, *words: object) -> str:
        code, out, err = self(*words)
        assert code == 0, err
        return out + err

    def refuse(self, *words: object) -> str:
        code, out, err = self(*words)
        assert (code, out) == (2, ""), out + err
        assert err.startswith("epsim: ")
        assert err.count("\n") == 1, err
        return err


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Cli(tmp_path, monkeypatch, capsys)
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_from_images_to_a_forecast_and_the_same_bytes_again(cli: Cli, tmp_path: Path) -> None:
    options = [*OLMOE, "--num-requests", 2, "--max-new-tokens", 3, "--scores", "attention,gaussian", "--note", "a test"]
    said = cli.run("trace", *options, "--compress", "-o", "t.arrow")
    assert "wrote t.arrow: 2 requests" in said
    trace = TraceFile.open(tmp_path / "t.arrow")
    check_trace(trace)
    assert trace.meta.mock
    assert trace.meta.model == "OLMoE-1B-7B-0125 reduced"
    assert "note a test" in trace.meta.words
    assert trace.requests.num_vision_tokens_Q.tolist() == [576, 576]  # an image each in the first two of "mixed"
    assert {"modality_score_attention", "modality_score_gaussian"} <= set(trace.columns)

    cli.run("trace", "--repeat", "t.arrow", "-o", "again.arrow")  # with compression and all
    assert (tmp_path / "t.arrow").read_bytes() == (tmp_path / "again.arrow").read_bytes()
    assert (tmp_path / "t.gaussian.safetensors").read_bytes() == (tmp_path / "again.gaussian.safetensors").read_bytes()

    scenario = ROOT / "scenarios" / "orin-2x-olmoe.yaml"
    overrides = ["trace=t.arrow", "workload.batch_sizes=[1,2]"]
    sets = [word for override in overrides for word in ("--set", override)]
    forecast = cli.run("simulate", scenario, *sets)
    assert "routing: captured, MOCK: weights random (seed 0), requests 2 built-in mixed" in forecast
    assert "TTFT" in forecast


def test_prompts_of_a_file_and_statistics_of_another_run(cli: Cli, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "red.png")
    prompts = [{"text": "Which colour?", "image": "red.png", "max_new_tokens": 2}, {"text": "Hello"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    options = ["--requests", "p.jsonl", "--max-new-tokens", 4, "--scores"]
    cli.run("trace", *SMALL, *options, "gaussian", "-o", "a.arrow")
    trace = TraceFile.open(tmp_path / "a.arrow")
    assert trace.requests.num_decode_tokens_Q.tolist() == [1, 3]
    assert trace.requests.num_vision_tokens_Q.tolist() == [576, 0]

    given = ["gaussian", "--statistics", "a.gaussian.safetensors", "--chunk-size", 100, "-o", "b.arrow"]
    cli.run("trace", *SMALL, *options, *given)
    assert not (tmp_path / "b.gaussian.safetensors").exists()

    (tmp_path / "p.jsonl").write_text(json.dumps(prompts[1]))
    assert "requests (file_sha256, num_requests" in cli.refuse("trace", "--repeat", "b.arrow", "-o", "c.arrow")
    assert not (tmp_path / "c.arrow").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_left_open_fits_the_model(cli: Cli, tmp_path: Path) -> None:
    """Without --scores and --requests: attention scores and images for a model with eyes, neither for one without."""
    cli.run("trace", *SMALL, "--num-requests", 1, "--max-new-tokens", 1, "-o", "eyes.arrow")
    cli.run("trace", *SMALL, "--text-only", "--num-requests", 1, "--max-new-tokens", 1, "-o", "text.arrow")
    eyes, text = (TraceFile.open(tmp_path / name) for name in ("eyes.arrow", "text.arrow"))
    assert [name for name in eyes.columns if name.startswith("modality_score")] == ["modality_score_attention"]
    assert eyes.requests.num_vision_tokens_Q.tolist() == [576]
    assert not [name for name in text.columns if name.startswith("modality_score")]
    assert text.requests.num_vision_tokens_Q.tolist() == [0]


BAD = {
    "no output": (["--random-init", "olmoe"], "no file to write"),
    "no model": (["-o", "t.arrow"], "--random-init"),
    "unknown card": (["--random-init", "olmo", "-o", "t.arrow"], '"olmo"'),
    "unknown score": ([*SMALL, "--scores", "vibes", "-o", "t.arrow"], "attention"),
    "score of images without images": (
        [*SMALL, "--text-only", "--scores", "gaussian", "-o", "t.arrow"],
        "reads text only",
    ),
    "two kinds of requests": ([*SMALL, "--mock", "--builtin", "text", "-o", "t.arrow"], "write one of them"),
    "no such file": ([*SMALL, "--requests", "nothing.jsonl", "-o", "t.arrow"], "nothing.jsonl"),
    "empty prompt": ([*SMALL, "--requests", "empty.jsonl", "-o", "t.arrow"], "empty.jsonl:1"),
    "bad image": ([*SMALL, "--requests", "image.jsonl", "-o", "t.arrow"], "not.png"),
    "no card": (["--random-init", "", "-o", "t.arrow"], '""'),
    "threads": ([*SMALL[:-1], "100000", "-o", "t.arrow"], "--threads 100000"),
    "requests": ([*SMALL, "--num-requests", "100000000", "-o", "t.arrow"], "--num-requests 100000000"),
    "note": ([*SMALL, "--note", "a\nb", "-o", "t.arrow"], "--note"),
    "a file for a folder": (["--model", "empty.jsonl", "-o", "t.arrow"], "empty.jsonl: is a file"),
    "no statistics": ([*SMALL, "--scores", "gmm2", "--statistics", "g", "-o", "t.arrow"], "g: the Gaussian statistics"),
    "prompts for output": ([*SMALL, "--requests", "p.jsonl", "-o", "p.jsonl"], "p.jsonl: is read for this"),
    "an image for output": ([*SMALL, "--requests", "p.jsonl", "-o", "p.png"], "p.png: is read for this"),
    "no such folder": ([*SMALL, "-o", "nowhere/t.arrow"], "nowhere/t.arrow"),
    "batch size": ([*SMALL, "--batch-size", "0", "-o", "t.arrow"], "--batch-size 0"),
    "too long": ([*SMALL, "--mock", "--text-tokens", "40000", "-o", "t.arrow"], "context"),
    "images of a set": ([*SMALL, "--images", "2", "-o", "t.arrow"], "--images: is of --mock requests"),
    "repeat of a synthetic trace": (["--repeat", "synthetic.arrow", "-o", "t.arrow"], "not captured"),
    "an option of a capture before another command": (["-o", "t.arrow", "info", "synthetic.arrow"], "trace info"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "not.png").write_text("no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    (tmp_path / "p.jsonl").write_text('{"text": "What?", "image": "p.png"}\n')
    (tmp_path / "image.jsonl").write_text('{"text": "What?", "image": "not.png"}\n')
    before = contents(tmp_path)
    if "synthetic.arrow" in BAD[case][0]:
        sets = ["--set", "trace={kind: uniform, text_tokens: 4, requests: 1}"]
        cli.run("trace", "make", ROOT / "scenarios" / "orin-2x-olmoe.yaml", *sets, "-o", "synthetic.arrow")
    words, said = BAD[case]
    assert said in cli.refuse("trace", *words)
    assert contents(tmp_path).keys() - before.keys() <= {"synthetic.arrow"}
    assert before.items() <= contents(tmp_path).items()


def test_memory_that_runs_out_in_the_first_pass_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("epsim.capture.model.MoeModel.embed", fail)
    code, _, said = cli("trace", *SMALL, "--num-requests", 1, "--scores", "gaussian", "-o", "t.arrow")
    assert code == 2
    assert said.endswith("epsim: cpu: out of memory; write a smaller --batch-size or --chunk-size\n")


def test_ctrl_c_before_anything_is_done_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("epsim.capture.model.MoeModel.embed", interrupt)
    code, _, said = cli("trace", *SMALL, "--num-requests", 1, "-o", "t.arrow")
    assert code == 130
    assert said.endswith("epsim: interrupted before anything was done; t.arrow is not written\n")
    assert not list(cli.folder.iterdir())


def test_ctrl_c_while_statistics_are_fitted_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have seen the batch by then, others have not."""
    experts_run = 0

    def interrupt(*_: object) -> None:
        nonlocal experts_run
        experts_run += 1
        if experts_run > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("epsim.capture.scores.gaussian.moments", interrupt_after(interrupt))
    code, _, said = cli("trace", *SMALL, "--num-requests", 1, "--scores", "gmm2", "-o", "t.arrow")
    assert (code, said.splitlines()[-1]) == (
        130,
        "epsim: interrupted before anything was done; t.arrow is not written",
    )


def interrupt_after(check: Callable[[], None]) -> Callable[..., object]:
    def moments_then_check(*arguments: object) -> object:
        check()
        return moments(*arguments)

    return moments_then_check


def test_mock_is_said_wherever_it_came_from(cli: Cli, tmp_path: Path) -> None:
    options = ["--num-requests", 2, "--max-new-tokens", 1]
    cli.run("trace", *OLMOE, *options, "-o", "t.arrow")
    sets = ["--set", "trace=t.arrow", "--set", "workload.batch_sizes=[1]", "--axis", "transmission.dedup=none,device"]
    scenario = ROOT / "scenarios" / "orin-2x-olmoe.yaml"
    assert "routing: captured, MOCK" in cli.run("compare", scenario, *sets, "--csv", "c.csv")
    assert (tmp_path / "c.csv").read_text().count('"captured, MOCK"') == 2
    cli.run("trace", *SMALL, *options, "--mock", "--scores", "gaussian", "-o", "m.arrow")
    assert load_statistics(tmp_path / "m.gaussian.safetensors").mock


def test_a_sample_says_what_it_is_of(cli: Cli) -> None:
    cli.run("trace", *SMALL, "--builtin", "text", "--num-requests", 3, "--max-new-tokens", 2, "-o", "t.arrow")
    cli.run("trace", "sample", "t.arrow", "--requests", 2, "-o", "s.arrow")
    assert "2 of 3 asked for, prompt" in cli.run("trace", "info", "s.arrow")
    assert "s.arrow: holds 2 of 3 requests; all of them are run" in cli.run("trace", "--repeat", "s.arrow", "-o", "a")
    assert (cli.folder / "a").read_bytes() == (cli.folder / "t.arrow").read_bytes()


def test_the_bar_says_tokens_per_second(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "120")
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock, 14.0))
    with count_requests("tracing", 4) as advance:
        advance(0, 5000)
        advance(2, 1000)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "2/4 requests, 1,500 tokens/s" in shown  # 6000 in 4 s


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM,)], ids=["twice", "terminated"])
def test_an_interrupt_leaves_what_was_done(signals: tuple[signal.Signals, ...], tmp_path: Path) -> None:
    words = ["trace", *SMALL, "--builtin", "text", "--batch-size", 1, "--num-requests", 3000, "-o", "t.arrow"]
    with subprocess.Popen(
        [sys.executable, "-m", "epsim", *map(str, words)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "COLUMNS": "120"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    ) as process:
        assert process.stderr is not None
        said = ""
        while not re.search(r"[1-9]\d*/3000", said):  # no request is done yet
            said += (more := process.stderr.read(1))
            assert more, said
        for each in signals:
            process.send_signal(each)
            time.sleep(0.3)
        try:
            said += process.communicate(timeout=60)[1]
        finally:
            process.kill()  # or leaving the block would wait for it
    assert process.returncode == 130, said
    assert "interrupted; t.arrow holds what was done by then" in said
    check_trace(TraceFile.open(tmp_path / "t.arrow"))

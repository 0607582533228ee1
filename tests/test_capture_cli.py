"""`epsim trace` as a user runs it: from words on the command line to a trace, a forecast, or one clear line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from epsim.trace import check_trace
from epsim.trace.file import TraceFile

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
OLMOE = ["--random-init", "olmoe", "--reduced", "--threads", "1"]
SMALL = ["--random-init", "mixtral", "--reduced", "--threads", "1"]


def epsim(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "epsim", *map(str, words)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def run(*words: object, folder: Path) -> str:
    done = epsim(*words, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def refused(*words: object, folder: Path) -> str:
    """Run, and return the one line of an error of the user's."""
    done = epsim(*words, folder=folder)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith("epsim: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_from_images_to_a_forecast_and_the_same_bytes_again(tmp_path: Path) -> None:
    options = [*OLMOE, "--num-requests", 2, "--max-new-tokens", 3, "--scores", "attention,gaussian", "--note", "a test"]
    said = run("trace", *options, "-o", "t.arrow", folder=tmp_path)
    assert "wrote t.arrow: 2 requests" in said
    trace = TraceFile.open(tmp_path / "t.arrow")
    check_trace(trace)
    assert trace.meta.mock
    assert trace.meta.model == "OLMoE-1B-7B-0125 reduced"
    assert "note a test" in trace.meta.words
    assert trace.requests.num_vision_tokens_Q.tolist() == [576, 576]  # an image each in the first two of "mixed"
    assert {"modality_score_attention", "modality_score_gaussian"} <= set(trace.columns)

    run("trace", "--repeat", "t.arrow", "-o", "again.arrow", folder=tmp_path)
    assert (tmp_path / "t.arrow").read_bytes() == (tmp_path / "again.arrow").read_bytes()
    assert (tmp_path / "t.gaussian.safetensors").read_bytes() == (tmp_path / "again.gaussian.safetensors").read_bytes()

    scenario = ROOT / "scenarios" / "orin-2x-olmoe.yaml"
    overrides = ["trace=t.arrow", "workload.batch_sizes=[1,2]"]
    sets = [word for override in overrides for word in ("--set", override)]
    forecast = run("simulate", scenario, *sets, folder=tmp_path)
    assert "routing: captured, MOCK: weights random (seed 0), requests 2 built-in mixed" in forecast
    assert "TTFT" in forecast


def test_prompts_of_a_file_and_statistics_of_another_run(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "red.png")
    prompts = [{"text": "Which colour?", "image": "red.png", "max_new_tokens": 2}, {"text": "Hello"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    options = ["--requests", "p.jsonl", "--max-new-tokens", 4, "--scores"]
    run("trace", *SMALL, *options, "gaussian", "-o", "a.arrow", folder=tmp_path)
    trace = TraceFile.open(tmp_path / "a.arrow")
    assert trace.requests.num_decode_tokens_Q.tolist() == [1, 3]
    assert trace.requests.num_vision_tokens_Q.tolist() == [576, 0]

    given = ["gaussian", "--statistics", "a.gaussian.safetensors", "--chunk-size", 100, "-o", "b.arrow"]
    run("trace", *SMALL, *options, *given, folder=tmp_path)
    assert not (tmp_path / "b.gaussian.safetensors").exists()

    (tmp_path / "p.jsonl").write_text(json.dumps(prompts[1]))
    assert "requests changed" in refused("trace", "--repeat", "b.arrow", "-o", "c.arrow", folder=tmp_path)
    assert not (tmp_path / "c.arrow").exists()


BAD = {
    "no output": (["--random-init", "olmoe"], "no file to write"),
    "no model": (["-o", "t.arrow"], "--random-init"),
    "unknown card": (["--random-init", "olmo", "-o", "t.arrow"], '"olmo"'),
    "unknown score": ([*SMALL, "--scores", "vibes", "-o", "t.arrow"], "attention"),
    "score of images without images": (
        [*SMALL, "--text-only", "--scores", "gaussian", "-o", "t.arrow"],
        "no request has an image",
    ),
    "two kinds of requests": ([*SMALL, "--mock", "--builtin", "text", "-o", "t.arrow"], "write one of them"),
    "no such file": ([*SMALL, "--requests", "nothing.jsonl", "-o", "t.arrow"], "nothing.jsonl"),
    "empty prompt": ([*SMALL, "--requests", "empty.jsonl", "-o", "t.arrow"], "empty.jsonl:1"),
    "bad image": ([*SMALL, "--requests", "image.jsonl", "-o", "t.arrow"], "not.png"),
    "no such folder": ([*SMALL, "-o", "nowhere/t.arrow"], "nowhere/t.arrow"),
    "batch size": ([*SMALL, "--batch-size", "0", "-o", "t.arrow"], "--batch-size 0"),
    "too long": ([*SMALL, "--mock", "--text-tokens", "40000", "-o", "t.arrow"], "context"),
    "repeat of a synthetic trace": (["--repeat", "synthetic.arrow", "-o", "t.arrow"], "not captured"),
    "an option of a capture before another command": (["-o", "t.arrow", "info", "synthetic.arrow"], "trace info"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "not.png").write_text("no picture")
    (tmp_path / "image.jsonl").write_text('{"text": "What?", "image": "not.png"}\n')
    if "synthetic.arrow" in BAD[case][0]:
        sets = ["--set", "trace={kind: uniform, text_tokens: 4, requests: 1}"]
        run("trace", "make", ROOT / "scenarios" / "orin-2x-olmoe.yaml", *sets, "-o", "synthetic.arrow", folder=tmp_path)
    words, said = BAD[case]
    assert said in refused("trace", *words, folder=tmp_path)
    assert not (tmp_path / "t.arrow").exists()
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_leaves_what_was_done(tmp_path: Path) -> None:
    words = ["trace", *SMALL, "--builtin", "text", "--batch-size", 1, "--num-requests", 3000, "-o", "t.arrow"]
    process = subprocess.Popen(
        [sys.executable, "-m", "epsim", *map(str, words)],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    part = tmp_path / f".t.arrow.{process.pid}.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.2)  # the file grows with its first rows, which come after some batches
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "interrupted; t.arrow holds what was done by then" in said
    check_trace(TraceFile.open(tmp_path / "t.arrow"))

"""SMoES does on a tiny model what it is for: experts specialise by modality, and vision tokens stay at home."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from epsim.capture.command import capture_trace
from epsim.capture.models.source import ModelSource
from epsim.capture.options import CaptureOptions, RequestSource
from epsim.scenario.load_train import load_train
from epsim.specialize.command import train
from epsim.trace.file import TraceFile
from epsim.trace_stats import Spread, trace_stats

TINY = Path(__file__).parent.parent / "scenarios" / "train" / "tiny.yaml"
SOFT = ("method.kind=soft", "method.balance_weight=0.01")


def trained_and_traced(folder: Path, overrides: tuple[str, ...] = (), start: Path | None = None) -> dict[str, Any]:
    """Train the tiny model, run it on held-out prompts, and return what its trace says."""
    outcome = train(
        load_train(TINY, overrides),
        folder,
        start=start,
        device="cpu",
        num_threads=1,
        count=lambda label, num_steps: nullcontext(lambda step, note: None),
        say=lambda line: None,
    )
    assert outcome.stopped_by is None
    options = CaptureOptions(
        model=ModelSource(checkpoint=str(folder / "model"), device="cpu"),
        requests=RequestSource(builtin="scenes", num_requests=40),
        scores=(),
        num_threads=1,
    )
    trace = folder / "trace.arrow"
    capture_trace(options, trace, count=lambda label, num: nullcontext(lambda n, tokens: None), say=lambda line: None)
    return trace_stats(TraceFile.open(trace), Spread(placement="modality_bins"))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tiny")
    soft = trained_and_traced(folder / "soft", SOFT)
    return {"soft": soft, "attention": trained_and_traced(folder / "attention", start=folder / "soft")}


def test_experts_specialise(stats: dict[str, dict[str, Any]]) -> None:
    msi = {name: found["overall"]["msi"] for name, found in stats.items()}
    assert msi["attention"] >= msi["soft"] + 0.2


def test_vision_tokens_travel_half_as_often(stats: dict[str, dict[str, Any]]) -> None:
    for counted in ("with_dedup", "without_dedup"):
        remote = {name: found["transfer_ratio"][counted]["prefill_vision"] for name, found in stats.items()}
        assert remote["attention"] <= 0.5 * remote["soft"], counted


def test_held_out_prompts_of_both_modalities_were_run(stats: dict[str, dict[str, Any]]) -> None:
    """32 of 40 prompts have an image of 64 tokens."""
    for found in stats.values():
        assert not found["trace"]["mock"]
        assert found["trace"]["num_tokens"]["prefill_vision"] == 32 * 64
        assert found["trace"]["num_tokens"]["decode_text"] > 40

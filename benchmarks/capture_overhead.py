"""What a capture costs beside the plain forward pass: the router's picks, and each score, streamed to a file.

    python benchmarks/capture_overhead.py                                  # CPU: 600 tokens, 512 wide, 8 layers
    python benchmarks/capture_overhead.py --full --batch-sizes 1 8 32 --tokens 715  # CUDA: OLMoE at full size

Prefill and decode are timed apart; "plain" is the same loop with nothing attached. The variants take turns within each
repetition, and what is printed is the median over repetitions of the ratio to the plain run of the same repetition.
Random weights and random tokens, of which half count as vision: the cost of recording does not depend on their values.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from epsim import __version__
from epsim.capture.capture import Recording
from epsim.capture.forward import run_batch
from epsim.capture.model import MoeModel
from epsim.capture.models import deepseek
from epsim.capture.models.backbones import BACKBONES, backbone_card, reduced_card, text_config
from epsim.capture.models.device import resolve_device, resolve_dtype
from epsim.capture.models.random_init import draw_weights
from epsim.capture.prompts.batches import Batch
from epsim.capture.scores.estimators import ScoreEstimator, make_fit, make_score
from epsim.capture.stream import TraceStream
from epsim.trace.meta import TraceMeta
from epsim.trace.writer import TraceWriter

VARIANTS: dict[str, tuple[str, ...] | None] = {
    "plain": None,
    "router": (),
    "router + gaussian": ("gaussian",),
    "router + attention": ("attention",),
    "router + attention + gaussian": ("attention", "gaussian"),
}


@dataclass(frozen=True)
class Seconds:
    """Of one run of a batch."""

    prefill: float
    decode_step: float


def build(arguments: argparse.Namespace) -> MoeModel:
    """Return the model: a backbone at full size, or on the CPU the small one of the module's docstring."""
    deepseek.register()
    card = backbone_card(arguments.backbone)
    if not arguments.full:
        card = reduced_card(card, hidden_size=512, num_heads=8, expert_ffn_size=256)
        card = replace(card, num_layers=8 + card.num_dense_layers)
    device = resolve_device(arguments.device)
    dtype = resolve_dtype(arguments.dtype, device)
    module = draw_weights(text_config(arguments.backbone, card), dtype, device, seed=0)
    return MoeModel(name=card.name, module=module.eval().requires_grad_(False), random_weights=True)


def make_batch(model: MoeModel, batch_size: int, num_tokens: int, num_steps: int) -> Batch:
    """Return prompts of random tokens, the first half of each as if it were vision."""
    generator = torch.Generator().manual_seed(0)
    size = (batch_size, num_tokens)
    return Batch(
        request_ids_B=np.arange(batch_size, dtype=np.int32),
        token_ids_BS=torch.randint(0, model.decoder.config.vocab_size, size, generator=generator),
        is_token_BS=torch.ones(size, dtype=torch.bool),
        is_text_BS=(torch.arange(num_tokens) >= num_tokens // 2).expand(size).clone(),
        pixel_values=None,
        num_prompt_tokens_B=torch.full((batch_size,), num_tokens),
        max_new_tokens_B=torch.full((batch_size,), num_steps + 1),
    ).to(model.device)


def synchronize(model: MoeModel) -> float:
    """Wait for the device and return the time."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


class Timer:
    """An `Advance` that takes the time after the prefill."""

    def __init__(self, model: MoeModel) -> None:
        self._model = model
        self.start = synchronize(model)
        self.after_prefill = 0.0

    def __call__(self, requests: int, tokens: int) -> None:
        if not self.after_prefill:
            self.after_prefill = synchronize(self._model)

    def seconds(self, num_steps: int) -> Seconds:
        """Return what the run took that ends now."""
        end = synchronize(self._model)
        return Seconds(self.after_prefill - self.start, (end - self.after_prefill) / num_steps)


def run(model: MoeModel, batch: Batch, estimators: Sequence[ScoreEstimator] | None, folder: Path) -> Seconds:
    """Time one batch; without estimators (None) nothing is recorded. Attaching and closing the file are not timed."""
    num_steps = int(batch.max_new_tokens_B[0]) - 1
    if estimators is None:
        timer = Timer(model)
        for _ in run_batch(model, batch):
            timer(0, 0)
        return timer.seconds(num_steps)
    meta = TraceMeta.of(model.shape, model=model.name, origin="captured", description="benchmark", mock=True)
    with ExitStack() as stack:
        writer = stack.enter_context(TraceWriter(folder / "t.arrow", meta))
        stream = stack.enter_context(TraceStream(writer))
        recording = stack.enter_context(Recording(model, estimators))
        timer = Timer(model)
        recording.run(batch, stream, None, frozenset(), timer)
        return timer.seconds(num_steps)


def fitted(model: MoeModel, batch: Batch) -> ScoreEstimator:
    """Return a Gaussian score with the statistics of the batch."""
    fit = make_fit("gaussian")
    fit.attach(model)
    for _ in run_batch(model, batch, watchers=[fit], decode=False):
        pass
    statistics_of_batch = fit.statistics
    fit.detach()
    return make_score("gaussian", statistics_of_batch)


def measure(model: MoeModel, batch_size: int, arguments: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """Return a row per variant of one batch size."""
    batch = make_batch(model, batch_size, arguments.tokens, arguments.steps)
    scores = {"attention": make_score("attention"), "gaussian": fitted(model, batch)}
    times: dict[str, list[Seconds]] = {name: [] for name in VARIANTS}
    for repetition in range(arguments.repeats + 1):
        for name, wanted in VARIANTS.items():
            estimators = None if wanted is None else [scores[each] for each in wanted]
            seconds = run(model, batch, estimators, folder)
            if repetition:  # the first one warms up
                times[name].append(seconds)
    return [row(batch_size, name, times[name], times["plain"]) for name in VARIANTS]


def row(batch_size: int, name: str, found: list[Seconds], plain: list[Seconds]) -> dict[str, object]:
    """Return medians of times, and medians of the ratios within a repetition."""
    result: dict[str, object] = {"batch_size": batch_size, "variant": name}
    for part in ("prefill", "decode_step"):
        own, other = [getattr(s, part) for s in found], [getattr(s, part) for s in plain]
        result[f"{part}_ms"] = 1e3 * statistics.median(own)
        result[f"{part}_ratio"] = statistics.median(a / b for a, b in zip(own, other, strict=True))
    return result


def machine(model: MoeModel) -> str:
    """Return what ran, and with which versions."""
    device = platform.machine()
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{device} CPU"
    versions = f"epsim {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{model.name}, {model.dtype}, on {device}; {versions}; {torch.get_num_threads()} threads"


def main() -> None:
    """Measure and print a table, and with --json the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="olmoe")
    parser.add_argument("--full", action="store_true", help="full size; else 512 wide with 8 MoE layers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--tokens", type=int, default=600, help="of a prompt")
    parser.add_argument("--steps", type=int, default=8, help="decode steps")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments)
    header = machine(model)
    print(f"{header}; {arguments.tokens} prompt tokens, median of {arguments.repeats}")
    print(f"{'batch':>5}  {'variant':30}{'prefill':>12}{'ratio':>8}{'decode step':>14}{'ratio':>8}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for batch_size in arguments.batch_sizes:
            for each in measure(model, batch_size, arguments, Path(folder)):
                rows.append(each)
                print(
                    f"{batch_size:5}  {each['variant']:30}{each['prefill_ms']:9.2f} ms{each['prefill_ratio']:8.3f}"
                    f"{each['decode_step_ms']:11.3f} ms{each['decode_step_ratio']:8.3f}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": header, "tokens": arguments.tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""What specialising experts costs in training, beside soft routing: step time, peak memory, parameters and buffers.

    python benchmarks/training_overhead.py --reduced --threads 1      # CPU: 256 wide, 64 vision and 32 text tokens
    python benchmarks/training_overhead.py --device cuda --experts 32 64 --json out/training-overhead.json

It is SMoES table S13 at the layer shapes of OLMoE: 2048 wide, 16 heads, experts of 1024, top-8, CLIP ViT-L/14-336. A
batch is 2 samples of 576 vision tokens, 128 of text and an answer of 8. The paper's 1.19 and 1.59 B parameters are what
one of eight GPUs holds of 16 layers under expert parallelism: 4 or 8 of a layer's 32 or 64 experts. One device alone
runs all experts of fewer layers (`--layers`, 4 unless given), with no exchange of tokens, gradients or statistics.
Vision encoder and head are there once, so with fewer layers they dilute a ratio: `a layer` is the time that a MoE layer
adds.

A step is that of `epsim train`: forward, backward, clipping, AdamW, of projector and language model, in float32, on
CUDA under autocast to bfloat16. Its batch is always the same, so that encoding prompts is not timed. The variants take
turns within each repetition, each with an optimizer of its own; a block's first step is not counted. What is printed is
the median over repetitions of the median step of a block, and of its ratio to the baseline of the same repetition. On
CUDA a step is wall time and the peak that of what torch allocated; on the CPU processor time of all threads, and the
peak of resident memory.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from epsim import __version__
from epsim.capture.model import MoeModel
from epsim.capture.models.backbones import (
    CLIP_REDUCED,
    CLIP_VIT_L_14_336,
    backbone_card,
    reduced_card,
    text_config,
    vlm_config,
)
from epsim.capture.models.device import resolve_device
from epsim.capture.models.random_init import draw_weights
from epsim.scenario.train import TrainSpec
from epsim.specialize.examples import ExampleBatch
from epsim.specialize.methods import make_method
from epsim.specialize.stage import StageRun

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline (soft, eq. 1)": {"kind": "soft"},
    "+ inter-bin MI, hard score": {"kind": "smoes", "score": "hard"},
    "+ attention estimator": {"kind": "smoes", "score": "attention"},
    "+ Gaussian estimator": {"kind": "smoes", "score": "gaussian"},
}
PAPER_STEP_S = {32: (0.74, 0.80, 0.81, 0.93), 64: (0.82, 0.90, 0.91, 0.99)}  # SMoES table S13
TARGET_RATIOS = (1.0, 1.10, 1.11, 1.21)  # those of its 64 experts
PAPER = (
    "paper (SMoES table S13, one of 8 GPUs, with exchange), s: 32 experts 0.74 -> 0.80 -> 0.81, Gaussian 0.93; "
    "64 experts 0.82 -> 0.90 -> 0.91, Gaussian 0.99"
)
BATCH_SIZE, TOPK, NUM_ANSWER = 2, 8, 8


@dataclass(frozen=True)
class Block:
    """Of one variant in one repetition."""

    step_s: float
    peak_bytes: int | None
    num_buffers: int


@dataclass(frozen=True)
class Row:
    """Of one variant, over all repetitions.

    `num_parameters` and `num_buffers` count numbers, of the whole model and of the method. `added_s_per_layer`: median
    time beyond the baseline's over MoE layers. `ratio_quartiles`: how far the ratios of the repetitions scatter.
    `paper_ratio` is of table S13, None for other numbers of experts.
    """

    num_experts: int
    variant: str
    step_s: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    added_s_per_layer: float
    peak_bytes: int | None
    num_parameters: int
    num_buffers: int
    paper_ratio: float | None
    target_ratio: float


class OneBatch:
    """A source of examples that has one batch for all steps."""

    def __init__(self, batch: ExampleBatch) -> None:
        self._batch = batch

    def batch(self, stage_index: int, step: int) -> ExampleBatch:
        """Return it."""
        return self._batch


def build(arguments: argparse.Namespace, num_experts: int) -> MoeModel:
    """Return an OLMoE with random weights and so many layers and experts; 256 wide with --reduced."""
    card, vision = backbone_card("olmoe"), CLIP_VIT_L_14_336
    if arguments.reduced:
        card = reduced_card(card, hidden_size=256, num_heads=4, expert_ffn_size=128)
        vision = CLIP_REDUCED | {"image_size": 112}
    assert card.moe is not None
    moe = replace(card.moe, num_experts=num_experts, topk=TOPK)
    card = replace(card, num_layers=arguments.layers, vocab_size=card.vocab_size + 1, moe=moe)
    config = vlm_config(text_config("olmoe", card), vision, image_token_id=card.vocab_size - 1)
    module = draw_weights(config, torch.float32, resolve_device(arguments.device), seed=0)
    return MoeModel(name=card.name, module=module.requires_grad_(False), random_weights=True)


def make_batch(model: MoeModel, num_text: int) -> ExampleBatch:
    """Return samples of an image, `num_text` random tokens and a random answer, on the host."""
    generator = torch.Generator().manual_seed(0)
    config = model.module.config
    num_vision, side = config.image_seq_length, config.vision_config.image_size
    size = (BATCH_SIZE, num_vision + num_text + NUM_ANSWER)
    place_BS = torch.arange(size[1]).expand(size)
    token_ids_BS = torch.randint(0, config.image_token_id, size, generator=generator)
    return ExampleBatch(
        token_ids_BS=torch.where(place_BS < num_vision, config.image_token_id, token_ids_BS),
        is_token_BS=torch.ones(size, dtype=torch.bool),
        is_text_BS=place_BS >= num_vision,
        is_answer_BS=place_BS >= num_vision + num_text,
        pixel_values=torch.randn(BATCH_SIZE, 3, side, side, generator=generator),
    )


def training_spec(method: dict[str, Any]) -> TrainSpec:
    """Return a run of SMoES' second stage (table S1); the model's section only fills a required field."""
    stage = {
        "name": "instruct",
        "task": "multimodal",
        "trains": ["projector", "language"],
        "steps": 5195,
        "batch_size": BATCH_SIZE,
        "learning_rate": 2e-5,
        "specialize": True,
    }
    model = {"backbone": "olmoe", "full_size": True}
    return TrainSpec.model_validate({"name": "overhead", "model": model, "method": method, "stages": [stage]})


def now(device: torch.device) -> float:
    """Wait for the device and return the time; on the CPU that of the process alone, for other work is beside it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def forget_peak(device: torch.device) -> None:
    """Let the peak of memory begin anew: of the allocator on CUDA, else of the process' resident memory (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak since `forget_peak`, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() != "Linux":
        return None
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def count_numbers(state: Any) -> int:
    """Return how many numbers the tensors of a method's state hold."""
    if isinstance(state, Tensor):
        return state.numel()
    return sum(count_numbers(value) for value in state.values()) if isinstance(state, dict) else 0


def run_block(model: MoeModel, method: dict[str, Any], batch: ExampleBatch, num_steps: int) -> Block:
    """Time steps of one variant, after one that makes AdamW's moments."""
    spec = training_spec(method)
    own = make_method(spec.method, model, spec.seed)
    forget_peak(model.device)
    times = []
    with StageRun(spec, 0, model, OneBatch(batch), own) as run:  # type: ignore[arg-type]
        for _ in range(num_steps + 1):
            began = now(model.device)
            run.advance()
            times.append(now(model.device) - began)
        return Block(statistics.median(times[1:]), peak_bytes(model.device), count_numbers(own.state_dict()))


def measure(model: MoeModel, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each variant."""
    batch = make_batch(model, arguments.text_tokens)
    blocks: dict[str, list[Block]] = {name: [] for name in VARIANTS}
    for repetition in range(arguments.repeats + 1):
        for name, method in VARIANTS.items():
            block = run_block(model, method, batch, arguments.steps)
            if repetition:  # the first one warms up
                blocks[name].append(block)
    base_S = [block.step_s for block in next(iter(blocks.values()))]
    shape = model.shape
    paper = PAPER_STEP_S.get(shape.num_experts)
    for index, (name, found) in enumerate(blocks.items()):
        step_S = [block.step_s for block in found]
        ratios = [own / base for own, base in zip(step_S, base_S, strict=True)]
        low, _, high = statistics.quantiles(ratios, method="inclusive")
        added_S = [own - base for own, base in zip(step_S, base_S, strict=True)]
        peaks = [block.peak_bytes for block in found if block.peak_bytes is not None]
        yield Row(
            num_experts=shape.num_experts,
            variant=name,
            step_s=statistics.median(step_S),
            ratio=statistics.median(ratios),
            ratio_quartiles=(low, high),
            added_s_per_layer=statistics.median(added_S) / shape.num_layers,
            peak_bytes=max(peaks) if peaks else None,
            num_parameters=sum(parameter.numel() for parameter in model.module.parameters()),
            num_buffers=found[0].num_buffers,
            paper_ratio=paper[index] / paper[0] if paper else None,
            target_ratio=TARGET_RATIOS[index],
        )


def line(row: Row) -> str:
    """Return the row as it is printed."""
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f} GB"
    paper = "" if row.paper_ratio is None else f"{row.paper_ratio:.2f}"
    low, high = row.ratio_quartiles
    return (
        f"{row.num_experts:7}  {row.variant:28}{1e3 * row.step_s:9.1f} ms{row.ratio:8.3f}  ({low:.3f}, {high:.3f})"
        f"{1e3 * row.added_s_per_layer:9.2f} ms{peak:>12}{row.num_parameters / 1e9:10.3f} B"
        f"{row.num_buffers / 1e6:10.3f} M{paper:>9}{row.target_ratio:8.2f}"
    )


def machine(device: torch.device, layers: int) -> str:
    """Return what ran, when, and with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    kind = "float32 under autocast to bfloat16" if device.type == "cuda" else "float32"
    versions = f"epsim {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    today = datetime.datetime.now(datetime.UTC).date()
    return f"{layers} layers, {kind}, on {name}; {versions}; {torch.get_num_threads()} threads; {today}"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="256 wide, 64 vision tokens")
    parser.add_argument("--layers", type=int, default=4, help="weights, gradients and AdamW: 6.7 GB each at 64 experts")
    parser.add_argument("--experts", type=int, nargs="+", default=[64], help="of a layer")
    parser.add_argument("--text-tokens", type=int, help="128; 32 with --reduced")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats {arguments.repeats} must be at least 2, to see how far they scatter")
    if any(num < TOPK or num % TOPK for num in arguments.experts):
        parser.error(f"--experts must be multiples of {TOPK}: as many experts a token, and as many bins")
    if arguments.text_tokens is None:
        arguments.text_tokens = 32 if arguments.reduced else 128
    return arguments


def main() -> None:
    """Measure and print a table, and with --json the rows."""
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    header = machine(resolve_device(arguments.device), arguments.layers)
    print(f"{header}; median of {arguments.repeats}\n{PAPER}")
    print(
        f"{'experts':>7}  {'variant':28}{'step':>12}{'ratio':>8}{'(quartiles)':>16}{'a layer':>12}"
        f"{'peak':>12}{'parameters':>12}{'buffers':>12}{'paper':>9}{'target':>8}"
    )
    rows = []
    for num_experts in arguments.experts:
        for row in measure(build(arguments, num_experts), arguments):
            rows.append(asdict(row))
            print(line(row))
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({"machine": header, "options": options, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

"""What a foreign file does not say: `Options`, from the command line; `choose_layers`, which rows are which layers.

What it does say must be as the options have it: `check_layer_ids`, `check_experts`, `check_topk`. `TAKEN` says which
options have a meaning for which format.
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from epsim.errors import FormatError
from epsim.model import ModelCard
from epsim.placement.file import PlacementFile, ranges

_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_MAX_LAYERS = 10_000
_NAMES = {
    "layer_ids": "--layer-ids",
    "num_experts": "--num-experts",
    "num_devices": "--devices",
    "topk": "--topk",
    "model": "--model",
    "placement": "--placement",
    "vision_token_ids": "--vision-token-id",
    "iteration": "--iteration",
    "request_tokens": "--request-tokens",
    "passes_as_requests": "--passes-as-requests",
    "drop_unrecorded_prefix": "--drop-unrecorded-prefix",
}
_LOADS = ("layer_ids", "num_experts", "model")
_PLACEMENT = (*_LOADS, "num_devices")
_ROUTING = (*_LOADS, "topk", "vision_token_ids")
TAKEN: dict[str, tuple[str, ...]] = {  # fields of Options
    "sglang": _PLACEMENT,
    "tensorrt-llm": _PLACEMENT,
    "vllm-ascend": _PLACEMENT,
    "exflow": _PLACEMENT,
    "sglang-logical-count": _LOADS,
    "sglang-stat": _LOADS,
    "tensorrt-llm-stats": (*_LOADS, "topk"),
    "sglang-per-token": (*_ROUTING, "placement", "passes_as_requests", "drop_unrecorded_prefix"),
    "sglang-routed-experts": _ROUTING,
    "vllm-routed-experts": _ROUTING,
    "flame-moe": (*_ROUTING, "iteration", "request_tokens"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says beside the file; None where it says nothing.

    layer_ids: real ids of the MoE layers, ascending.
    placement: the map from physical to logical experts of a recording.
    vision_token_ids: ids in the vocabulary that stand for image tokens.
    iteration: the checkpoint to take, where a folder has several.
    request_tokens: tokens of a request, where a file has no bounds of requests.
    passes_as_requests: take each forward pass as a request.
    drop_unrecorded_prefix: begin a request with its first token that was recorded.
    """

    layer_ids: tuple[int, ...] | None = None
    num_experts: int | None = None
    num_devices: int | None = None
    topk: int | None = None
    model: ModelCard | None = None
    placement: PlacementFile | None = None
    vision_token_ids: tuple[int, ...] = ()
    iteration: int | None = None
    request_tokens: int | None = None
    passes_as_requests: bool = False
    drop_unrecorded_prefix: bool = False

    @property
    def known_layer_ids(self) -> tuple[int, ...] | None:
        """Those of --layer-ids, else of the model."""
        if self.layer_ids is None and self.model is not None:
            return self.model.moe_layer_ids
        return self.layer_ids

    @property
    def known_num_experts(self) -> int | None:
        """That of --num-experts, else of the model."""
        if self.num_experts is None and self.model is not None:
            return self.model.num_experts
        return self.num_experts

    @property
    def known_topk(self) -> int | None:
        """That of --topk, else of the model."""
        return self.model.topk if self.topk is None and self.model is not None else self.topk


def parse_layer_ids(text: str) -> tuple[int, ...]:
    """Return the layer ids that a text lists.

    >>> parse_layer_ids("0,3-5")
    (0, 3, 4, 5)
    """
    ids: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise FormatError(f'--layer-ids: "{part}" is not a layer or a range of them; write e.g. 3-60 or 1,3,5')
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= _MAX_LAYERS:
            raise FormatError(f'--layer-ids: "{part}" are more than {_MAX_LAYERS} layers; write fewer')
        ids += range(first, last + 1)
    if not ids or any(a >= b for a, b in pairwise(ids)):
        raise FormatError(f'--layer-ids: "{text}" does not name layers once each and ascending; write e.g. 3-60')
    return tuple(ids)


def choose_layers(num_rows: int, options: Options, where: str) -> tuple[list[int], tuple[int, ...]]:
    """Return which rows of a file are those of MoE layers, and the real ids of these layers.

    As many ids as rows: the rows in their order. Fewer, where a row per layer of the whole model is there: the rows
    that bear the ids. No ids known: row i is layer i.
    """
    ids = options.known_layer_ids
    if ids is None:
        return list(range(num_rows)), tuple(range(num_rows))
    if len(ids) == num_rows:
        return list(range(num_rows)), ids
    if ids[-1] < num_rows:
        return list(ids), ids
    source = (
        "--layer-ids names" if options.layer_ids is not None else f"{options.model.name if options.model else ''} has"
    )
    raise FormatError(
        f"{where}: has {num_rows} layers, {source} {len(ids)}, up to {ids[-1]}; "
        "name as many with --layer-ids, or some of the rows"
    )


def check_taken(name: str, options: Options) -> None:
    """Raise FormatError for an option that is given and has no meaning for a format."""
    for field, option in _NAMES.items():
        value = getattr(options, field)
        if field not in TAKEN[name] and value is not None and value is not False and value != ():
            taken = ", ".join(_NAMES[other] for other in _NAMES if other in TAKEN[name])
            raise FormatError(f"{option}: has no meaning for {name}; leave it out, and of {taken} write what is needed")


def check_layer_ids(found: tuple[int, ...], options: Options, where: str) -> None:
    """Raise FormatError if a file that has layer ids has others than the options."""
    known = options.known_layer_ids
    if known not in (None, found):
        raise FormatError(
            f"{where}: has layers {ranges(found)}, --layer-ids or the model {ranges(known or ())}; "
            "leave --layer-ids out, and name another --model if any"
        )


def check_topk(found: int, options: Options, where: str) -> None:
    """Raise FormatError if a file that says how many experts a token has says another number than the options."""
    if options.known_topk not in (None, found):
        raise FormatError(f"{where}: has top-{found}, --topk or the model {options.known_topk}; write that number")


def check_experts(found: int, options: Options, where: str) -> None:
    """Raise FormatError if a file that says how many experts there are says another number than the options."""
    if options.known_num_experts not in (None, found):
        raise FormatError(
            f"{where}: has {found} experts, --num-experts or the model {options.known_num_experts}; write that number"
        )


def needed_num_experts(options: Options, where: str) -> int:
    """Return the number of experts; raises FormatError if neither --num-experts nor --model says it."""
    if options.known_num_experts is None:
        raise FormatError(f"{where}: does not say how many experts there are; write --num-experts or --model")
    return options.known_num_experts


def names(paths: list[Path]) -> list[str]:
    """Return the last parts of paths, for descriptions."""
    return [path.name for path in paths]

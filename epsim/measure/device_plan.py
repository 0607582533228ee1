"""What of a device is measured, and inside which passes: `Cell`s of operations, seated in `Setting`s by `plan_cells`.

Times are taken inside passes through all layers, since what a part takes depends on what ran before it: experts evict
the weights of the attention. So every cell of the grids is measured in a pass with about as many tokens as it has in
real steps. Two-axis grids double from cell to cell; long one-axis grids take factors of four at their upper end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log

from epsim.measure.ranges import Ranges
from epsim.model import ModelCard

At = tuple[int, ...]
FINE = 64  # up to here grids double, beyond they quadruple
ONCE_A_PASS = ("vision", "dense_ffn", "head")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A place in the grid of an operation (`epsim.cost.profile.AXES`)."""

    op: str
    at: At


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A kind of pass: its attention, and the cells of the other operations that are measured in it, by operation."""

    attention: Cell
    others: dict[str, tuple[Cell, ...]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the pass."""
        requests, tokens = self.attention.at
        return requests if self.decode else requests * tokens

    @property
    def decode(self) -> bool:
        return self.attention.op == "decode_attention"

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells that are measured in these passes."""
        return (self.attention, *(cell for cells in self.others.values() for cell in cells))

    def num_passes(self, samples: int, num_moe_layers: int) -> int:
        """Return how many passes give every cell so many samples."""
        each = [
            ceil(samples * len(cells) / (1 if op in ONCE_A_PASS else num_moe_layers))
            for op, cells in self.others.items()
        ]
        return max([*each, ceil(samples / num_moe_layers)])


def doubling(first: int, last: int, *, coarse: bool = False) -> list[int]:
    """Return first, 2 first, 4 first, ... and last; `coarse`: by factors of four above FINE."""
    values, value = [first], 2 * first
    while value * 1.4 < last:  # nearer than that, `last` alone does
        values.append(value)
        value *= 4 if coarse and value >= FINE else 2
    return values if first == last else [*values, last]


def grids(card: ModelCard, ranges: Ranges, *, on_host: bool, hidden_bytes: int) -> dict[str, list[At]]:
    """Return the cells of every operation that the model has.

    on_host: the device shares the host's memory. hidden_bytes: of a vector in the device's type.
    """
    requests = doubling(1, ranges.requests)
    tokens: list[At] = [(n,) for n in doubling(1, ranges.tokens, coarse=True)]
    vectors: list[At] = [(n,) for n in doubling(1, ranges.vectors, coarse=True)]
    found: dict[str, list[At]] = {
        "prefill_attention": [
            (q, n) for q in requests for n in doubling(*ranges.prompt) if q * n <= max(ranges.tokens, n)
        ],
        "decode_attention": [(q, n) for q in requests for n in doubling(*ranges.context)],
        "router": tokens,
        "experts": _experts(ranges, card.topk),
        "pack": vectors,
        "serve": vectors,
        "reduce": vectors,
        "head": [(q,) for q in requests],
    }
    if card.num_dense_layers:
        found["dense_ffn"] = tokens
    if card.moe is not None and card.moe.shared_ffn_size:
        found["shared_experts"] = tokens
    if ranges.images:
        found["vision"] = [(n,) for n in doubling(1, ranges.images)]
    if not on_host:
        found |= {op: [(n * hidden_bytes,) for (n,) in vectors] for op in ("to_host", "to_device")}
    return found


def _experts(ranges: Ranges, topk: int) -> list[At]:
    """Return (activated, pairs per expert): each column reaches as far as all pairs do on the next fewer experts.

    An expert has at most one pair of each token.
    """
    most = ceil(ranges.pairs / min(topk, ranges.experts))
    cells: list[At] = []
    fewer = 1
    for activated in doubling(1, ranges.experts):
        cells += [(activated, n) for n in doubling(1, min(most, ceil(ranges.pairs / fewer)), coarse=True)]
        fewer = activated
    return cells


def plan_cells(found: dict[str, list[At]], *, topk: int, hidden_bytes: int, tokens_per_image: int) -> list[Setting]:
    """Seat each cell in the setting whose number of tokens is nearest to that of real steps with such cells."""
    attentions = [Cell(op=op, at=at) for op in ("decode_attention", "prefill_attention") for at in found[op]]
    settings = [Setting(attention=cell, others={}) for cell in attentions]
    for op, cells in found.items():
        if op in ("decode_attention", "prefill_attention"):
            continue
        for at in cells:
            tokens = _tokens_with(op, at, topk=topk, hidden_bytes=hidden_bytes, tokens_per_image=tokens_per_image)
            seat = _nearest(settings, op, tokens)
            seat.others[op] = (*seat.others.get(op, ()), Cell(op=op, at=at))
    return settings


def _tokens_with(op: str, at: At, *, topk: int, hidden_bytes: int, tokens_per_image: int) -> float:
    """Return about how many home tokens a step has that asks for such a cell."""
    match op:
        case "experts":
            return at[0] * at[1] / topk
        case "to_host" | "to_device":
            return at[0] / hidden_bytes / topk
        case "vision":
            return at[0] * tokens_per_image
        case "router" | "dense_ffn" | "shared_experts" | "head":
            return at[0]
        case _:
            return at[0] / topk


def _nearest(settings: Sequence[Setting], op: str, tokens: float) -> Setting:
    """Return the setting with about so many tokens; of equals the one that has the fewest cells of the operation."""

    def distance(setting: Setting) -> tuple[float, int]:
        return abs(log(setting.num_tokens) - log(max(1.0, tokens))), len(setting.others.get(op, ()))

    usable = [setting for setting in settings if not (op == "vision" and setting.decode)]
    return min(usable, key=distance)

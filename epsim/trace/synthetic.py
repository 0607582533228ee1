"""Made-up routing traces: `uniform`, `zipf`, and `published` (the transfer ratios of SMoES table S10).

Each yields the requests group by group, so that memory stays bounded; `concatenate` or a `TraceWriter` takes
them. The same arguments give the same bytes. In a prompt the vision tokens come first and then the text, as
in LLaVA with the image before the question. Requests are contiguous, ids 0, 1, …. Layers and tokens are drawn
independently, and the order of the K experts of a token means nothing. Shapes: T tokens of a group, L MoE
layers, K top-k, E experts.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsim import __version__
from epsim.errors import TraceError
from epsim.trace.meta import ExpertIds, Modality, Phase, TraceMeta, TraceShape
from epsim.trace.published import TOKEN_MIX_PERCENT, transfer_ratios
from epsim.trace.routing import RoutingTrace

__all__ = [
    "OLMOE_SHAPE",
    "SyntheticWorkload",
    "TraceShape",
    "published",
    "published_workload",
    "uniform",
    "zipf",
]

OLMOE_SHAPE = TraceShape(layer_ids=tuple(range(16)), num_experts=64, topk=8)
VISION_TOKENS_PER_IMAGE = 576  # CLIP ViT-L/14 at 336 pixels: (336 / 14)^2
REQUESTS_PER_GROUP = 64

Ints = NDArray[np.int64]
Route = Callable[[RoutingTrace, int, np.random.Generator], NDArray[Any]]  # (group, layer, rng) -> ids [T, K]


@dataclass(frozen=True, kw_only=True)
class SyntheticWorkload:
    """How many requests, all alike, and the tokens of each. Decode tokens are one less than output tokens."""

    num_requests: int
    num_vision_tokens: int
    num_text_tokens: int
    num_decode_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = 1 if name == "num_requests" else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise TraceError(f"workload.{name}: {value!r} must be an integer of {low} or more")
        if not self.num_vision_tokens + self.num_text_tokens:
            raise TraceError("workload.num_text_tokens: 0 without vision tokens; a prompt needs a token")


def uniform(shape: TraceShape, workload: SyntheticWorkload, *, seed: int, model: str = "") -> Iterator[RoutingTrace]:
    """Yield a trace in which all sets of K experts are equally likely."""

    def route(group: RoutingTrace, layer: int, rng: np.random.Generator) -> ExpertIds:
        return _distinct(group.num_tokens, shape.num_experts, shape.topk, shape.expert_id_dtype, rng)

    return _generate(_meta(shape, seed, model, {"kind": "uniform", **asdict(workload)}), workload, route)


def zipf(
    shape: TraceShape, workload: SyntheticWorkload, *, exponent: float, seed: int, model: str = ""
) -> Iterator[RoutingTrace]:
    """Yield a trace with Zipf popularity: the n-th most popular expert of a layer has weight n^-exponent.

    Which expert that is, is a random permutation in each layer. The K experts of a token are drawn one after
    the other without replacement, each with a chance proportional to its weight (an exponential race, which
    is Gumbel top-k). So the load of an expert is not proportional to its weight: none can have more than 1 /
    K of it.
    """
    if not (np.isfinite(exponent) and exponent >= 0):
        raise TraceError(f"exponent: {exponent!r} must be a number of 0 or more")
    num_experts, setup = shape.num_experts, np.random.default_rng([seed, 1])
    weights = np.arange(1, num_experts + 1) ** -float(exponent)
    weights_LE = np.stack([weights[setup.permutation(num_experts)] for _ in shape.layer_ids])
    inverse_LE = (1 / weights_LE).astype(np.float32)

    def route(group: RoutingTrace, layer: int, rng: np.random.Generator) -> ExpertIds:
        arrival = rng.standard_exponential((group.num_tokens, num_experts), dtype=np.float32)
        arrival *= inverse_LE[layer]
        first = np.argpartition(arrival, shape.topk - 1, axis=1)[:, : shape.topk]
        ids: ExpertIds = first.astype(shape.expert_id_dtype)
        return ids

    parameters = {"kind": "zipf", "exponent": exponent, **asdict(workload)}
    return _generate(_meta(shape, seed, model, parameters), workload, route)


def published_workload(
    benchmark: str,
    *,
    num_requests: int,
    num_images: int = 1,
    tokens_per_image: int = VISION_TOKENS_PER_IMAGE,
    num_text_tokens: int | None = None,
    num_decode_tokens: int | None = None,
) -> SyntheticWorkload:
    """Return requests of 576 vision tokens per image (by default), text and decode tokens in table S10's proportion.

    The paper gives the proportions of a benchmark only: per-request counts follow by rounding, e.g. for MMMU
    576 * 19 / 79 = 139 text and 576 * 2 / 79 = 15 decode tokens. Counts that are given are taken as they are.
    """
    transfer_ratios(benchmark, "baseline")
    vision, text, decode = TOKEN_MIX_PERCENT[benchmark]
    num_vision = tokens_per_image * num_images
    return SyntheticWorkload(
        num_requests=num_requests,
        num_vision_tokens=num_vision,
        num_text_tokens=round(num_vision * text / vision) if num_text_tokens is None else num_text_tokens,
        num_decode_tokens=round(num_vision * decode / vision) if num_decode_tokens is None else num_decode_tokens,
    )


def published(
    benchmark: str,
    method: str,
    workload: SyntheticWorkload,
    *,
    seed: int,
    shape: TraceShape = OLMOE_SHAPE,
    model: str = "",
) -> Iterator[RoutingTrace]:
    """Yield a trace with the transfer ratios of one row of SMoES table S10 (two devices, OLMoE).

    The experts of a layer are split into a vision half and a text half. Prefill tokens live with the vision
    half, decode tokens with the text half; the experts of the other half are remote. For prefill vision,
    prefill text and decode tokens each, the number of remote experts of a token in a layer is beta-binomial
    with the published mean ("without DeDup") and the published chance of not being 0 ("with DeDup"), or
    binomial where the latter is more than independent draws give. It is drawn by systematic sampling within a
    group of requests, a layer and a kind of token, so that the ratios hold in small traces too. Within a half
    all sets are equally likely. The paper publishes no more than that: real routing also has popular experts,
    and neighbours in layer and position that go together.

    In "baseline" the vision half is experts 0 to E/2 - 1 of every layer, which a contiguous placement puts on
    the first device, as in the paper. For the two SMoES methods it is a random half in each layer, so that
    only a placement that looks at modality finds it.
    """
    ratios = transfer_ratios(benchmark, method)
    if shape.num_experts % 2 or shape.topk > shape.num_experts // 2:
        raise TraceError(f"num_experts: {shape.num_experts} must be even and at least twice topk, {2 * shape.topk}")
    chance = [
        remote_count_chances(shape.topk, *pair) for pair in zip(ratios.pairs_frac, ratios.tokens_frac, strict=True)
    ]
    halves_LE = _halves(shape, shuffled=method != "baseline", seed=seed)

    def route(group: RoutingTrace, layer: int, rng: np.random.Generator) -> ExpertIds:
        decode_T = group.phase_T == Phase.DECODE
        vision_T = group.modality_T == Modality.VISION
        num_remote_T = np.empty(group.num_tokens, dtype=np.int64)
        for of_T, chances in zip((vision_T, ~vision_T & ~decode_T, decode_T), chance, strict=True):
            num_remote_T[of_T] = _systematic(chances, int(of_T.sum()), rng)
        num_text_T = np.where(decode_T, shape.topk - num_remote_T, num_remote_T)
        return _from_halves(num_text_T, halves_LE[layer], shape, rng)

    parameters = {"kind": "published", "table": "SMoES S10", "benchmark": benchmark, "method": method}
    return _generate(_meta(shape, seed, model, {**parameters, **asdict(workload)}), workload, route)


def remote_count_chances(topk: int, pairs_frac: float, tokens_frac: float) -> NDArray[np.float64]:
    """Return float64 [K + 1], the chances of 0, 1, … K remote experts of a token.

    Beta-binomial with mean K * `pairs_frac` and 1 - `tokens_frac` for 0, or binomial where
    `tokens_frac` is more than that gives. Raises TraceError unless 0 < pairs_frac < 1 and pairs_frac <=
    tokens_frac.
    """
    if not 0 < pairs_frac < 1 or tokens_frac < pairs_frac:
        raise TraceError(f"transfer ratios {pairs_frac}, {tokens_frac}: must be 0 < pairs < 1 and pairs <= tokens")
    low, high = -12.0, 12.0  # of the logarithm of the concentration
    if tokens_frac >= 1 - _beta_binomial(topk, pairs_frac, high)[0]:
        return _beta_binomial(topk, pairs_frac, np.inf)
    # The chance of 0 falls as the concentration rises: halve the interval until it cannot be halved. (SciPy's root
    # finders would do, but loading them takes as long as the whole simulation of a small scenario.)
    while low < (middle := (low + high) / 2) < high:
        if 1 - _beta_binomial(topk, pairs_frac, middle)[0] < tokens_frac:
            low = middle
        else:
            high = middle
    return _beta_binomial(topk, pairs_frac, low)


def _beta_binomial(size: int, mean_frac: float, log_concentration: float) -> NDArray[np.float64]:
    """Return the chances of 0 to `size` successes, [size + 1]; binomial at infinite concentration."""
    ways = np.array([math.comb(size, n) for n in range(size + 1)], dtype=np.float64)
    n = np.arange(size + 1)
    if np.isinf(log_concentration):
        binomial: NDArray[np.float64] = ways * mean_frac**n * (1 - mean_frac) ** (size - n)
        return binomial
    a, b = math.exp(log_concentration) * np.array([mean_frac, 1 - mean_frac])
    # B(n + a, size - n + b) / B(a, b) is a product of three rising factorials: of a, of b, and one over that of a + b.
    rising_a = np.concatenate(([1.0], np.cumprod(a + np.arange(size))))
    rising_b = np.concatenate(([1.0], np.cumprod(b + np.arange(size))))
    chances: NDArray[np.float64] = ways * rising_a * rising_b[::-1] / np.prod(a + b + np.arange(size))
    return chances


def _generate(meta: TraceMeta, workload: SyntheticWorkload, route: Route) -> Iterator[RoutingTrace]:
    """Yield the requests in groups; group g draws from its own stream (seed, 0, g)."""
    for g, start in enumerate(range(0, workload.num_requests, REQUESTS_PER_GROUP)):
        rng = np.random.default_rng([meta.seed or 0, 0, g])
        size = min(REQUESTS_PER_GROUP, workload.num_requests - start)
        yield _group(meta, workload, range(start, start + size), route, rng)


def _group(
    meta: TraceMeta, workload: SyntheticWorkload, request_ids: range, route: Route, rng: np.random.Generator
) -> RoutingTrace:
    num_prompt = workload.num_vision_tokens + workload.num_text_tokens
    position = np.arange(num_prompt + workload.num_decode_tokens, dtype=np.int32)
    size = len(request_ids)
    ids_TLK = np.zeros((size * len(position), meta.num_layers, meta.topk), dtype=meta.expert_id_dtype)
    group = RoutingTrace(
        meta=meta,
        request_id_T=np.repeat(np.array(request_ids, dtype=np.int32), len(position)),
        position_T=np.tile(position, size),
        step_T=np.tile(np.maximum(position - num_prompt + 1, 0), size),
        phase_T=np.tile((position >= num_prompt).astype(np.uint8), size),
        modality_T=np.tile((position < workload.num_vision_tokens).astype(np.uint8), size),
        topk_expert_ids_TLK=ids_TLK,
    )
    for layer in range(meta.num_layers):
        ids_TLK[:, layer] = route(group, layer, rng)
    return group


def _meta(shape: TraceShape, seed: int, model: str, parameters: dict[str, Any]) -> TraceMeta:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TraceError(f"seed: {seed!r} must be an integer of 0 or more")
    return TraceMeta.of(
        shape,
        model=model,
        origin="synthetic",
        description=json.dumps(parameters, sort_keys=True),
        seed=seed,
        software=f"epsim {__version__}",
    )


def _halves(shape: TraceShape, *, shuffled: bool, seed: int) -> Ints:
    """Return int64 [L, E]: in each layer the experts of the vision half, then those of the text half."""
    order_LE = np.tile(np.arange(shape.num_experts), (shape.num_layers, 1))
    return np.random.default_rng([seed, 1]).permuted(order_LE, axis=1) if shuffled else order_LE


def _systematic(chances: NDArray[np.float64], size: int, rng: np.random.Generator) -> Ints:
    """Return int64 [size]: draws from 0 … K with these chances, each as often as expected to within one."""
    u = (np.arange(size) + rng.random()) / max(size, 1)
    return rng.permutation(np.searchsorted(np.cumsum(chances)[:-1], u, side="right"))


def _from_halves(num_text_T: Ints, halves_E: Ints, shape: TraceShape, rng: np.random.Generator) -> ExpertIds:
    """Return ids [T, K]: `num_text_T` experts from the text half, then the rest from the vision half."""
    half, topk = shape.num_experts // 2, shape.topk
    text_TK, vision_TK = (_distinct(len(num_text_T), half, topk, np.dtype(np.int64), rng) for _ in ("text", "vision"))
    k = np.arange(topk)
    other_TK = np.take_along_axis(vision_TK, np.maximum(k - num_text_T[:, None], 0), axis=1)
    place_TK = np.where(k < num_text_T[:, None], text_TK + half, other_TK)
    ids: ExpertIds = halves_E.astype(shape.expert_id_dtype)[place_TK]
    return ids


def _distinct(num_rows: int, pool: int, size: int, dtype: np.dtype[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Return [num_rows, size]: draws from range(pool) without replacement (partial Fisher-Yates shuffles)."""
    deck = np.tile(np.arange(pool, dtype=dtype), (num_rows, 1))
    rows = np.arange(num_rows)
    for k in range(size):
        other = rng.integers(k, pool, size=num_rows)
        drawn = deck[rows, other]
        deck[rows, other] = deck[:, k]
        deck[:, k] = drawn
    return deck[:, :size]

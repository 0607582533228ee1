"""Made-up traces: invariants, determinism, and every cell of SMoES table S10."""

import json

import numpy as np
import pytest

from epsim.errors import TraceError
from epsim.trace import Modality, Phase, RoutingTrace, TraceShape, check_trace, concatenate
from epsim.trace.file import TraceWriter
from epsim.trace.published import BENCHMARKS, METHODS, transfer_ratios
from epsim.trace.synthetic import (
    OLMOE_SHAPE,
    SyntheticWorkload,
    published,
    published_workload,
    remote_count_chances,
    uniform,
    zipf,
)

SMALL = SyntheticWorkload(num_requests=3, num_vision_tokens=40, num_text_tokens=20, num_decode_tokens=5)
SHAPE = TraceShape(layer_ids=(0, 1), num_experts=16, topk=4)


def halves_from_ids(trace: RoutingTrace) -> list[set[int]]:
    """The vision half of each layer, found from the routing alone: the E/2 experts that vision uses most."""
    vision = trace.topk_expert_ids_TLK[trace.modality_T == Modality.VISION]
    return [
        set(np.argsort(-np.bincount(vision[:, layer].ravel(), minlength=trace.meta.num_experts))[:32].tolist())
        for layer in range(trace.meta.num_layers)
    ]


def count_remote(trace: RoutingTrace, of_T: np.ndarray, remote: list[set[int]]) -> tuple[float, float]:
    """Percent of (token, expert) pairs, and of tokens, that go to `remote`: counted token by token."""
    pairs = tokens = total = 0
    for token in trace.topk_expert_ids_TLK[of_T]:
        for layer, experts in enumerate(token.tolist()):
            away = sum(expert in remote[layer] for expert in experts)
            pairs += away
            tokens += away > 0
            total += 1
    return 100 * pairs / (total * trace.meta.topk), 100 * tokens / total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_cell_of_table_s10(benchmark: str, method: str) -> None:
    shape = TraceShape(layer_ids=(0, 1, 2, 3), num_experts=64, topk=8)
    workload = published_workload(benchmark, num_requests=3)
    trace = concatenate(list(published(benchmark, method, workload, seed=5, shape=shape)))
    check_trace(trace)
    vision = [set(range(32))] * 4 if method == "baseline" else halves_from_ids(trace)
    text = [set(range(64)) - half for half in vision]
    prefill, vision_T = trace.phase_T == Phase.PREFILL, trace.modality_T == Modality.VISION
    row = transfer_ratios(benchmark, method)
    for of_T, remote, pairs, tokens in (
        (vision_T, text, row.pairs_frac[0], row.tokens_frac[0]),
        (prefill & ~vision_T, text, row.pairs_frac[1], row.tokens_frac[1]),
        (~prefill, vision, row.pairs_frac[2], row.tokens_frac[2]),
        (prefill, text, row.pairs_vt_frac, row.tokens_vt_frac),
    ):
        found = count_remote(trace, of_T, remote)
        assert found == pytest.approx((100 * pairs, 100 * tokens), abs=1.0)


def test_published_token_counts() -> None:
    # 576 * 19 / 79 = 138.5 and 576 * 2 / 79 = 14.6; 576 * 30 / 65 = 265.8 and 576 * 5 / 65 = 44.3.
    mmmu = published_workload("MMMU", num_requests=1)
    assert (mmmu.num_vision_tokens, mmmu.num_text_tokens, mmmu.num_decode_tokens) == (576, 139, 15)
    sqa = published_workload("SQA-IMG", num_requests=1)
    assert (sqa.num_vision_tokens, sqa.num_text_tokens, sqa.num_decode_tokens) == (576, 266, 44)
    two = published_workload("MMMU", num_requests=1, num_images=2, num_text_tokens=7, num_decode_tokens=0)
    assert (two.num_vision_tokens, two.num_text_tokens, two.num_decode_tokens) == (1152, 7, 0)


def test_the_halves_are_contiguous_in_the_baseline_only() -> None:
    workload = published_workload("MMMU", num_requests=1)
    shape = TraceShape(layer_ids=(0, 1), num_experts=64, topk=8)
    soft = halves_from_ids(concatenate(list(published("MMMU", "gaussian-soft", workload, seed=5, shape=shape))))
    assert soft[0] != soft[1]
    assert set(range(32)) not in soft


def test_remote_count_chances_by_hand() -> None:
    # K = 2, p = 1/2: a beta-binomial with a = b has P(0) = (a + 1) / (2 (2a + 1)), which is 1/3 for a = 1.
    assert remote_count_chances(2, 0.5, 2 / 3) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    # Independent draws give P(0) = 1/4 at most; more than 3/4 cannot be asked for, so: binomial.
    assert remote_count_chances(2, 0.5, 0.9) == pytest.approx([1 / 4, 1 / 2, 1 / 4])
    # All or nothing: P(at least one) = p.
    assert remote_count_chances(2, 0.5, 0.5) == pytest.approx([1 / 2, 0, 1 / 2], abs=1e-4)
    with pytest.raises(TraceError, match="pairs <= tokens"):
        remote_count_chances(2, 0.5, 0.4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_remote_count_chances_have_the_published_moments(benchmark: str, method: str) -> None:
    row = transfer_ratios(benchmark, method)
    for pairs, tokens in zip(row.pairs_frac, row.tokens_frac, strict=True):
        chances = remote_count_chances(8, pairs, tokens)
        assert chances.sum() == pytest.approx(1)
        assert chances @ np.arange(9) / 8 == pytest.approx(pairs)
        assert 1 - chances[0] == pytest.approx(min(tokens, 1 - (1 - pairs) ** 8), abs=1e-4)


def test_prompts_are_vision_then_text_and_requests_contiguous() -> None:
    trace = concatenate(list(uniform(SHAPE, SMALL, seed=1)))
    check_trace(trace)
    assert trace.request_id_T.tolist() == [0] * 65 + [1] * 65 + [2] * 65
    first = trace.take(slice(0, 65))
    assert first.modality_T.tolist() == [1] * 40 + [0] * 25
    assert first.step_T.tolist() == [0] * 60 + [1, 2, 3, 4, 5]
    assert trace.meta.origin == "synthetic"
    assert json.loads(trace.meta.description)["kind"] == "uniform"
    assert trace.meta.seed == 1


def test_uniform_uses_every_expert_alike() -> None:
    shape = TraceShape(layer_ids=(0,), num_experts=16, topk=4)
    workload = SyntheticWorkload(num_requests=4, num_vision_tokens=0, num_text_tokens=1000, num_decode_tokens=0)
    trace = concatenate(list(uniform(shape, workload, seed=1)))
    # Each of 16 experts is in a token's 4 with chance 1/4: mean 1000 of 4000, standard deviation 27.4. The
    # first of the four is each with chance 1/16: 250, standard deviation 15.3.
    counts = np.bincount(trace.topk_expert_ids_TLK.ravel(), minlength=16)
    assert abs(counts - 1000).max() < 5 * 27.4
    first = np.bincount(trace.topk_expert_ids_TLK[:, 0, 0], minlength=16)
    assert abs(first - 250).max() < 5 * 15.3


def test_zipf_popularity() -> None:
    # K = 1: loads are the weights themselves, 1, 1/2, 1/3, 1/4 over their sum 25/12: 48, 24, 16, 12 %.
    shape = TraceShape(layer_ids=(0, 1, 2), num_experts=4, topk=1)
    workload = SyntheticWorkload(num_requests=10, num_vision_tokens=0, num_text_tokens=1000, num_decode_tokens=0)
    trace = concatenate(list(zipf(shape, workload, exponent=1.0, seed=3)))
    order = set()
    for layer in range(3):
        counts = np.bincount(trace.topk_expert_ids_TLK[:, layer, 0], minlength=4)
        assert sorted(counts / 10_000, reverse=True) == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.025)
        order.add(tuple(np.argsort(-counts).tolist()))
    assert len(order) > 1
    check_trace(concatenate(list(zipf(SHAPE, SMALL, exponent=0.7, seed=3))))


def test_the_same_seed_gives_the_same_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def bytes_of(seed: int) -> bytes:
        path = tmp_path / "a.arrow"
        workload = published_workload("POPE", num_requests=2, num_text_tokens=9)
        parts = list(published("POPE", "attention-soft", workload, seed=seed, shape=SHAPE))
        with TraceWriter(path, parts[0].meta) as writer:
            for part in parts:
                writer.write(part)
        return path.read_bytes()

    assert bytes_of(1) == bytes_of(1)
    assert bytes_of(1) != bytes_of(2)


def test_groups_are_bounded_and_do_not_depend_on_later_ones() -> None:
    shape = TraceShape(layer_ids=(0,), num_experts=16, topk=4)
    many = SyntheticWorkload(num_requests=130, num_vision_tokens=1, num_text_tokens=1, num_decode_tokens=1)
    groups = list(uniform(shape, many, seed=1))
    assert [group.num_tokens for group in groups] == [192, 192, 6]
    check_trace(concatenate(groups))
    assert not np.array_equal(groups[0].topk_expert_ids_TLK, groups[1].topk_expert_ids_TLK)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TraceShape(layer_ids=(0,), num_experts=15, topk=2), "num_experts: 15 must be even"),
        (TraceShape(layer_ids=(0,), num_experts=8, topk=5), "must be even and at least twice topk, 10"),
    ],
)
def test_shapes_that_cannot_be_halved(shape: TraceShape, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        published("MMMU", "baseline", SMALL, seed=1, shape=shape)


def test_bad_arguments() -> None:
    with pytest.raises(TraceError, match='benchmark: "mmmu" is not in table S10; write one of MMMU, SQA-IMG'):
        published("mmmu", "baseline", SMALL, seed=1)
    with pytest.raises(TraceError, match='method: "smoes" is not in table S10'):
        published("MMMU", "smoes", SMALL, seed=1)
    with pytest.raises(TraceError, match="seed: -1 must be an integer of 0 or more"):
        uniform(OLMOE_SHAPE, SMALL, seed=-1)
    with pytest.raises(TraceError, match="exponent: -1 must be"):
        zipf(OLMOE_SHAPE, SMALL, exponent=-1, seed=1)
    with pytest.raises(TraceError, match=r"workload.num_requests: 0 must be an integer of 1 or more"):
        SyntheticWorkload(num_requests=0, num_vision_tokens=1, num_text_tokens=1, num_decode_tokens=1)
    with pytest.raises(TraceError, match="a prompt needs a token"):
        SyntheticWorkload(num_requests=1, num_vision_tokens=0, num_text_tokens=0, num_decode_tokens=1)

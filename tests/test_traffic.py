"""Traffic: a case worked out by hand, and the compiled kernel against its slow reference."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import traffic as slow
from reference.tiny import make_placement

from epsim.placement import Placement
from epsim.traffic import MessageFormat, StepTraffic, TrafficCounter, count_remote

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
Ids = NDArray[np.uint8] | NDArray[np.uint16]
Case = tuple[Ids, NDArray[np.int32], Placement, int]


def random_placement(rng: np.random.Generator, num_layers: int, num_experts: int, num_devices: int) -> Placement:
    """Every expert once, the free slots filled with random further replicas, in random order."""
    slots_per_device = -(-num_experts // num_devices) + int(rng.integers(0, 3))
    num_free = slots_per_device * num_devices - num_experts
    rows = [
        rng.permutation(np.append(np.arange(num_experts), rng.integers(0, num_experts, num_free)))
        for _ in range(num_layers)
    ]
    node_R = rng.integers(0, rng.integers(1, min(num_devices, 5) + 1), num_devices)
    return make_placement([row.tolist() for row in rows], node_R.tolist(), num_experts)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw routing, homes, placement and number of chunks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_devices = draw(st.sampled_from([1, 2, 3, 5, 8, 64, 65, 70, 130]))
    num_experts = draw(st.sampled_from([1, 4, 7, 60, 256, 300]))
    num_layers, num_chunks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    topk = draw(st.integers(1, min(num_experts, 9)))
    num_tokens = draw(st.sampled_from([0, 1, 2, 17, 40, 300]))  # a block is 256 tokens
    ids_TLE = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)
    ids_TLK: Ids = ids_TLE[:, :, :topk].astype(np.uint16)
    if num_experts <= 256:
        ids_TLK = ids_TLK.astype(np.uint8)
    homes = rng.permutation(num_devices)[: draw(st.integers(1, num_devices))]  # the others are home to nothing
    home_T = rng.choice(homes, num_tokens, p=rng.dirichlet(np.ones(len(homes)))).astype(np.int32)
    if draw(st.booleans()):
        home_T.sort()
    return ids_TLK, home_T, random_placement(rng, num_layers, num_experts, num_devices), num_chunks


def assert_same(fast: StepTraffic, reference: StepTraffic) -> None:
    for name in (field.name for field in fields(StepTraffic)):
        counted, expected = getattr(fast, name), getattr(reference, name)
        assert counted.dtype == np.int64, name
        np.testing.assert_array_equal(counted, expected, err_msg=name)


@PROPERTY
@given(case=cases())
def test_kernel_equals_the_reference(case: Case) -> None:
    ids_TLK, home_T, placement, num_chunks = case
    fast = TrafficCounter(placement, num_chunks).count(ids_TLK, home_T)
    assert_same(fast, slow.count_traffic(ids_TLK, home_T, placement, num_chunks))


def test_tokens_shared_out_over_threads() -> None:
    rng = np.random.default_rng(0)
    placement = random_placement(rng, 1, 8, 4)
    ids_TLK = np.argsort(rng.random((10_001, 1, 8)), axis=2)[:, :, :2].astype(np.uint8)
    home_T = rng.choice(4, 10_001, p=[0.1, 0.0, 0.7, 0.2]).astype(np.int32)
    fast = TrafficCounter(placement, 3).count(ids_TLK, home_T)
    assert_same(fast, slow.count_traffic(ids_TLK, home_T, placement, 3))


@PROPERTY
@given(case=cases())
def test_counts_are_consistent(case: Case) -> None:
    ids_TLK, home_T, placement, num_chunks = case
    num_tokens, num_layers, topk = ids_TLK.shape
    traffic = TrafficCounter(placement, num_chunks).count(ids_TLK, home_T)
    assert (traffic.pairs_LCRR.sum(axis=(1, 2, 3)) == num_tokens * topk).all()
    assert (traffic.slot_load_LCP.sum(axis=(1, 2)) == num_tokens * topk).all()
    per_home_R = np.bincount(home_T, minlength=placement.num_devices)
    np.testing.assert_array_equal(traffic.pairs_LCRR.sum(axis=(1, 3)), np.tile(topk * per_home_R, (num_layers, 1)))
    np.testing.assert_array_equal(traffic.device_pairs_LR, traffic.pairs_LCRR.sum(axis=(1, 2)))
    assert (traffic.device_experts_LR <= placement.slots_per_device).all()
    assert (traffic.device_experts_LR <= traffic.source_experts_LRR.sum(axis=1)).all()
    assert (traffic.experts_LCRR <= traffic.pairs_LCRR).all()
    assert (traffic.tokens_LCRR <= traffic.pairs_LCRR).all()
    assert ((traffic.tokens_LCRR > 0) == (traffic.pairs_LCRR > 0)).all()
    members_RN = placement.node_of_device_R[:, None] == np.arange(traffic.node_tokens_LCRN.shape[3])
    assert (traffic.node_tokens_LCRN <= traffic.tokens_LCRR @ members_RN).all()


@PROPERTY
@given(case=cases())
def test_chunks_add_up(case: Case) -> None:
    ids_TLK, home_T, placement, num_chunks = case
    whole = TrafficCounter(placement).count(ids_TLK, home_T)
    cut = TrafficCounter(placement, num_chunks).count(ids_TLK, home_T)
    for name in ("pairs_LCRR", "tokens_LCRR", "node_tokens_LCRN", "slot_load_LCP"):
        np.testing.assert_array_equal(getattr(cut, name).sum(axis=1, keepdims=True), getattr(whole, name))
    np.testing.assert_array_equal(cut.source_experts_LRR, whole.source_experts_LRR)
    per_chunk_CR = cut.pairs_LCRR[0].sum(axis=2) // ids_TLK.shape[2]
    assert (np.ptp(per_chunk_CR, axis=0) <= 1).all()


@PROPERTY
@given(case=cases())
def test_a_chunk_is_the_traffic_of_its_tokens(case: Case) -> None:
    ids_TLK, home_T, placement, num_chunks = case
    order_T = np.argsort(home_T, kind="stable")
    counter = TrafficCounter(placement, num_chunks)
    traffic, chunk_T = counter.count(ids_TLK, home_T), counter.chunk_of_token_T(home_T[order_T])
    for chunk in range(num_chunks):
        own_T = order_T[chunk_T == chunk]
        alone, part = TrafficCounter(placement).count(ids_TLK[own_T], home_T[own_T]), traffic.of_chunk(chunk)
        for name in (*vars(alone), "device_experts_LR"):
            np.testing.assert_array_equal(getattr(part, name), getattr(alone, name), err_msg=name)


@PROPERTY
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_count_remote_equals_the_reference(case: Case, seed: int) -> None:
    ids_TLK, home_T, placement, _ = case
    modality_T = np.random.default_rng(seed).integers(0, 2, len(home_T)).astype(np.uint8)
    counts = count_remote(ids_TLK, home_T, modality_T, placement.device_of_expert_RLE)
    np.testing.assert_array_equal(counts, slow.count_remote(ids_TLK, home_T, modality_T, placement))


# By hand: three devices, experts 0 1 | 2 3 | 4 5, devices 0 and 1 in node 0, device 2 in node 1. One layer, top 2.
# Token 0 (home 0): experts 0, 2. Token 1 (home 2): 0, 1. Token 2 (home 0): 4, 5. Token 3 (home 0): 1, 4.
# Token 4 (home 2): 2, 5. So home 0 has tokens 0, 2, 3 and home 2 has tokens 1, 4.
HAND_PLACEMENT = make_placement([[0, 1, 2, 3, 4, 5]], [0, 0, 1], 6)
HAND_IDS = np.array([[[0, 2]], [[0, 1]], [[4, 5]], [[1, 4]], [[2, 5]]], np.uint8)
HAND_HOMES = np.array([0, 2, 0, 0, 2], np.int32)


def test_one_chunk_by_hand() -> None:
    traffic = TrafficCounter(HAND_PLACEMENT).count(HAND_IDS, HAND_HOMES)
    # 0 to 0: token 0 with expert 0, token 3 with 1. 0 to 1: token 0 with 2. 0 to 2: token 2 with 4, 5, token 3 with 4.
    # 2 to 0: token 1 with 0 and 1. 2 to 1: token 4 with 2. 2 to 2: token 4 with 5.
    assert traffic.pairs_LCRR[0, 0].tolist() == [[2, 1, 3], [0, 0, 0], [2, 1, 1]]
    assert traffic.tokens_LCRR[0, 0].tolist() == [[2, 1, 2], [0, 0, 0], [1, 1, 1]]
    # To node 0: tokens 0 and 3 of home 0, both tokens of home 2. To node 1: tokens 2 and 3; token 4.
    assert traffic.node_tokens_LCRN[0, 0].tolist() == [[2, 2], [0, 0], [2, 1]]
    assert traffic.experts_LCRR[0, 0].tolist() == [[2, 1, 2], [0, 0, 0], [2, 1, 1]]
    assert traffic.source_experts_LRR[0].tolist() == [[2, 1, 2], [0, 0, 0], [2, 1, 1]]
    assert traffic.slot_load_LCP[0].tolist() == [[2, 2, 2, 0, 2, 2]]
    assert traffic.device_pairs_LR[0].tolist() == [4, 2, 4]
    assert traffic.device_experts_LR[0].tolist() == [2, 1, 2]


def test_two_chunks_by_hand() -> None:
    traffic = TrafficCounter(HAND_PLACEMENT, 2).count(HAND_IDS, HAND_HOMES)
    # Home 0 cuts its three tokens into {0} and {2, 3}, home 2 its two into {1} and {4}.
    assert traffic.pairs_LCRR[0, 0].tolist() == [[1, 1, 0], [0, 0, 0], [2, 0, 0]]
    assert traffic.pairs_LCRR[0, 1].tolist() == [[1, 0, 3], [0, 0, 0], [0, 1, 1]]
    assert traffic.tokens_LCRR[0, 1].tolist() == [[1, 0, 2], [0, 0, 0], [0, 1, 1]]
    assert traffic.node_tokens_LCRN[0, 1].tolist() == [[1, 2], [0, 0], [1, 1]]
    assert traffic.experts_LCRR[0, 1].tolist() == [[1, 0, 2], [0, 0, 0], [0, 1, 1]]


def test_remote_by_hand() -> None:
    # Text tokens 0, 1; vision tokens 2, 3, 4. Of two pairs each, remote: token 0 one; 1 two; 2 two; 3 one; 4 one.
    modality_T = np.array([0, 0, 1, 1, 1], np.uint8)
    counts = count_remote(HAND_IDS, HAND_HOMES, modality_T, HAND_PLACEMENT.device_of_expert_RLE)
    assert counts.tolist() == [[4, 3, 2, 2], [6, 4, 3, 3]]
    at_home = count_remote(HAND_IDS[:1, :, :1], HAND_HOMES[:1], modality_T[:1], HAND_PLACEMENT.device_of_expert_RLE)
    assert at_home.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]


def test_bytes_by_hand() -> None:
    form = MessageFormat(dispatch_vector_bytes=10.0, combine_vector_bytes=4.0, pair_bytes=1.0)
    traffic = TrafficCounter(HAND_PLACEMENT).count(HAND_IDS, HAND_HOMES)
    pairs, tokens = traffic.pairs_LCRR[0, 0], traffic.tokens_LCRR[0, 0]
    # Home 0 to device 2: 2 vectors of 10 bytes and 3 pairs of 1 byte with dedup, 3 vectors without.
    assert form.dispatch_bytes(tokens, pairs)[0, 2] == 23.0
    assert form.dispatch_bytes(pairs, pairs)[0, 2] == 33.0
    assert form.combine_bytes(tokens)[0, 2] == 8.0


def test_bytes_of_a_vector_by_hand() -> None:
    # 200 values: 2 or 4 bytes each, or 1 byte each and a scale of 4 bytes for each of two blocks of 128.
    form = MessageFormat.of(200, "fp32", "bf16")
    assert (form.dispatch_vector_bytes, form.combine_vector_bytes) == (800.0, 400.0)
    form = MessageFormat.of(200, "fp8", "fp32")
    assert (form.dispatch_vector_bytes, form.combine_vector_bytes) == (208.0, 800.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_both_id_types_count_the_same(dtype: type[np.unsignedinteger]) -> None:
    traffic = TrafficCounter(HAND_PLACEMENT, 2).count(HAND_IDS.astype(dtype), HAND_HOMES)
    assert_same(traffic, slow.count_traffic(HAND_IDS, HAND_HOMES, HAND_PLACEMENT, 2))


def test_a_step_without_tokens() -> None:
    traffic = TrafficCounter(HAND_PLACEMENT, 3).count(HAND_IDS[:0], HAND_HOMES[:0])
    assert traffic.pairs_LCRR.shape == (1, 3, 3, 3)
    assert all(not getattr(traffic, field.name).any() for field in fields(StepTraffic))


def test_experts_above_255_keep_their_number() -> None:
    placement = make_placement([list(range(600))], [0, 0], 600)
    traffic = TrafficCounter(placement).count(np.array([[[299, 300, 555]]], np.uint16), np.zeros(1, np.int32))
    assert np.flatnonzero(traffic.slot_load_LCP[0, 0]).tolist() == [299, 300, 555]
    assert traffic.pairs_LCRR[0, 0].tolist() == [[1, 2], [0, 0]]

"""Costs on a device, worked out by hand for a tiny model on a tiny device (`reference.tiny` has their numbers)."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.tiny import device_type, link, make_cluster, star, tiny_model

from epsim.cost import HomeWork, MemoryAccount, RooflineCost, account_memory
from epsim.errors import CapacityError
from epsim.model import LatentAttention, ModelCard
from epsim.model.vision import VisionEncoder
from epsim.placement import HomePlan, Placement, balanced

# 50 FLOP/s and 10 B/s are what the device reaches; 1 s per launch, 0.25 s per activated expert.
OVERHEADS = {"launch_overhead": 1.0, "expert_overhead": 0.25}
# 4 patches, no class token. Parameters: layer 4 + 2 = 6, patch embedding 3, positions 4, projector 2 * (1 + 2) = 6:
# 19, 38 bytes. FLOPs: layer 2*4*6 + 4*16*1 = 112, embedding 2*4*3 = 24, projector 2*4*6 = 48: 184.
VISION = VisionEncoder(
    name="v",
    image_size=2,
    patch_size=1,
    hidden_size=1,
    ffn_size=1,
    num_layers=1,
    output_size=2,
    num_class_tokens=0,
)


def make_cost(model: ModelCard | None = None, **type_changes: Any) -> RooflineCost:
    return RooflineCost(model or tiny_model(), star(2, 1.0, **{**OVERHEADS, **type_changes}))


def work(**counts: list[int] | bool) -> HomeWork:
    """Return the work of two devices; what is not given is 0."""
    fields = {name: np.zeros(2, np.int64) for name in HomeWork.__dataclass_fields__ if name != "decode"}
    arrays = {name: np.array(value) for name, value in counts.items() if name != "decode"}
    return HomeWork(decode=bool(counts.get("decode", False)), **{**fields, **arrays})


def test_attention_bound_by_memory() -> None:
    # 3 tokens, 6 pairs: 3*24 + 6*8 = 120 FLOPs, 2.4 s. Weights 24 + KV (0 + 3)*4 + activations 2*3*4 = 60 bytes, 6 s.
    seconds = make_cost().attention_s_R(work(tokens_R=[3, 0], attention_pairs_R=[6, 0]))
    assert seconds.tolist() == pytest.approx([1 + 6.0, 0.0])


def test_attention_bound_by_compute() -> None:
    # 100 pairs more: 72 + 106*8 = 920 FLOPs, 18.4 s; 5 cached tokens more: 80 bytes, 8 s.
    seconds = make_cost().attention_s_R(work(tokens_R=[3, 0], attention_pairs_R=[106, 0], kv_tokens_R=[5, 0]))
    assert seconds.tolist() == pytest.approx([1 + 18.4, 0.0])


def test_attention_in_decode_reads_the_cache() -> None:
    # One token over 20 cached: 24 + 20*8 = 184 FLOPs, 3.68 s; 24 + 21*4 + 8 = 116 bytes, 11.6 s.
    counts = work(decode=True, tokens_R=[1, 1], attention_pairs_R=[20, 20], kv_tokens_R=[20, 20])
    assert make_cost().attention_s_R(counts).tolist() == pytest.approx([12.6, 12.6])


def test_latent_attention_costs_more_per_pair_in_decode() -> None:
    # Query: 2*2*(3+1) = 16, down 2*(5+1) = 12, up 5*2*(3+2) = 50, out 2*2*2 = 8: 86 parameters, 172 bytes, 172 FLOPs
    # a token; (5+1)*2 = 12 bytes cached. A pair costs 2*2*(4+2) = 24 FLOPs in prefill, on the latent 2*2*(6+5) = 44.
    attention = LatentAttention(num_heads=2, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=1, v_head_dim=2)
    cost = make_cost(tiny_model(attention=attention))
    # Two tokens, 1000 pairs, nothing cached: 344 + 24000 FLOPs or 344 + 44000; the 172 + 24 + 16 bytes take 21.2 s.
    prefill = cost.attention_s_R(work(tokens_R=[2, 0], attention_pairs_R=[1000, 0]))
    decode = cost.attention_s_R(work(decode=True, tokens_R=[2, 0], attention_pairs_R=[1000, 0]))
    assert prefill.tolist() == pytest.approx([1 + 24344 / 50, 0.0])
    assert decode.tolist() == pytest.approx([1 + 44344 / 50, 0.0])
    # One decode token over 10 cached: 172 + 440 FLOPs, 12.24 s; 172 + 11*12 + 8 = 312 bytes, 31.2 s.
    short = work(decode=True, tokens_R=[1, 0], attention_pairs_R=[10, 0], kv_tokens_R=[10, 0])
    assert cost.attention_s_R(short)[0] == pytest.approx(1 + 31.2)


@pytest.mark.parametrize(
    ("part", "few_s", "many_s"),
    [
        # Two tokens: the weights and 16 bytes of activations. 300 tokens: 2400 bytes of them, 16 to 48 FLOPs each.
        ("router_s_R", (16 + 16) / 10, (16 + 2400) / 10),
        ("shared_experts_s_R", (24 + 16) / 10, (24 + 2400) / 10),
        ("dense_ffn_s_R", (48 + 16) / 10, 300 * 48 / 50),
    ],
)
def test_parts_of_home_tokens(part: str, few_s: float, many_s: float) -> None:
    seconds = getattr(make_cost(), part)(work(tokens_R=[2, 300]))
    assert seconds.tolist() == pytest.approx([1 + few_s, 1 + many_s])


def test_a_faster_memory_leaves_the_flops() -> None:
    # 200 B/s: the router's 300 * 16 FLOPs take 96 s, its bytes 12.08 s.
    seconds = make_cost(memory_bandwidth=400.0).router_s_R(work(tokens_R=[0, 300]))
    assert seconds.tolist() == pytest.approx([0.0, 97.0])


def test_head() -> None:
    # One output: 20 bytes of weights + 8, 2.8 s. 100: 2000 FLOPs take 40 s, 820 bytes 82 s.
    assert make_cost().head_s_R(work(outputs_R=[1, 100])).tolist() == pytest.approx([3.8, 83.0])


def test_vision() -> None:
    cost = make_cost(tiny_model(vision=VISION))
    # One image: 184 FLOPs take 3.68 s, 38 bytes 3.8 s. Two: 7.36 s.
    assert cost.vision_s_R(work(images_R=[1, 2])).tolist() == pytest.approx([4.8, 8.36])
    assert make_cost().vision_s_R(work(images_R=[1, 2])).tolist() == [0.0, 0.0]


def test_experts_read_weights_once_per_activated_expert() -> None:
    cost = make_cost()
    # 5 pairs on 1 expert: 12 + 5*8 = 52 bytes; on 3: 36 + 40 = 76; 0.25 s each. 12 FLOPs a pair stay below.
    seconds = cost.experts_s(np.array([5, 5]), np.array([1, 3]))
    assert seconds.tolist() == pytest.approx([1 + 5.2 + 0.25, 1 + 7.6 + 0.75])
    # 200 B/s: 100 pairs on 1 expert are 1200 FLOPs, 24 s; 812 bytes take 4.06 s.
    fast = make_cost(memory_bandwidth=400.0).experts_s(np.array([100, 0]), np.array([1, 0]))
    assert fast.tolist() == pytest.approx([1 + 24 + 0.25, 0.0])


def test_two_kernels_over_the_same_expert_read_it_twice() -> None:
    cost = make_cost()
    together = cost.experts_s(np.array([4, 0]), np.array([1, 0]))[0]
    apart = 2 * cost.experts_s(np.array([2, 0]), np.array([1, 0]))[0]
    # One read of 12 bytes, one launch and one expert overhead more.
    assert apart - together == pytest.approx(1.2 + 1.0 + 0.25)


def test_experts_keep_leading_axes() -> None:
    pairs_LCRR = np.arange(3 * 2 * 2 * 2).reshape(3, 2, 2, 2)
    activated_LCRR = np.minimum(pairs_LCRR, 2)
    seconds = make_cost().experts_s(pairs_LCRR, activated_LCRR)
    assert seconds.shape == pairs_LCRR.shape
    assert seconds[2, 1, 0, 1] == make_cost().experts_s(np.array([0, 21]), np.array([0, 2]))[1]


def test_devices_differ() -> None:
    types = [device_type(), device_type(memory_bandwidth=40.0, launch_overhead=3.0)]
    cost = RooflineCost(tiny_model(), make_cluster(types, [link("d0", "d1", 1.0)]))
    # 32 bytes each: 3.2 s, and 3 + 1.6 s.
    assert cost.router_s_R(work(tokens_R=[2, 2])).tolist() == pytest.approx([3.2, 4.6])


def test_no_work_takes_no_time() -> None:
    cost, idle = make_cost(tiny_model(vision=VISION)), work()
    for part in ("attention_s_R", "router_s_R", "dense_ffn_s_R", "shared_experts_s_R", "vision_s_R", "head_s_R"):
        assert getattr(cost, part)(idle).tolist() == [0.0, 0.0], part
    nothing = np.zeros((2, 3, 2, 2), np.int64)
    assert not cost.experts_s(nothing, nothing).any()


def test_a_model_without_shared_experts_spends_nothing_on_them() -> None:
    model = tiny_model()
    assert model.moe is not None
    without = replace(model, moe=replace(model.moe, num_shared_experts=0, shared_expert_ffn_size=None))
    assert make_cost(without).shared_experts_s_R(work(tokens_R=[5, 5])).tolist() == [0.0, 0.0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 10**6),
    more=st.integers(0, 10**6),
    pairs=st.integers(0, 10**9),
    decode=st.booleans(),
)
def test_more_work_never_takes_less_time(tokens: int, more: int, pairs: int, decode: bool) -> None:
    cost = make_cost()
    counts = work(
        decode=decode, tokens_R=[tokens, tokens + more], attention_pairs_R=[pairs, pairs + more], outputs_R=[0, 0]
    )
    for part in (cost.attention_s_R, cost.router_s_R, cost.dense_ffn_s_R, cost.shared_experts_s_R):
        less, longer = part(counts)
        assert 0 <= less <= longer
    less, longer = cost.experts_s(np.array([tokens, tokens + more]), np.minimum([tokens, tokens + more], 4))
    assert 0 <= less <= longer


# Memory.


def make_account(homes: HomePlan | None = None, vision: VisionEncoder | None = VISION) -> MemoryAccount:
    placement = Placement(
        policy="test",
        num_experts=4,
        physical_to_logical_LP=np.array([[0, 1, 2, 3, 0, 1]] * 2, np.int32),
        node_of_device_R=np.zeros(3, np.int32),
    )
    return account_memory(
        model=tiny_model(vision=vision),
        cluster=star(3, 1.0),
        placement=placement,
        homes=homes or balanced(3),
        kv_tokens_R=np.array([10, 0, 7]),
        tokens_R=np.array([5, 0, 2]),
        dedup=True,
    )


def test_memory_by_hand() -> None:
    account = make_account()
    # Two slots in each of two MoE layers, 12 bytes each.
    assert account.experts_bytes_R.tolist() == [48.0] * 3
    # Attention 3*24, dense 48, router and shared experts 2*(16 + 24), embedding and head 20 each, vision 38.
    assert account.shared_bytes_R.tolist() == [72 + 48 + 80 + 40 + 38] * 3
    # 4 bytes in each of 3 layers per cached token.
    assert account.kv_bytes_R.tolist() == [120.0, 0.0, 84.0]
    # min(K, R - 1) = 2 vectors of 4 bytes out per home token, and every token of the others in.
    assert account.buffers_bytes_R.tolist() == [(10 + 2) * 4, (0 + 7) * 4, (4 + 5) * 4]
    assert account.usable_bytes_R.tolist() == [900.0] * 3
    assert account.total_bytes_R.tolist() == [48 + 278 + 120 + 48, 48 + 278 + 28, 48 + 278 + 84 + 36]
    account.check(batch_size=3)


@pytest.mark.parametrize(
    # Top 2, but only one other device: with dedup 1 vector for each of 5 and 2 tokens, else 2.
    ("dedup", "vectors"),
    [(True, 1), (False, 2)],
)
def test_buffers_of_two_devices_send_to_one(dedup: bool, vectors: int) -> None:
    account = account_memory(
        model=tiny_model(),
        cluster=star(2, 1.0),
        placement=Placement(
            policy="test",
            num_experts=4,
            physical_to_logical_LP=np.array([[0, 1, 2, 3]] * 2, np.int32),
            node_of_device_R=np.zeros(2, np.int32),
        ),
        homes=balanced(2),
        kv_tokens_R=np.array([0, 0]),
        tokens_R=np.array([5, 2]),
        dedup=dedup,
    )
    assert account.buffers_bytes_R.tolist() == [(5 + 2) * 4 * vectors, (2 + 5) * 4 * vectors]


def test_only_homes_hold_the_other_weights() -> None:
    plan = HomePlan(prefill_devices=np.array([0], np.int32), decode_devices=np.array([2], np.int32))
    assert make_account(plan, vision=None).shared_bytes_R.tolist() == [240.0, 0.0, 240.0]


def test_memory_as_plain_values() -> None:
    values = make_account().as_dict()
    assert list(values) == ["d0", "d1", "d2"]
    assert values["d1"] == {
        "experts": 48.0,
        "other_weights": 278.0,
        "kv_cache": 0.0,
        "buffers": 28.0,
        "total": 354.0,
        "usable": 900.0,
    }


def test_what_does_not_fit_is_refused_with_numbers() -> None:
    account = replace(make_account(), usable_bytes_R=np.array([900.0, 300.0, 440.0]))
    with pytest.raises(CapacityError) as error:
        account.check(batch_size=3)
    # d1 lacks 54 bytes, d2 only 6.
    assert re.fullmatch(
        r"workload: batch 3 does not fit on d1: experts 48 B \+ other weights 278 B \+ KV cache 0 \w+ "
        r"\+ buffers 28 B = 354 B of 300 B usable; use smaller batches, shorter requests, or more devices",
        str(error.value),
    )


def test_what_fits_exactly_is_accepted() -> None:
    account = make_account()
    replace(account, usable_bytes_R=account.total_bytes_R).check(batch_size=3)


def test_efficiency_rises_with_rows_up_to_one() -> None:
    # 100 FLOP/s peak, half of it at 1024 rows, exponent 0.5: 256 rows reach 0.5 * 0.5 = 0.25, 4 * 1024 rows
    # 0.5 * 2 = 1, and more rows no more. Dense FFN: 48 FLOPs a row; enough memory bandwidth not to matter.
    cost = make_cost(efficiency_exponent=0.5, memory_bandwidth=1e9, launch_overhead=0.0)
    for rows, efficiency in ((256, 0.25), (1024, 0.5), (4096, 1.0), (9000, 1.0)):
        seconds = cost.dense_ffn_s_R(work(tokens_R=[rows, 0]))
        assert seconds.tolist() == pytest.approx([rows * 48 / (100 * efficiency), 0.0])


def test_every_request_adds_its_overhead_to_attention() -> None:
    counts: dict[str, list[int] | bool] = {"tokens_R": [3, 0], "attention_pairs_R": [6, 0]}
    without = make_cost().attention_s_R(work(**counts))
    seconds = make_cost(request_overhead=0.5).attention_s_R(work(**counts, requests_R=[3, 0]))
    assert (seconds - without).tolist() == pytest.approx([1.5, 0.0])

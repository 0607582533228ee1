"""Figures of merit by hand, and their invariants."""

import numpy as np
import pytest

from epsim.metrics import (
    RequestRecord,
    StepRecord,
    TransferCounts,
    balancedness,
    distribution,
    goodput_rps,
    summarise_phase,
)


def request(*token_times_s: float, arrival_s: float = 0.0) -> RequestRecord:
    return RequestRecord(request_id=0, arrival_s=arrival_s, token_times_s=token_times_s)


def test_ttft_tpot_and_itl_by_hand() -> None:
    # Arrives at 1 s; tokens at 3, 4, 6, 9 s: ttft 2, e2e 8, tpot (8 - 2) / 3 = 2, gaps 1, 2, 3.
    record = request(3, 4, 6, 9, arrival_s=1)
    assert (record.ttft_s, record.e2e_s, record.tpot_s) == (2, 8, 2)
    assert record.itl_s.tolist() == [1, 2, 3]


def test_one_token_has_no_tpot() -> None:
    record = request(3)
    assert record.tpot_s is None
    assert record.itl_s.size == 0


def test_goodput_counts_requests_that_meet_all_limits() -> None:
    # ttft 1, 1, 3; tpot 1, 3, none. Within ttft <= 2: two; within tpot <= 2 as well: one; over 2 s.
    requests = [request(1, 2), request(1, 4), request(3)]
    assert goodput_rps(requests, 2.0, None, None) == 1.5
    assert goodput_rps(requests, 2.0, 2.0, None) == 1.0
    assert goodput_rps(requests, 2.0, 2.0, 2.0) == 0.5
    assert goodput_rps(requests, 2.0, None, 2.0) == 1.0  # the request of one token meets any TPOT limit


def test_distribution_interpolates() -> None:
    # 0, 1, .., 10: median 5, 90 % at 9, 99 % at 9.9.
    assert distribution(list(range(11))) == pytest.approx({"mean": 5, "p50": 5, "p90": 9, "p99": 9.9, "max": 10})
    assert distribution([]) is None


def test_balancedness_in_both_forms() -> None:
    # Layer 1: loads 4, 2 -> mean 3, max 4; layer 2: 1, 1 -> 1, 1; a layer without load does not count.
    loads_LR = np.array([[4, 2], [1, 1], [0, 0]])
    result = balancedness([loads_LR[:2], loads_LR[2:]])
    assert result == pytest.approx({"ratio_of_sums": (3 + 1) / (4 + 1), "mean_of_ratios": (0.75 + 1) / 2})
    assert balancedness([loads_LR[2:]]) is None
    assert balancedness([np.zeros((1, 0))]) is None  # nobody can serve


def test_transfer_ratios_by_hand() -> None:
    transfers = TransferCounts()
    # text: 8 pairs, 6 remote, 2 visits, 2 remote; vision: 16 pairs, 4 remote, 4 visits, 1 remote.
    transfers.add("prefill", np.array([[8, 6, 2, 2], [16, 4, 4, 1]]))
    ratios = transfers.ratios()
    assert ratios["without_dedup"] == pytest.approx(
        {"prefill_vision": 0.25, "prefill_text": 0.75, "prefill_all": 10 / 24, "decode_text": None}
    )
    assert ratios["with_dedup"] == pytest.approx(
        {"prefill_vision": 0.25, "prefill_text": 1.0, "prefill_all": 0.5, "decode_text": None}
    )


def step(duration_s: float, busy_s: float, kv_exposed_s: float = 0.0) -> StepRecord:
    return StepRecord(
        batch=0,
        phase="prefill",
        step=0,
        start_s=0.0,
        duration_s=duration_s,
        kv_exposed_s=kv_exposed_s,
        num_tokens=1,
        parts_s={"attention": np.array([1.0, 3.0])},
        link_busy_s_X=np.array([busy_s]),
        link_bytes_X=np.array([100.0]),
        pairs_LR=np.array([[1, 3, 0]]),
        serving_R=np.array([True, True, False]),
        sent_bytes=100.0 * duration_s,
        contended=busy_s > 2,
    )


def test_phase_summary_by_hand() -> None:
    # Busy 1 + 3 of 2 + 4 + 2 (the second step's KV wait) = 8 s.
    summary = summarise_phase([step(2.0, 1.0), step(4.0, 3.0, kv_exposed_s=2.0)], ["wire"])
    assert summary is not None
    assert summary["step_s"] == 3.0
    assert summary["parts_s"] == {"attention": 2.0}
    assert summary["links"] == {"wire": {"busy_frac": 0.5, "bytes_per_step": 100.0}}
    assert summary["sent_bytes_per_step"] == 300.0  # 200 and 400
    assert summary["contended_steps_frac"] == 0.5
    assert summary["balancedness"] == {"ratio_of_sums": 2 / 3, "mean_of_ratios": 2 / 3}  # of the two that can serve
    assert summarise_phase([], ["wire"]) is None

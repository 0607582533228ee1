"""Published exchanges: bytes and times by hand, loads against the event engine, fits, data, command, document."""

import csv
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsim import cli
from epsim.errors import InputError
from epsim.report.files import to_json
from epsim.sim import simulate_step
from epsim.traffic import MessageFormat
from epsim.validate import exchange_document, exchange_study
from epsim.validate.exchange_cluster import exchange_cluster
from epsim.validate.exchange_data import Measured, load_deepep, load_deepep_v1, load_nccl, read_deepep
from epsim.validate.exchange_document import cells_table, constants_table, groups_table, targets_table
from epsim.validate.exchange_fit import Constants, fit_constants
from epsim.validate.exchange_load import Load, combine_bytes, dispatch_bytes, exchange_plan, load_of
from epsim.validate.exchange_nccl import collective_load
from epsim.validate.exchange_prose import CHOICES, HEADER, MODEL, TABLES
from epsim.validate.exchange_report import exchange_report
from epsim.validate.exchange_routing import Exchange, draw_exchange, draw_topk, masked
from epsim.validate.exchange_study import STUDIES, published_s, row_load

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
MEASURED = ROOT.parent / "shared" / "measured"
FORM = MessageFormat.of(7168, "fp8", "bf16")
STUDY = {study.key: study for study in STUDIES}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return exchange_report()


def even_exchange(num_ranks: int, pairs: float) -> Exchange:
    """Every device sends so many pairs, each a token of its own, to every device."""
    pairs_RR = np.full((num_ranks, num_ranks), pairs)
    node_tokens_RN = np.full((num_ranks, -(-num_ranks // 8)), 8 * pairs)
    return Exchange(pairs_RR=pairs_RR, tokens_RR=pairs_RR, node_tokens_RN=node_tokens_RN)


def test_bytes_and_time_of_a_low_latency_dispatch_by_hand() -> None:
    # A vector: 7168 bytes + 56 scales of 4 + 8 for its pair = 7400. 128 tokens, top-8, 16 GPUs: 64 pairs to each.
    # NIC: 8 far GPUs * 64 * 7400 = 3 788 800 bytes at 50 GB/s = 75.776 us. NVLink: 7 * 64 * 7400 at 450 GB/s.
    cluster = exchange_cluster("H200", 16)
    bytes_RR, to_nodes = dispatch_bytes(even_exchange(16, 64), FORM, "none", cluster.node_of_device_R)
    assert to_nodes is None
    load = load_of(cluster, bytes_RR)
    assert load.network_s == pytest.approx(75.776e-6)
    assert load.nvlink_s == pytest.approx(3_315_200 / 450e9)
    assert load.latency_s == pytest.approx(2.7e-6)
    # Latency 10 us and half of NVLink's rate: 10 + 2.7 + max(14.734, 75.776) us.
    constants = Constants(latency_s=10e-6, nvlink_share=0.5)
    assert constants.predict_s(load) == pytest.approx(88.476e-6)
    assert constants.limit(load) == "network"


def test_bytes_of_a_normal_combine_by_hand() -> None:
    # 16 GPUs, 10 tokens from each to each device, all different, 80 to each node; a BF16 vector has 14336 bytes.
    # NIC: 80 vectors. NVLink of a GPU: to 7 in its node from itself, and as a gateway to the same 7 from its peer.
    cluster = exchange_cluster("H200", 16)
    load = load_of(cluster, *combine_bytes(even_exchange(16, 10), FORM, "node"))
    assert load.network_s == pytest.approx(80 * 14336 / 50e9)
    assert load.nvlink_s == pytest.approx(2 * 7 * 10 * 14336 / 450e9)
    assert load.latency_s == pytest.approx(2.7e-6 + 0.47e-6)


def test_the_share_goes_with_the_sms_up_to_the_specification() -> None:
    load = Load(nvlink_s=1e-3, network_s=0.0, latency_s=0.0)
    constants = Constants(nvlink_share=0.6)
    times = [constants.predict_s(load, num_sms) for num_sms in (4, 20, 24, 40)]
    # By hand: 0.6 * 4 / 20 = 0.12; 0.6; 0.72; 1.2, which is more than the link has.
    assert times == pytest.approx([1e-3 / 0.12, 1e-3 / 0.6, 1e-3 / 0.72, 1e-3])


@pytest.mark.parametrize(
    ("kind", "num_ranks", "nvlink_us", "latency_us"),
    [
        # 4.5 MB; all-to-all: 7/8 of it leave at 450 GB/s: 8.75 us. Rings the same in 7 steps, all-reduce twice.
        ("alltoall", 8, 8.75, 0.47),
        ("all_gather", 8, 8.75, 7 * 0.47),
        ("reduce_scatter", 4, 7.5, 3 * 0.47),
        ("all_reduce", 2, 10.0, 2 * 0.47),
    ],
)
def test_collectives_by_hand(kind: str, num_ranks: int, nvlink_us: float, latency_us: float) -> None:
    load = collective_load(
        Measured(table="nccl", kind=kind, device="H100", num_ranks=num_ranks, time_s=1.0, num_bytes=4_500_000)
    )
    assert (load.nvlink_s, load.network_s, load.latency_s) == pytest.approx((nvlink_us / 1e6, 0, latency_us / 1e6))


def test_the_event_engine_ends_with_the_busiest_link_when_messages_are_cut_finely() -> None:
    cluster = exchange_cluster("H200", 16)
    drawn = draw_exchange(cluster, 128, 8, 256, False, np.random.default_rng(0))
    bytes_RR, _ = dispatch_bytes(drawn, FORM, "none", cluster.node_of_device_R)
    load = load_of(cluster, bytes_RR)
    result, _ = simulate_step(exchange_plan(cluster, bytes_RR), replace(cluster, segment_bytes=7400), "event")
    assert load.network_s > 5 * load.nvlink_s
    assert load.network_s + load.latency_s <= result.end_s < 1.06 * (load.network_s + load.latency_s)


def test_the_event_engine_ends_with_the_busiest_link_when_gateways_pass_on_in_pieces() -> None:
    # The pieces that DeepEP's gateways pass on: chunks of an asynchronous step, in which nothing is computed and a byte
    # per message goes home, whose way has the same latency.
    cluster = exchange_cluster("H200", 16)
    drawn = draw_exchange(cluster, 128, 8, 256, True, np.random.default_rng(0))
    plan = exchange_plan(cluster, *dispatch_bytes(drawn, FORM, "node", cluster.node_of_device_R))
    load = load_of(cluster, *dispatch_bytes(drawn, FORM, "node", cluster.node_of_device_R))
    chunks = 32
    cut = replace(
        plan,
        mode="async",
        remote_s_LCRR=np.repeat(plan.remote_s_LCRR, chunks, axis=1),
        dispatch_bytes_LCRR=np.repeat(plan.dispatch_bytes_LCRR, chunks, axis=1) / chunks,
        combine_bytes_LCRR=np.repeat(np.sign(plan.dispatch_bytes_LCRR), chunks, axis=1),
        node_dispatch_bytes_LCRN=np.repeat(plan.node_dispatch_bytes_LCRN, chunks, axis=1) / chunks,
        node_combine_bytes_LCRN=np.repeat(np.sign(plan.node_dispatch_bytes_LCRN), chunks, axis=1),
    )
    result, _ = simulate_step(cut, replace(cluster, segment_bytes=7400), "event")
    busy_s = max(load.nvlink_s, load.network_s)
    assert busy_s + 2 * load.latency_s <= result.end_s < 1.15 * (busy_s + 2 * load.latency_s)


def test_picks_are_distinct_and_dedup_counts_are_the_expected_ones() -> None:
    # Expected distinct nodes of a uniform top-8 of 256 over 4 nodes: 4 (1 - C(192, 8) / C(256, 8)) = 3.61.
    cluster = exchange_cluster("H200", 32)
    drawn = draw_exchange(cluster, 512, 8, 256, True, np.random.default_rng(1))
    expected = 4 * (1 - math.comb(192, 8) / math.comb(256, 8))
    assert drawn.node_tokens_RN.sum() / (32 * 512) == pytest.approx(expected, rel=0.005)
    assert drawn.pairs_RR.sum() == 32 * 512 * 8
    ids_TK = draw_topk(1000, 8, 20, 1, np.random.default_rng(2))
    assert (np.diff(np.sort(ids_TK, axis=1), axis=1) > 0).all()


def test_above_four_nodes_a_token_goes_to_four() -> None:
    ids_TK = draw_topk(2000, 8, 256, 8, np.random.default_rng(0))
    nodes = [len(set(row)) for row in (ids_TK // 32).tolist()]
    assert max(nodes) == 4
    assert min(len(set(row)) for row in ids_TK.tolist()) == 8


def test_ten_picks_are_masked() -> None:
    # 1 token, top-8: 8 * (7 / 8)^10 = 2.105 picks stay in the mean. The published bandwidth of that row: 0.7375 GB/s *
    # 16.28 us = 12006 bytes, 1.6 vectors of 7408; of 128 tokens 1014.5 of 1024.
    drawn = masked(even_exchange(8, 1), 1, 8)
    assert drawn.pairs_RR.sum() / 8 == pytest.approx(8 * (7 / 8) ** 10)
    assert masked(even_exchange(8, 128), 128, 8).pairs_RR.sum() / 8 == pytest.approx(1014, abs=0.2)


def test_what_is_even_keeps_its_sum_and_its_zeros() -> None:
    cluster = exchange_cluster("H200", 16)
    drawn = draw_exchange(cluster, 16, 8, 256, True, np.random.default_rng(0))
    even = drawn.even(cluster.node_of_device_R)
    assert even.pairs_RR.sum() == pytest.approx(drawn.pairs_RR.sum())
    assert len(np.unique(even.pairs_RR.round(9))) == 3
    assert len(np.unique(even.node_tokens_RN.round(9))) == 2


def one(time_us: float, **changes: Any) -> Measured:
    values = {"table": "t", "kind": "dispatch", "device": "H200", "num_ranks": 8, "time_s": time_us / 1e6}
    return Measured(**(values | changes))


def test_a_fit_finds_the_constants_that_made_the_rows() -> None:
    # 5 us + 1 us of route + busy / 0.5: 8 and 26 us for 1 and 10 us of NVLink.
    loads = [Load(nvlink_s=busy_s, network_s=0.0, latency_s=1e-6) for busy_s in (1e-6, 10e-6)]
    fitted = fit_constants([one(8), one(26)], loads)
    assert (fitted.latency_s, fitted.nvlink_share, fitted.network_share) == pytest.approx((5e-6, 0.5, 1.0))
    alone = fit_constants([one(26)], loads[1:], latency_s=5e-6)
    assert alone.nvlink_share == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("row", "load", "limit"),
    [
        (one(8), Load(nvlink_s=1e-6, network_s=1e-6, latency_s=0), "nvlink"),
        (one(8), Load(nvlink_s=1e-6, network_s=0, latency_s=0), "network"),
        (one(8, num_sms=24), Load(nvlink_s=1e-6, network_s=0, latency_s=0), "nvlink"),
    ],
)
def test_rows_that_say_nothing_of_a_share_cannot_be_fitted(row: Measured, load: Load, limit: Any) -> None:
    with pytest.raises(ValueError, match="a share is fitted to rows that"):
        fit_constants([row], [load], limit)


def test_held_out_times_do_not_enter_the_fits(monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]) -> None:
    """With every held-out time doubled, constants and predictions stay as they are."""

    def doubled(rows: list[Measured]) -> list[Measured]:
        used = [study for study in STUDIES if study.latency_of is None]
        return [
            row
            if any(study.has(row) and study.is_fitted(row) for study in used)
            else replace(row, time_s=2 * row.time_s)
            for row in rows
        ]

    deepep = [row for row in load_deepep() if row.table == "low-latency" and row.num_tokens <= 32]
    monkeypatch.setattr(exchange_study, "load_deepep_v1", list)
    monkeypatch.setattr(exchange_study, "STUDIES", (*exchange_study.DEEPEP_STUDIES[:2], *exchange_study.NCCL_STUDIES))
    found = []
    for deepep_rows, nccl_rows in ((deepep, load_nccl()), (doubled(deepep), doubled(load_nccl()))):
        monkeypatch.setattr(exchange_study, "load_deepep", lambda rows=deepep_rows: rows)
        monkeypatch.setattr(exchange_study, "load_nccl", lambda rows=nccl_rows: rows)
        cells, constants = exchange_study.run_studies()
        found.append((constants, [cell.predicted_s for cell in cells]))
        assert sum(not cell.fitted for cell in cells) > 900
    assert found[0] == found[1]
    shown = {(s["key"], k["kind"]): k["latency_us"] for s in report["studies"] for k in s["kinds"]}
    assert shown["nccl-h100", "alltoall"] == pytest.approx(1e6 * found[0][0]["nccl-h100", "alltoall"].latency_s)


def test_fitted_rows_are_those_that_the_document_names(report: dict[str, Any]) -> None:
    fitted = [cell for cell in report["cells"] if cell["fitted"]]
    of = {key: [cell for cell in fitted if cell["study"] == key] for key in STUDY}
    assert {cell["gpus"] for key in ("low-latency", "normal", "v1-normal", "v1-low-latency") for cell in of[key]} == {8}
    assert {(cell["gpus"], cell["experts"]) for cell in of["low-latency-network"]} == {(16, 256)}
    shapes = {(cell["hidden"], cell["experts"], cell["topk"]) for cell in of["low-latency-0.5.12"]}
    assert shapes == {(2048, 128, 8)}
    assert {(cell["gpus"], cell["dtype"]) for key in ("nccl-h100", "nccl-a100") for cell in of[key]} == {(2, "half")}
    assert of["v1-low-latency-first"] == of["v1-normal-first"] == []
    # Dispatch and combine: 17, 13, 23, 11 and twice one row; 21 sizes of 4 collectives on 2 machines.
    assert len(fitted) == 2 * (17 + 13 + 23 + 11 + 1 + 1) + 2 * 4 * 21


def test_every_row_has_a_cell(report: dict[str, Any]) -> None:
    # 95, 78 of them again in the second study, 437, 176 and 18 shapes, dispatch and combine; 2 * 504 collectives.
    assert len(report["cells"]) == 2 * (95 + 78 + 437 + 176 + 18) + 1008
    assert len(load_deepep()) + len(load_deepep_v1()) + len(load_nccl()) == 2 * (95 + 437 + 176 + 18) + 1008


def test_errors_of_the_targets_follow_from_the_cells(report: dict[str, Any]) -> None:
    groups = (("low-latency",), ("low-latency-network",), ("normal",), ("nccl-h100", "nccl-a100"))
    for entry, studies in zip(report["targets"], groups, strict=True):
        off = [
            abs(cell["predicted_us"] / cell["published_us"] - 1)
            for cell in report["cells"]
            if cell["study"] in studies and not cell["fitted"]
        ]
        assert entry["num_rows"] == len(off)
        assert entry["figure_percent"] == pytest.approx(100 * sum(off) / len(off))
        assert entry["met"] == (entry["figure_percent"] <= entry["target_percent"])


def test_the_document_holds_what_the_command_finds(report: dict[str, Any]) -> None:
    assert targets_table(report["targets"]) in DOCUMENT
    assert constants_table(report["studies"]) in DOCUMENT
    assert all(groups_table(study) in DOCUMENT for study in report["studies"])
    assert cells_table(report["studies"][0], report["cells"]) in DOCUMENT
    assert f"still has a mean error of {report['nccl_fitted_to_all']['mean_percent']:.1f} %" in DOCUMENT
    for words in (HEADER, MODEL, TABLES, CHOICES):
        assert words.strip() in DOCUMENT
    # docs/simulator.md quotes 7, 15, 27 and 19 %.
    assert [round(entry["figure_percent"]) for entry in report["targets"]] == [15, 7, 27, 19]


def test_times_of_v1_s_bandwidths_by_hand() -> None:
    # EP32: 4096 tokens to 3.61 nodes, the own one too, 7392 bytes each, at 58 GB/s: 1885 us.
    row = next(r for r in load_deepep_v1() if (r.table, r.kind, r.num_ranks) == ("v1-normal", "dispatch", 32))
    assert published_s(STUDY["v1-normal"], row) == pytest.approx(4096 * 3.61 * 7392 / 58e9, rel=0.005)


def test_without_nvlink_all_goes_over_the_network() -> None:
    row = next(r for r in load_deepep_v1() if (r.table, r.kind, r.num_ranks) == ("v1-low-latency-first", "combine", 8))
    load = row_load(STUDY["v1-low-latency-first"], row)
    assert load.nvlink_s == 0
    # 7 of 8 picks leave; ten of 1024 are masked; the busiest GPU has up to 10 % more than the mean.
    mean_s = 1014 * 7 / 8 * 14336 / 50e9
    assert mean_s < load.network_s < 1.1 * mean_s


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dispatch_us", "fast", 'line 2, column dispatch_us: "fast" is no number'),
        ("dispatch_us", "-1", 'column dispatch_us: "-1" is no number'),
        ("dispatch_us", "0", "0.0 s is no time"),
        ("nodes", "nan", 'column nodes: "nan" is no number'),
        ("nodes", "0", "0 GPUs are no whole nodes"),
    ],
)
def test_bad_data_is_one_line(field: str, value: str, message: str) -> None:
    row = {
        "table": "low-latency", "device": "H200", "nodes": "1", "hidden": "7168", "topk": "8", "experts": "256",
        "tokens": "1", "sms": "", "dispatch_us": "1", "dispatch_notify_us": "", "combine_us": "1",
        "combine_notify_us": "",
    }  # fmt: skip
    row[field] = value
    with pytest.raises(InputError, match=re.escape(message)):
        read_deepep(",".join(row) + "\n" + ",".join(row.values()), "some.csv")


def test_an_unknown_collective_is_one_line() -> None:
    with pytest.raises(InputError, match="broadcast is not a known collective; write one of alltoall"):
        collective_load(Measured(table="nccl", kind="broadcast", device="H100", num_ranks=8, time_s=1, num_bytes=8))


def shared(name: str) -> list[dict[str, str]]:
    if not (MEASURED / name).exists():
        pytest.skip(f"{name}, which the packaged data was made from, is not beside the repository")
    with (MEASURED / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "table", "columns"),
    [
        ("deepep-lowlatency-hidden7168.csv", "low-latency", "{}_avg_t_us"),
        ("deepep-lowlatency-h200-one-node.csv", "low-latency-0.5.12", "{}_avg_t_us"),
        ("deepep-normal-hidden7168.csv", "normal", "{}_transmit_us"),
    ],
)
def test_the_packaged_exchanges_are_the_published_ones(name: str, table: str, columns: str) -> None:
    published = shared(name)
    for kind in ("dispatch", "combine"):
        own = [row for row in load_deepep() if (row.table, row.kind) == (table, kind)]
        assert [(r.num_nodes, r.hidden, r.topk, r.experts, r.num_tokens) for r in own] == [
            tuple(int(r[c]) for c in ("node_num", "hidden_size", "num_topk", "num_experts", "num_token"))
            for r in published
        ]
        assert [r.time_s for r in own] == pytest.approx([float(r[columns.format(kind)]) / 1e6 for r in published])
        notify = [float(r.get(f"{kind}_notify_us", 0)) / 1e6 for r in published]
        assert [r.notify_s for r in own] == pytest.approx(notify)
        assert [r.num_sms for r in own] == [int(r.get(f"{kind}_sms", 0)) for r in published]


@pytest.mark.parametrize("device", ["H100", "A100"])
def test_the_packaged_collectives_are_the_published_ones(device: str) -> None:
    published = {
        (r["op_name"], int(r["num_gpus"]), r["nccl_dtype"], int(r["message_size"]) * (1 + (r["nccl_dtype"] == "half"))):
        float(r["latency"]) / 1e3
        for r in shared(f"nccl-{device.lower()}.csv")
    }  # fmt: skip
    own = {(r.kind, r.num_ranks, r.dtype, r.num_bytes): r.time_s for r in load_nccl() if r.device == device}
    assert own == pytest.approx(published)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["epsim", "validate", "exchange", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_prints_and_writes(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epsim.validate.exchange_report.exchange_report", lambda: report)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "missed by" in printed
    assert "every row" not in printed
    assert run(monkeypatch, "--cells") == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ (dispatch|combine|all\w+|reduce_scatter) .*µs", printed, re.M)) >= len(report["cells"])
    assert run(monkeypatch, "--json", "--docs", "page.md") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(to_json(report))
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text == exchange_document.exchange_document(report) == DOCUMENT
    content = (tmp_path / "images" / "exchange.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000
    assert (ROOT / "docs" / "images" / "exchange.png").stat().st_size < 150_000


def test_nothing_is_computed_for_a_page_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epsim.validate.exchange_report.exchange_report", lambda: pytest.fail("computed"))
    assert run(monkeypatch, "--docs", str(tmp_path / "none" / "page.md")) == 2
    assert "there is no folder" in capsys.readouterr().err

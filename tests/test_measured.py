"""Network profiles, dilation, grids and folders of measured runs, and predictions held to runs, without torch."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsim.cluster import build_cluster
from epsim.compare import parse_axes
from epsim.errors import InputError, ScenarioError
from epsim.measured.dilation import dilated, without_messages
from epsim.measured.dry_run import MODES, dry_spec, simulated_step_s
from epsim.measured.folder import CellRuns, MeasuredRuns
from epsim.measured.grid import cells_of, network_key
from epsim.measured.network_profile import SIZES, NetworkProfile, with_overrides
from epsim.run import simulate
from epsim.scenario import ScenarioSpec, load_raw, load_scenario
from epsim.validate.measured import Measured, measured_figures, measured_report
from epsim.validate.measured_document import document
from epsim.validate.shipped import shipped_folders

ROOT = Path(__file__).parent.parent
TWO_RANKS, TWO_NODES = ROOT / "scenarios/testbed/two-ranks.yaml", ROOT / "scenarios/testbed/two-nodes.yaml"
TRACE = "trace={kind: uniform, vision_tokens: 64, text_tokens: 16, output_tokens: 4}"
SEND_S, LATENCY_S, RECEIVE_S, BARRIER_S = 100e-6, 40e-6, 30e-6, 250e-6


def spec_of(path: Path = TWO_RANKS, *changes: str) -> ScenarioSpec:
    return load_scenario(path, [TRACE, *changes])


def one_way_s(num_bytes: int, rate: float, burst: float, latency_s: float) -> float:
    """What a link of 4.5 % framing and a header of 120 bytes takes."""
    return SEND_S + latency_s + max(0.0, (1.045 * num_bytes + 120 - burst) / rate)


def raw_profile(pairs: dict[tuple[int, int], tuple[float, float, float]]) -> dict[str, Any]:
    """pairs: rate, burst and latency by pair of ranks."""

    def summary(seconds: float) -> dict[str, float]:
        return {"s": seconds, "p25_s": seconds, "p75_s": seconds}

    def cell(size: int, link: tuple[float, float, float]) -> dict[str, Any]:
        one_way = one_way_s(size, *link)
        alone = SEND_S + link[2]
        return {
            "bytes": size,
            "one_way": summary(one_way),
            "both_ways": summary(alone + 1.02 * (one_way - alone)),
            "send": summary(SEND_S + size / 4e9),
            "receive": summary(RECEIVE_S),
        }

    return {
        "pause": "wait",
        "way": "sleep",
        "pairs": [
            {"pair": list(pair), "goodput_bytes_per_s": link[0] / 1.045, "cells": [cell(size, link) for size in SIZES]}
            for pair, link in pairs.items()
        ],
        "barrier": summary(BARRIER_S),
        "interference_s_per_byte": None,
    }


def profile_of(
    spec: ScenarioSpec, pairs: dict[tuple[int, int], tuple[float, float, float]], shapes: Any
) -> NetworkProfile:
    """Return a profile whose dry runs took what the simulator says with RECEIVE_S per received message."""
    raw, cluster = raw_profile(pairs), build_cluster(spec.cluster.model_dump())
    profile = NetworkProfile(raw=raw, shapes=shapes)
    dry = {mode: dry_spec(without_messages(spec), mode) for mode in MODES}
    raw["dry_step_s"] = {
        mode: simulated_step_s(with_overrides(own, profile.terms(own, cluster, RECEIVE_S))) for mode, own in dry.items()
    }
    return profile


def test_a_profile_finds_the_terms_that_made_it() -> None:
    spec = spec_of(TWO_RANKS, "cluster.links[cable].bandwidth=100 Mbit/s", "workload.batch_sizes=[2]")
    profile = profile_of(spec, {(0, 1): (12.5e6, 10240, LATENCY_S)}, [{"bandwidth": 12.5e6, "burst": 10240}])
    cluster = build_cluster(spec.cluster.model_dump())
    (fit,) = profile.fits(cluster)
    # Posting takes 100 us and 1 s per 4 GB more: of messages up to 4 KiB the median is that of 600 B, 100.15 us.
    assert profile.send_overhead_s == pytest.approx(SEND_S + 600 / 4e9)
    assert fit.latency_s == pytest.approx(LATENCY_S - 600 / 4e9)
    assert fit.frame_overhead == pytest.approx(0.045, rel=1e-6)
    assert fit.message_header_bytes == pytest.approx(120, rel=1e-3)
    assert fit.ack_overhead == pytest.approx(0.02)
    assert fit.mean_error < 1e-9
    found = profile.overrides(spec, cluster)
    for mode in MODES:
        own = spec_of(TWO_RANKS, "cluster.links[cable].bandwidth=100 Mbit/s", f"transmission.mode={mode}")
        assert profile.receive_overhead_s(own, cluster) == pytest.approx(RECEIVE_S, rel=1e-3)
    assert found["cluster.links[0].burst"] == "10240 B"
    assert found["cluster.links[0].frame_overhead"] == 0.045
    assert found["transmission.connections"] == "pair"
    assert found["transmission.barriers"] == "own"
    assert found["cluster.device_types.small.step_overhead"] == "250.000 us"
    simulated = with_overrides(spec, found)
    assert simulated.cluster.links[0].burst == 10240
    usual, measured = (simulate(s).results["batch_sizes"][0]["tpot_s"]["mean"] for s in (spec, simulated))
    # Small messages in each of 4 layers: 2 sends of 100 us, 2 latencies of 40, 2 receives of 30; a barrier of 250 us:
    # 1.6 ms, less what hides behind the other rank's experts.
    assert 0.8e-3 < measured - usual < 1.6e-3


def test_latencies_of_two_nodes_are_shared_out_over_their_links() -> None:
    """Near pairs cross two ports, far ones the uplink too: 60 us are 30 a port, 100 leave 40 for the uplink."""
    spec = spec_of(TWO_NODES)
    port, uplink = 2e9 / 8, 500e6 / 8
    profile = profile_of(
        spec,
        {(0, 1): (port, 40960, 60e-6), (0, 4): (uplink, 20480, 100e-6)},
        [{"bandwidth": port, "burst": 40960}, {"bandwidth": uplink, "burst": 20480}],
    )
    found = profile.overrides(spec, build_cluster(spec.cluster.model_dump()))
    latencies = [float(str(found[f"cluster.links[{i}].latency"]).split()[0]) for i in range(2)]
    assert latencies == pytest.approx([30, 40], abs=0.2)
    assert found["cluster.links[1].burst"] == "20480 B"


def test_an_unshaped_network_has_the_bandwidth_that_was_found() -> None:
    spec = spec_of()
    profile = profile_of(spec, {(0, 1): (1.045e9, 0, LATENCY_S)}, None)
    found = profile.overrides(spec, build_cluster(spec.cluster.model_dump()))
    assert float(str(found["cluster.links[0].bandwidth"]).split()[0]) == pytest.approx(1e9, rel=0.01)
    assert "cluster.links[0].burst" not in found


def test_in_slow_motion_everything_takes_as_many_times_longer() -> None:
    spec = spec_of()
    usual, slow = (simulate(s).results["batch_sizes"][0] for s in (spec, dilated(spec, 10)))
    for metric in ("ttft_s", "tpot_s"):
        assert slow[metric]["mean"] == pytest.approx(10 * usual[metric]["mean"], rel=1e-9)
    with pytest.raises(ScenarioError, match=r"--dilation: 0.5 is not from 1 to 1000"):
        dilated(spec, 0.5)


def test_cells_of_a_grid() -> None:
    raw = load_raw(TWO_RANKS, [TRACE, "workload.batch_sizes=[1,4]"])
    axes = parse_axes(["transmission.mode=sync,async", "cluster.links[cable].bandwidth=100 Mbit/s,1 Gbit/s"])
    cells = cells_of(raw, axes, 2)
    assert len(cells) == 8
    assert cells[0].label == "mode sync, bandwidth 100 Mbit/s, batch_size 1"
    assert cells[0].spec.workload.batch_sizes == [1]
    assert cells[0].spec.cluster.links[0].bandwidth == 100e6 / 8 / 2
    assert len({network_key(cell.spec) for cell in cells}) == 2


def test_figures_are_medians_of_runs_and_means_of_launches() -> None:
    """Two requests, the second with one token more. Steps of 10, 2 and 4 s, 1 s for KV caches after the first:

    tokens at 10, 13 (both) and 17 (request 1): TTFT 10; TPOT (13 - 10) / 1 = 3 and (17 - 10) / 2 = 3.5, mean 3.25.
    """
    requests = [np.array([0, 1]), np.array([0, 1]), np.array([1])]
    steps = [10.0, 2.0, 4.0]
    first = np.array([steps, [30.0, 2.0, 4.0], steps])  # one run of three is slow: the median does not see it
    second = np.array([[12.0, 2.0, 4.0]] * 3)
    runs = CellRuns(step_s=[first, second], kv_s=[np.ones(3)] * 2, num_repeated=0)
    found = measured_figures(requests, runs)
    assert found["ttft_s"] is not None
    assert found["ttft_s"].mean == 11.0
    assert found["ttft_s"].launches.tolist() == [10.0, 12.0]
    assert found["tpot_s"] is not None
    assert found["tpot_s"].mean == 3.25


def test_noise_is_how_far_launches_are_from_the_others() -> None:
    """10 beside 12: 10 / 12 - 1 = -16.7 %, 12 / 10 - 1 = 20 %, mean 18.3 %; of their mean sqrt(1) / 2 of it."""
    found = Measured(mean=11.0, launches=np.array([10.0, 12.0]))
    assert found.noise_percent == pytest.approx(18.333, abs=1e-3)
    assert found.floor_percent == pytest.approx(9.167, abs=1e-3)
    assert Measured(mean=11.0, launches=np.array([11.0])).noise_percent is None


def folder_of_runs(folder: Path, factor: float) -> Path:
    """Write runs whose every step takes `factor` times what is predicted."""
    raw = load_raw(TWO_RANKS, [TRACE, "workload.batch_sizes=[1,2]"])
    axes = parse_axes(["transmission.mode=sync,async"])
    options = {"emulated": True, "dilation": 1, "shaped": True, "num_launches": 2, "num_runs": 2}
    runs = MeasuredRuns(scenario=raw, axes=axes, options=options, machine={"date": "2026-11-01"})
    first = runs.cells[0].spec
    profile = profile_of(first, {(0, 1): (125e6, 40960, LATENCY_S)}, [{"bandwidth": 125e6, "burst": 40960}])
    runs.networks = [{"key": network_key(first), **profile.as_dict()}]
    cells = {}
    for number, cell in enumerate(runs.cells):
        overrides = profile.overrides(cell.spec, build_cluster(cell.spec.cluster.model_dump()))
        steps = simulate(with_overrides(cell.spec, overrides)).steps[cell.spec.workload.batch_sizes[0]]
        measured = [factor * step.duration_s for step in steps]
        parts = {"parts": ["experts", "remote", "shared"], "prefill_parts_s_RP": [[1.0, 0.0, 0.5]] * 2}
        cells[str(number)] = {
            "step_s": [measured] * 2, "kv_s": [0.0] * 2, "num_repeated": 1, **parts, "decode_parts_s_RP": None,
        }  # fmt: skip
    runs.launches = [{"machine": {}, "cells": cells}] * 2
    folder.mkdir()
    runs.write(folder)
    return folder


def test_a_report_of_runs_that_are_as_predicted_and_of_slower_ones(tmp_path: Path) -> None:
    exact, slow = (measured_report(folder_of_runs(tmp_path / f"{f}", f)) for f in (1.0, 1.25))
    for metric in ("ttft_s", "tpot_s"):
        assert exact["errors"][metric]["max_percent"] < 1e-9
        assert slow["errors"][metric]["bias_percent"] == pytest.approx(-20)  # 1 / 1.25 - 1
        assert slow["errors"][metric]["noise_percent"] == 0
        gains = slow["gain_errors"][metric]
        assert [row["axis"] for row in gains] == ["transmission.mode", None]
        assert gains[0]["num_gains"] == 2  # batches 1 and 2
        assert gains[0]["max_error_points"] < 1e-9  # all are slower alike
        assert gains[0]["num_clear"] == gains[0]["num_right_sign"] > 0
    assert sum(cell["num_repeated"] for cell in slow["cells"]) == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; name a folder that epsim measure run wrote"),
        ("no JSON", "not JSON; name a folder that epsim measure run wrote"),
        (json.dumps({"format": 2}), "not measured runs in format 1"),
        (json.dumps({"format": 1, "axes": {}}), "not measured runs in format 1"),
    ],
)
def test_folders_that_hold_something_else(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "measured.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        MeasuredRuns.read(tmp_path)


CELL = "launches", 0, "cells", "0"
RAW = "networks", 0, "raw"
GONE = object()


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((*CELL,), GONE, r"launches\[0\]\.cells: are 1, 2, 3, and the grid's are 0, 1, 2, 3; measure it again"),
        (("launches", 0, "cells", "9"), {}, r"launches\[0\]\.cells\.9\.step_s: is missing"),
        (("axes", "transmission.mode"), ["sync"], r"launches\[0\]\.cells: are 0, 1, 2, 3, and the grid's are 0, 1;"),
        (("axes",), [], r"axes: \[\] is not a mapping"),
        (("scenario",), None, r"scenario: null is not a mapping"),
        (("options", "num_runs"), 7, r"cells\.0: has 2 runs in step_s and 2 in kv_s, and options.num_runs is 7"),
        (("options", "dilation"), 0, r"options\.dilation: 0 is below 1"),
        ((*CELL, "step_s", 0, 0), -1.0, r"launches\[0\]\.cells\.0\.step_s\[0\]\[0\]: -1\.0 is not above 0"),
        ((*CELL, "step_s", 0, 0), float("nan"), r"step_s\[0\]\[0\]: NaN is not a finite number"),
        ((*CELL, "step_s", 0), [0.1], r"launches\[0\]\.cells\.0\.step_s: runs have \[1, 4\] steps"),
        ((*CELL, "kv_s"), GONE, r"kv_s: is missing"),
        ((*CELL, "parts"), ["x"], r"prefill_parts_s_RP\[0\]: has \d+ times for 1 parts"),
        ((*RAW, "pairs", 0, "pair"), [0, 9], r"networks\[0\]\.raw\.pairs: \[0, 9\] is no pair of 2 ranks"),
        ((*RAW, "pairs", 0, "cells"), [], r"cells: \[\] is empty"),
        ((*RAW, "dry_step_s", "async"), GONE, r"dry_step_s\.async: is missing"),
        ((*RAW, "barrier"), None, r"raw\.barrier: null is not a mapping"),
        (("networks", 0, "shapes"), [], r"networks\[0\]\.shapes: has 0, cluster\.links 1"),
        (("launches",), [], r"holds no complete launch; go on with epsim measure run \.\.\. --resume"),
    ],
)  # fmt: skip
def test_damaged_folders_are_one_line(keys: tuple[Any, ...], value: Any, message: str, tmp_path: Path) -> None:
    folder = folder_of_runs(tmp_path / "runs", 1.0)
    content = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    *way, last = keys
    place = content
    for key in way:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    (folder / "measured.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{re.escape(str(folder / 'measured.json'))}: .*{message}"):
        measured_report(folder)


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = folder_of_runs(tmp_path / "runs", 1.0)
    again = MeasuredRuns.read(folder)
    before = (folder / "measured.json").read_bytes()
    again.write(folder)
    assert (folder / "measured.json").read_bytes() == before


def test_the_page_about_shipped_runs_is_what_the_command_writes() -> None:
    """Every folder that ships is read, predicted, and printed as docs/measured-runs.md has it."""
    reports = [measured_report(folder) for folder in shipped_folders()]
    assert document(reports) == (ROOT / "docs/measured-runs.md").read_text(encoding="utf-8")
    emulated = [report for report in reports if report["options"]["emulated"]]
    assert len(emulated) == 3
    for report in emulated:
        gains = report["gain_errors"]["ttft_s"][-1]
        assert gains["num_right_sign"] >= 0.97 * gains["num_clear"] > 0

"""Which cells of a device are measured and in which passes; the passes; the command from scenario to simulation."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_decoder import DENSE_AND_SHARED, VISION, make_card  # noqa: E402

from epsim import cli  # noqa: E402
from epsim.cost.interpolation import Interpolation  # noqa: E402
from epsim.cost.profile import AXES, OpTable, read_profile  # noqa: E402
from epsim.errors import InputError  # noqa: E402
from epsim.measure.device import measure_device, prepare, wire_of  # noqa: E402
from epsim.measure.device_pass import Bench  # noqa: E402
from epsim.measure.device_plan import Cell, Setting, doubling, grids, plan_cells  # noqa: E402
from epsim.measure.ranges import Ranges, ranges_of  # noqa: E402
from epsim.measure.wire import Wire  # noqa: E402
from epsim.run import simulate  # noqa: E402
from epsim.scenario import load_scenario  # noqa: E402

DEVICE = os.environ.get("EPSIM_TEST_DEVICE", "cpu")
RANGES = Ranges(
    requests=3, prompt=(4, 9), context=(5, 12), tokens=27, experts=5, pairs=100, vectors=90, images=2
)  # fmt: skip
BF16 = Wire(dispatch_dtype="bf16", combine_dtype="bf16", pairs_per_vector=2)
SCENARIO = """\
name: tiny
model:
  name: tiny
  hidden_size: 32
  num_layers: 3
  vocab_size: 50
  attention: {kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}
  dense_ffn_size: 24
  moe: {num_experts: 6, topk: 2, expert_ffn_size: 16, num_dense_layers: 1, num_shared_experts: 1}
  vision: {name: v, image_size: 6, patch_size: 3, hidden_size: 64, ffn_size: 24, num_layers: 1}
cluster:
  name: two
  device_types:
    a: {memory: 1 GB, memory_bandwidth: 10 GB/s, flops: {bf16: 1 TFLOP/s}, profile: p.json}
  devices: [{name: "d{i}", node: "n{i}", type: a, each: {i: 2}}]
  links: [{from: d0, to: d1, bandwidth: 1 Gbit/s}]
trace: {kind: uniform, vision_tokens: 4, text_tokens: 5, output_tokens: 4}
workload: {batch_sizes: [1, 5], num_batches: 2}
"""


def all_grids(**changes: Any) -> dict[str, list[tuple[int, ...]]]:
    """Return the grids of a model that has every part, on a device with memory of its own."""
    card = make_card(vision=VISION, **DENSE_AND_SHARED)
    fields: dict[str, Any] = {"on_host": False, "hidden_bytes": 128}
    return grids(card, RANGES, **{**fields, **changes})


def test_grids_by_hand() -> None:
    assert doubling(1, 1) == [1]
    assert doubling(4, 9) == [4, 9]  # 8 is too near to 9
    assert doubling(91, 113) == [91, 113]
    assert doubling(1, 20) == [1, 2, 4, 8, 20]
    assert doubling(1, 3000, coarse=True) == [1, 2, 4, 8, 16, 32, 64, 256, 1024, 3000]
    found = all_grids()
    assert found["prefill_attention"] == [(q, n) for q in (1, 2, 3) for n in (4, 9)]
    assert found["decode_attention"] == [(q, n) for q in (1, 2, 3) for n in (5, 12)]
    assert found["head"] == [(1,), (2,), (3,)]
    assert found["vision"] == [(1,), (2,)]
    assert found["to_host"] == [(128 * n,) for (n,) in found["pack"]]
    # Top 3: 100 pairs are 34 tokens, so at most 34 pairs with one expert; with 5, as many as 100 pairs on 2 are: 50.
    assert [cell for cell in found["experts"] if cell[0] == 1][-1] == (1, 34)
    assert [cell for cell in found["experts"] if cell[0] == 5] == [(5, n) for n in (1, 2, 4, 8, 16, 34)]
    assert found["serve"] == found["pack"] == found["reduce"]
    assert set(found) == set(AXES)
    assert set(all_grids(on_host=True)) == set(AXES) - {"to_host", "to_device"}


@pytest.mark.parametrize("experts", [1, 2, 5, 8, 13])
def test_every_possible_kernel_of_experts_is_between_cells(experts: int) -> None:
    ranges = Ranges(**{**vars(RANGES), "experts": experts, "pairs": 40 * min(3, experts)})
    cells = sorted(grids(make_card(), ranges, on_host=True, hidden_bytes=4)["experts"])
    ones = np.ones(len(cells))
    table = OpTable(
        axes=AXES["experts"], at_CA=np.array(cells, float), median_s_C=ones, p25_s_C=ones, p75_s_C=ones, min_s_C=ones,
        max_s_C=ones, repeats_C=ones.astype(np.int64),
    )  # fmt: skip
    pairs, activated = (grid.ravel() for grid in np.meshgrid(np.arange(1, ranges.pairs + 1), np.arange(1, experts + 1)))
    possible = (pairs >= activated) & (pairs <= 40 * activated)  # of 40 tokens
    assert (Interpolation("experts", table, "p")(activated[possible], pairs[possible] / activated[possible]) == 1).all()


def settings() -> list[Setting]:
    return plan_cells(all_grids(), topk=3, hidden_bytes=128, tokens_per_image=4)


def test_every_cell_has_one_seat_in_a_pass_of_about_its_size() -> None:
    seats = Counter(cell for setting in settings() for cell in setting.cells)
    assert seats == Counter(Cell(op=op, at=at) for op, cells in all_grids().items() for at in cells)
    seat = {cell: setting for setting in settings() for cell in setting.cells}
    assert seat[Cell(op="experts", at=(1, 1))].attention.at[0] == 1
    assert seat[Cell(op="head", at=(2,))].num_tokens == 2
    assert seat[Cell(op="experts", at=(5, 16))].num_tokens == 27  # 80 pairs of top 3
    assert not seat[Cell(op="vision", at=(1,))].decode


def test_passes_give_every_cell_its_samples() -> None:
    """4 cells, 3 layers, 10 samples: 40 layers in 14 passes; with one dense layer and 2 cells 20 passes."""
    cells = tuple(Cell(op="router", at=(n,)) for n in range(1, 5))
    attention = Cell(op="decode_attention", at=(1, 5))
    setting = Setting(attention=attention, others={"router": cells})
    assert setting.num_passes(10, 3) == 14
    dense = tuple(Cell(op="dense_ffn", at=(n,)) for n in (1, 2))
    assert Setting(attention=attention, others={"router": cells, "dense_ffn": dense}).num_passes(10, 3) == 20
    assert Setting(attention=attention, others={}).num_passes(10, 3) == 4


@pytest.mark.parametrize(
    ("attention", "wire"),
    [("gqa", BF16), ("mla", Wire(dispatch_dtype="fp8", combine_dtype="fp32", pairs_per_vector=1))],
)
def test_a_pass_times_the_parts_in_their_order(attention: str, wire: Wire) -> None:
    card = make_card(attention, vision=VISION, **DENSE_AND_SHARED)
    bench = Bench(card, RANGES, device=torch.device(DEVICE), dtype=torch.float32, wire=wire)
    parts = {
        "vision": (2,), "dense_ffn": (7,), "router": (30,), "pack": (40,), "shared_experts": (2,),
        "experts": (5, 20), "serve": (50,), "reduce": (40,), "head": (3,),
    }  # fmt: skip
    for op, at in (("prefill_attention", (3, 9)), ("decode_attention", (2, 12))):
        cell = Cell(op=op, at=at)
        setting = Setting(attention=cell, others={op: (Cell(op=op, at=at),) for op, at in parts.items()})
        laps = bench.run(setting, 0)
        layer = [op, "router", "pack", "shared_experts", "experts", "serve", "reduce"]
        order = ["vision", *[op, "dense_ffn"] * 2, *layer * 2, "head"]
        assert [lap.op for lap, _ in laps] == order
        assert all(seconds > 0 for _, seconds in laps)


def test_cells_of_a_part_take_turns() -> None:
    bench = Bench(make_card(), RANGES, device=torch.device(DEVICE), dtype=torch.float32, wire=BF16)
    cells = tuple(Cell(op="router", at=(n,)) for n in (1, 2, 3))
    setting = Setting(attention=Cell(op="decode_attention", at=(1, 5)), others={"router": cells})
    measured = Counter(cell for number in range(6) for cell, _ in bench.run(setting, number) if cell.op == "router")
    assert measured == dict.fromkeys(cells, 4)  # 6 passes of 2 layers


@pytest.mark.parametrize("activated", [1, 2, 5])
@pytest.mark.parametrize("per_expert", [1, 3, 34])
def test_pairs_are_spread_evenly(activated: int, per_expert: int) -> None:
    bench = Bench(make_card(), RANGES, device=torch.device("cpu"), dtype=torch.float32, wire=BF16)
    num_vectors, vector_N, slot_N, weight_N = bench._make_pairs(Cell(op="experts", at=(activated, per_expert)))
    assert sorted(Counter(slot_N.tolist()).values()) == [per_expert] * activated
    assert len(set(zip(vector_N.tolist(), slot_N.tolist(), strict=True))) == activated * per_expert == len(weight_N)
    assert set(vector_N.tolist()) == set(range(num_vectors))


def write(tmp_path: Path, text: str = SCENARIO) -> Path:
    (tmp_path / "s.yaml").write_text(text)
    return tmp_path / "s.yaml"


def test_ranges_follow_from_the_scenario(tmp_path: Path) -> None:
    """5 requests of 9 + 3 tokens: 3 on a home; 45 tokens in all, top 2; the profile need not be there yet."""
    ranges = ranges_of(load_scenario(write(tmp_path)))
    assert ranges == Ranges(
        requests=3, prompt=(9, 9), context=(10, 12), tokens=27, experts=3, pairs=90, vectors=90, images=3
    )
    wider = ranges.widened(requests=8, prompt=None, context=100, pairs=1000)
    assert (wider.requests, wider.prompt, wider.context, wider.pairs) == (8, (9, 9), (10, 100), 1000)
    assert ranges.widened(prompt=6, context=11).prompt == (6, 6)
    spec = load_scenario(write(tmp_path), ["homes.policy=by_modality", "workload.max_output_tokens=2"])
    ranges = ranges_of(spec)
    assert (ranges.requests, ranges.tokens, ranges.context) == (5, 45, (10, 10))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model=olmo-1b"], "has no experts to measure"),
        (["parallelism.kind=tp"], "parallelism.kind: tp splits"),
    ],
)
def test_what_cannot_be_measured(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ranges_of(load_scenario(write(tmp_path), [*overrides, "trace.vision_tokens=0"]))


def test_ends_that_contradict_each_other() -> None:
    with pytest.raises(InputError, match="--max-tokens: 5 is less than a prompt of 9"):
        RANGES.widened(tokens=5)
    with pytest.raises(InputError, match="--max-pairs: 3 is less"):
        RANGES.widened(pairs=3)


def test_from_scenario_to_profile_to_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = write(tmp_path)
    run = ["epsim", "measure", "device", str(scenario), "-o", str(tmp_path / "p.json"), "--device", DEVICE]
    monkeypatch.setattr(sys, "argv", [*run, "--threads", "1", "--repeats", "2"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert (exit_info.value.code, printed.err) == (0, f"wrote {tmp_path / 'p.json'}\n")
    assert "Least steady: " in printed.out
    profile = read_profile(tmp_path / "p.json")
    assert (profile.model, profile.num_processes, profile.num_threads) == ("tiny", 1, 1)
    assert profile.wire == "bf16, bf16"
    assert set(profile.ops) == set(AXES) - ({"to_host", "to_device"} if DEVICE == "cpu" else set())
    for op in profile.ops.values():
        assert (op.repeats_C >= 2).all()
        assert (op.min_s_C > 0).all()
    slower = json.loads((tmp_path / "p.json").read_text())
    router = slower["ops"]["router"]
    router["cells"] = [[cell[0], *(s + 1.0 for s in cell[1:6]), cell[6]] for cell in router["cells"]]
    (tmp_path / "q.json").write_text(json.dumps(slower))
    for mode in ("sync", "async", "two_batch"):
        results = []
        for name in ("p.json", "q.json"):
            overrides = [f"transmission.mode={mode}", f"cluster.device_types.a.profile={tmp_path / name}"]
            results.append(simulate(load_scenario(scenario, overrides)).results["batch_sizes"][1])
        # A router second more in two MoE layers; of two micro-batches each.
        more_s = results[1]["ttft_s"]["mean"] - results[0]["ttft_s"]["mean"]
        assert more_s == pytest.approx(4.0 if mode == "two_batch" else 2.0, abs=0.05)
        assert results[0]["prefill"]["parts_s"]["copy"] > 0


@pytest.mark.parametrize(
    ("overrides", "pairs_per_vector"),
    [
        ([], 1),
        (["model.moe.topk=5"], 2),
        (["model.moe.topk=5", "transmission.dedup=none"], 1),
        (["model.moe.topk=1"], 1),
    ],
)
def test_a_vector_has_its_share_of_the_top_k(tmp_path: Path, overrides: list[str], pairs_per_vector: int) -> None:
    """Two devices: 5 // 2 = 2 pairs with dedup."""
    dtypes = ["transmission.dispatch_dtype=fp8", "transmission.combine_dtype=fp32"]
    wire = wire_of(load_scenario(write(tmp_path), [*overrides, *dtypes]))
    assert wire == Wire(dispatch_dtype="fp8", combine_dtype="fp32", pairs_per_vector=pairs_per_vector)


def test_processes_measure_together() -> None:
    ranges = Ranges(requests=1, prompt=(2, 2), context=(3, 3), tokens=2, experts=2, pairs=6, vectors=6, images=0)
    job = prepare(make_card(), ranges, wire=BF16, num_processes=2, num_threads=1, repeats=2)
    profile = measure_device(job)
    assert profile.num_processes == 2
    assert all((op.repeats_C >= 4).all() for op in profile.ops.values())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "tpu"], '--device: "tpu" is not known; write cpu or cuda'),
        (["--max-tokens", "3"], "--max-tokens: 3 is less than a prompt of 9"),
        (["--set", "model=olmo-1b", "--set", "trace.vision_tokens=0"], "has no experts to measure"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    output = tmp_path / "p.json"
    monkeypatch.setattr(
        sys, "argv", ["epsim", "measure", "device", str(write(tmp_path)), "-o", str(output), *arguments]
    )
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert says in capsys.readouterr().err
    assert not output.exists()


def test_without_torch_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("epsim.capture.extra.find_spec", lambda module: None)
    monkeypatch.setattr(sys, "argv", ["epsim", "measure", "device", str(write(tmp_path)), "-o", "p.json"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert "pip install 'epsim[trace]'" in capsys.readouterr().err

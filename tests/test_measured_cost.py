"""Costs from device profiles: the file, interpolation by hand, the methods of a cost, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.tiny import device_type, link, make_cluster, star, tiny_model
from test_cost import work

from epsim.cost import MeasuredCost
from epsim.cost.interpolation import Interpolation
from epsim.cost.measured import measured_cost
from epsim.cost.profile import AXES, DeviceProfile, OpTable, read_profile, shapes_of, write_profile
from epsim.errors import InputError
from epsim.model import LatentAttention
from epsim.scenario import load_scenario


def table(op: str, cells: dict[Any, float]) -> OpTable:
    """Return an operation with these medians by place; quartiles are 1 s around them."""
    at = [place if isinstance(place, tuple) else (place,) for place in cells]
    median_s_C = np.array(list(cells.values()))
    return OpTable(
        axes=AXES[op],
        at_CA=np.array(at, dtype=np.float64),
        median_s_C=median_s_C,
        p25_s_C=np.maximum(median_s_C - 1, 0),
        p75_s_C=median_s_C + 1,
        min_s_C=np.zeros(len(at)),
        max_s_C=median_s_C + 5,
        repeats_C=np.full(len(at), 7),
    )


def profile(scale: float = 1.0, **changes: Any) -> DeviceProfile:
    """Return a profile of the tiny model: powers of ten tell operations apart."""
    cells: dict[str, dict[Any, float]] = {
        "prefill_attention": {(q, n): 100.0 + q * n for q in (1, 4) for n in (2, 8)},
        "decode_attention": {(q, n): 200.0 + q * n for q in (1, 4) for n in (2, 8)},
        "router": {1: 1.0, 5: 3.0},
        "dense_ffn": {1: 10.0, 5: 30.0},
        "shared_experts": {1: 20.0, 5: 60.0},
        "experts": {(1, 1): 3.0, (1, 9): 19.0, (4, 1): 12.0, (4, 5): 44.0},
        "pack": {1: 1.0, 8: 2.75},
        "serve": {1: 1.5, 8: 5.0},
        "reduce": {1: 2.0, 8: 5.5},
        "head": {1: 7.0, 4: 10.0},
    }
    ops = {op: table(op, {at: scale * seconds for at, seconds in values.items()}) for op, values in cells.items()}
    fields: dict[str, Any] = {
        "model": "tiny",
        "shapes": shapes_of(tiny_model()),
        "dtype": "float32",
        "wire": "bf16, bf16",
        "device": "a device",
        "machine": "a machine",
        "versions": {"torch": "2.13"},
        "date": "2026-01-02",
        "num_processes": 2,
        "num_threads": 1,
        "ops": ops,
    }
    return DeviceProfile(**{**fields, **changes})


def cost() -> MeasuredCost:
    """Return the cost of two devices of which the second takes twice as long."""
    cluster = make_cluster([device_type(launch_overhead=1.0, layer_overhead=0.5)] * 2, [link("d0", "d1", 1.0)])
    return MeasuredCost(tiny_model(), cluster, {"t0": profile(), "t1": profile(2.0)}, wire="bf16, bf16")


# Interpolation by hand.


def test_one_axis_is_linear_between_cells() -> None:
    at = Interpolation("router", table("router", {2: 1.0, 4: 2.0, 8: 10.0}), "p")
    # 3: halfway; 5: a quarter of 8 s more; below 2 as at 2; nothing takes no time.
    assert at(np.array([3, 5, 8, 1, 0])).tolist() == [1.5, 4.0, 10.0, 1.0, 0.0]


def test_two_axes_are_bilinear() -> None:
    cells = {(1, 1): 1.0, (1, 3): 5.0, (4, 1): 4.0, (4, 3): 20.0}
    at = Interpolation("experts", table("experts", cells), "p")
    # (2, 2): 3 s in the first column, 12 s in the second, a third of the way: 6. (4, 1.5): 4 + 16 / 4 = 8.
    # (1, 0.5) as at (1, 1); (0.5, 2) as at (1, 2): 3; no expert: 0.
    activated, each = np.array([[2, 4, 1], [0.5, 0, 4]]), np.array([[2, 1.5, 0.5], [2, 3, 3]])
    assert at(activated, each).tolist() == [[pytest.approx(6.0), 8.0, 1.0], [3.0, 0.0, 20.0]]


def test_what_each_expert_and_pair_takes_is_exact() -> None:
    """2 + 3 x + 0.5 x y on a coarse grid that ends at 24 pairs on the last but one column."""
    places = [(1, 1), (1, 24), (3, 1), (3, 24), (8, 1), (8, 8)]
    at = Interpolation("experts", table("experts", {(x, y): 2 + 3 * x + 0.5 * x * y for x, y in places}), "p")
    x, y = np.array([1.0, 2.0, 3.0, 5.0, 8.0]), np.array([20.0, 12.0, 24.0, 4.8, 3.0])
    np.testing.assert_allclose(at(x, y), 2 + 3 * x + 0.5 * x * y)


@pytest.mark.parametrize(
    ("op", "cells", "at", "says"),
    [
        ("router", {1: 1.0, 4: 2.0}, (5,), "p: router at 5 tokens, measured from 1 to 4; .* --max-tokens"),
        ("experts", {(1, 1): 1.0, (2, 1): 2.0}, (3, 1), "experts at 3 activated, measured from 1 to 2; .* --max-exp"),
        (
            "experts",
            {(1, 1): 1.0, (1, 8): 2.0, (2, 1): 2.0, (2, 4): 3.0},
            (1.5, 5),
            "experts at 5 pairs per expert, measured from 1 to 4; .* --max-pairs",
        ),
        ("decode_attention", {(1, 2): 1.0}, (1, 3), "decode_attention at 3 context, .* --max-context"),
    ],
)
def test_beyond_what_was_measured_there_is_an_error(
    op: str, cells: dict[Any, float], at: tuple[float, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        Interpolation(op, table(op, cells), "p")(*(np.array([1, value]) for value in at))


# The methods of a cost; the second device takes twice as long.


def test_attention_goes_by_requests_and_their_mean_length() -> None:
    # 2 requests of 5 tokens: 100 + 2 * 5; in decode 3 requests over 18 cached tokens: 200 + 3 * 6.
    counts = work(tokens_R=[10, 10], requests_R=[2, 2])
    assert cost().attention_s_R(counts).tolist() == pytest.approx([110.0, 220.0])
    counts = work(decode=True, tokens_R=[3, 0], requests_R=[3, 0], kv_tokens_R=[18, 0])
    assert cost().attention_s_R(counts).tolist() == pytest.approx([218.0, 0.0])


def test_the_other_parts() -> None:
    counts = work(tokens_R=[3, 5], outputs_R=[2, 0])
    assert cost().router_s_R(counts).tolist() == [2.0, 6.0]
    assert cost().dense_ffn_s_R(counts).tolist() == [20.0, 60.0]
    assert cost().shared_experts_s_R(counts).tolist() == [40.0, 120.0]
    assert cost().head_s_R(counts).tolist() == [8.0, 0.0]
    # 2 experts with 3 pairs each: 3 s + 2 s a pair: 7 s with one, 12 + 8 a pair: 28 with four; a third of the way: 14.
    assert cost().experts_s(np.array([[6, 0], [1, 1]]), np.array([[2, 0], [1, 1]])).tolist() == [
        [pytest.approx(14.0), 0.0],
        [3.0, 6.0],
    ]
    assert cost().pack_s(np.array([[[4, 4]]])).tolist() == [[[1.75, 3.5]]]
    assert cost().serve_s(np.array([3, 3])).tolist() == [2.5, 5.0]
    assert cost().reduce_s(np.array([4, 0])).tolist() == [3.5, 0.0]
    assert cost().layer_floor_s_R.tolist() == [0.5, 0.5]


def test_a_part_that_was_not_measured() -> None:
    without = {name: op for name, op in profile().ops.items() if name != "shared_experts"}
    cluster = star(1, 1.0)
    measured = MeasuredCost(tiny_model(), cluster, {"t0": profile(ops=without)}, wire="bf16, bf16")
    counts = work(tokens_R=[3])
    with pytest.raises(InputError, match="has no shared_experts; measure this scenario"):
        measured.shared_experts_s_R(counts)
    assert measured.vision_s_R(work(images_R=[0])).tolist() == [0.0]
    with pytest.raises(InputError, match="has no vision"):
        measured.vision_s_R(work(images_R=[1]))
    moe = tiny_model().moe
    assert moe is not None
    alone = tiny_model(moe=replace(moe, num_shared_experts=0, shared_expert_ffn_size=None))
    profiles = {"t0": profile(ops=without, shapes=shapes_of(alone))}
    measured = MeasuredCost(alone, cluster, profiles, wire="bf16, bf16")
    assert measured.shared_experts_s_R(counts).tolist() == [0.0]


def test_another_number_of_layers_has_the_same_times_and_another_width_has_not(tmp_path: Path) -> None:
    cluster = star(2, 1.0)
    write_profile(tmp_path / "p.json", profile())
    paths: dict[str, str | None] = {"t0": str(tmp_path / "p.json"), "t1": str(tmp_path / "p.json")}
    measured_cost(tiny_model(num_layers=9, name="more"), cluster, paths, wire="bf16, bf16")
    with pytest.raises(InputError, match=r"t0\.profile: was measured with hidden_size 2, the model has 4; measure"):
        measured_cost(tiny_model(hidden_size=4), cluster, paths, wire="bf16, bf16")
    latent = LatentAttention(num_heads=2, kv_lora_rank=1, qk_nope_head_dim=1, qk_rope_head_dim=1, v_head_dim=1)
    with pytest.raises(InputError, match=r"with attention\.kv_lora_rank absent, the model has 1"):
        measured_cost(tiny_model(attention=latent), cluster, paths, wire="bf16, bf16")
    with pytest.raises(InputError, match=r"cluster\.device_types\.t1\.profile: is missing, t0 has one"):
        measured_cost(tiny_model(), cluster, {**paths, "t1": None}, wire="bf16, bf16")
    says = r"t0\.profile: was measured with vectors in bf16, bf16 \(dispatch, combine\), the scenario sends fp8, bf16"
    with pytest.raises(InputError, match=says):
        measured_cost(tiny_model(), cluster, paths, wire="fp8, bf16")


# The file.


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_profile(path, profile())
    back = read_profile(path)
    assert {**vars(back), "ops": 0} == {**vars(profile()), "ops": 0}
    for name, op in profile().ops.items():
        for field, value in vars(op).items():
            assert np.array_equal(getattr(back.ops[name], field), value), (name, field)
    assert back.ops["router"].spread_C.tolist() == [2.0, pytest.approx(2 / 3)]  # quartiles (0, 2) and (2, 4)
    write_profile(tmp_path / "q.json", back)
    assert (tmp_path / "q.json").read_bytes() == path.read_bytes()


def damaged(**changes: Any) -> Any:
    return lambda content: {**content, **changes}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: [], "is no device profile of format 1"),
        (damaged(epsim_device_profile=2), "is no device profile of format 1"),
        (damaged(ops={"router": {"columns": ["tokens"], "cells": []}}), "is damaged"),
        (damaged(ops={"rooter": {"columns": [], "cells": []}}), "is damaged"),
        (damaged(model=None, more=1), "is damaged"),
        (lambda content: {name: value for name, value in content.items() if name != "shapes"}, "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any, says: str) -> None:
    path = tmp_path / "p.json"
    write_profile(path, profile())
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=rf"p\.json: {says}"):
        read_profile(path)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_profile(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_profile(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"at_CA": np.array([[2.0], [1.0]])}, "do not ascend"),
        ({"at_CA": np.array([[1.0]])}, "shape"),
        ({"at_CA": np.array([[0.0], [1.0]])}, "not above 0"),
        ({"max_s_C": np.array([1.0, 1.0])}, "quartiles"),
        ({"median_s_C": np.array([1.0, np.nan])}, "not finite"),
    ],
)
def test_a_table_must_make_sense(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(table("router", {1: 1.0, 2: 2.0}), **changes)


# In scenarios.


def test_paths_of_profiles_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    device = "{memory: 8 GB, memory_bandwidth: 10 GB/s, flops: {bf16: 1 TFLOP/s}, profile: p.json}"
    cluster = "name: c\ndevice_types: {a: %s, b: b.yaml}\n"
    cluster += "devices: [{name: d0, node: n, type: a}, {name: d1, node: n, type: b}]\n"
    cluster += "links: [{from: d0, to: d1, bandwidth: 1 GB/s}]\n"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.yaml").write_text(cluster % device)
    (tmp_path / "c" / "b.yaml").write_text(
        device.replace("p.json", "q.json")[1:-1].replace(", ", "\n", 2).replace(", profile", "\nprofile")
    )
    (tmp_path / "s.yaml").write_text("name: s\nmodel: olmoe\ncluster: c/c.yaml\ntrace: {kind: uniform}\n")
    types = load_scenario(tmp_path / "s.yaml").cluster.device_types
    assert types["a"].profile == str(tmp_path / "c" / "p.json")
    types = load_scenario(tmp_path / "s.yaml", ["cluster.device_types.a.profile=x.json"]).cluster.device_types
    assert types["a"].profile == "x.json"
    own = "overrides: {cluster.device_types.b.profile: y.json}\n"
    (tmp_path / "s.yaml").write_text((tmp_path / "s.yaml").read_text() + own)
    assert load_scenario(tmp_path / "s.yaml").cluster.device_types["b"].profile == str(tmp_path / "y.json")

"""Placements in files of other systems: the forms of each by hand, round trips through all, and damaged files."""

import csv
import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.fitted import make_trace
from reference.foreign import Cli

from epsim.errors import FormatError, PlacementError
from epsim.formats.command import export_file, import_files
from epsim.formats.loads import LOADS
from epsim.formats.options import TAKEN, Options, parse_layer_ids
from epsim.formats.placements import PLACEMENTS
from epsim.formats.routings import ROUTINGS
from epsim.placement import PlacementProblem
from epsim.placement.file import PlacementFile, parse_placement_file, read_placement_file, write_placement_file
from epsim.placement.from_file import FromFile

ROOT = Path(__file__).parent.parent
PROPERTY = settings(max_examples=12, deadline=None, derandomize=True)
# Two MoE layers (3 and 4) of four experts on two devices with three slots each: expert 0 twice, then expert 3.
ROWS = [[0, 1, 0, 2, 3, 1], [3, 1, 3, 2, 0, 3]]
EVEN = [[0, 1, 2, 3], [2, 3, 0, 1]]


def placement(rows: list[list[int]] = ROWS, **changes: Any) -> PlacementFile:
    fields: dict[str, Any] = {
        "layer_ids": (3, 4),
        "num_experts": 4,
        "num_devices": 2,
        "physical_to_logical_LP": np.array(rows, dtype=np.int32),
        "policy": "by hand",
        "description": "ä test",
    }
    return PlacementFile(**{**fields, **changes})


@pytest.fixture
def epsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    write_placement_file(tmp_path / "p.json", placement())
    write_placement_file(tmp_path / "even.json", placement(EVEN))
    return Cli(tmp_path, monkeypatch, capsys)


# epsim's own file.


def test_own_file_is_what_was_written(tmp_path: Path) -> None:
    write_placement_file(tmp_path / "p.json", placement())
    again = read_placement_file(tmp_path / "p.json")
    assert again == placement()
    assert hash(again) == hash(placement())
    assert again != placement(description="another")
    assert json.loads((tmp_path / "p.json").read_text())["physical_to_logical_map"] == ROWS
    assert not again.physical_to_logical_LP.flags.writeable
    assert again.slots_per_device == 3


DROP = object()
OWN_DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"format": "other"}, 'format: "other" is not "epsim-placement"; bring'),
    ({"version": 2}, "version: 2 is not 1"),
    ({"version": True}, "version: true is not 1"),
    ({"policy": DROP}, "policy: is missing; write it"),
    ({"extra": 1}, "extra: is not a field of a placement file; leave it out"),
    ({"layer_ids": 3}, "layer_ids: 3 is not a list"),
    ({"layer_ids": ["3", 4]}, 'layer_ids: ["3", 4] are not layer numbers'),
    ({"layer_ids": [4, 3]}, "layer_ids: 3 after 4; write each once, ascending"),
    ({"layer_ids": [3]}, "physical_to_logical_map: has 2 rows, layer_ids 1"),
    ({"num_experts": "4"}, 'num_experts: "4" is not a whole number from 1 to 65536'),
    ({"num_experts": 5}, "physical_to_logical_map: layer 3 has no slot for expert 4"),
    ({"num_devices": 0}, "num_devices: 0 is not a whole number"),
    ({"num_devices": 4}, "6 slots do not divide over num_devices 4; use a multiple of 4 slots"),
    ({"physical_to_logical_map": []}, "physical_to_logical_map: [] is not a list of rows"),
    ({"physical_to_logical_map": [ROWS[0], 5]}, "physical_to_logical_map[1]: 5 is not a row"),
    ({"physical_to_logical_map": [ROWS[0], [0, 1, 2]]}, "physical_to_logical_map[1]: 3 slots, row 0 has 6"),
    (
        {"physical_to_logical_map": [ROWS[0], [*ROWS[1][:5], 2.0]]},
        "physical_to_logical_map[1][5]: 2.0 is not an expert",
    ),
    ({"physical_to_logical_map": [ROWS[0], [*ROWS[1][:5], 4]]}, "layer 4, slot 5 holds expert 4; experts are numbered"),
    ({"description": None}, "description: null is not text"),
]


@pytest.mark.parametrize(("changes", "rule"), OWN_DAMAGE, ids=[rule[:30] for _, rule in OWN_DAMAGE])
def test_damaged_own_file(epsim: Cli, changes: dict[str, Any], rule: str) -> None:
    content = {**json.loads(placement().to_json()), **changes}
    Path("bad.json").write_text(json.dumps({key: value for key, value in content.items() if value is not DROP}))
    said = epsim.fails("export", "bad.json", "--to", "sglang", "-o", "out.json")
    assert said.startswith("bad.json: ")
    assert rule in said


def test_what_is_no_json_at_all(epsim: Cli) -> None:
    for content in (b"", b"\xff\x00", b'{"format": ', b"[" * 100_000):
        Path("bad.json").write_bytes(content)
        assert "bad.json: is not JSON" in epsim.fails("export", "bad.json", "--to", "sglang", "-o", "out.json")
    Path("bad.json").write_text("[1]")
    assert "is not a JSON object" in epsim.fails("export", "bad.json", "--to", "sglang", "-o", "out.json")
    assert "absent.json: cannot be read" in epsim.fails("export", "absent.json", "--to", "sglang", "-o", "out.json")


# The policy `file` reads it.


def problem(num_layers: int = 2, num_experts: int = 4, num_devices: int = 2) -> PlacementProblem:
    return PlacementProblem(
        num_layers=num_layers,
        num_experts=num_experts,
        node_of_device_R=np.zeros(num_devices, np.int32),
        expert_load_MLE=np.ones((2, num_layers, num_experts), np.int64),
    )


def test_policy_file_reads_it(tmp_path: Path) -> None:
    write_placement_file(tmp_path / "p.json", placement())
    placed = FromFile(path=tmp_path / "p.json").place(problem())
    assert placed.physical_to_logical_LP.tolist() == ROWS
    assert placed.policy == "file"


def test_policy_file_is_for_the_layers_of_the_trace(tmp_path: Path) -> None:
    trace = make_trace([[[0, 1]], [[2, 3]]], num_experts=4)  # layers 0 and 1
    policy = FromFile(path=tmp_path / "p.json")
    for layer_ids, named in (((3, 4), "3-4"), ((0, 2), "0, 2")):
        write_placement_file(tmp_path / "p.json", placement(layer_ids=layer_ids))
        with pytest.raises(PlacementError) as error:
            policy.place(replace(problem(), trace=trace))
        assert f"p.json: layer_ids: it is for layers {named}, the trace has 0-1; name a" in str(error.value)
        assert policy.place(problem()).physical_to_logical_LP.tolist() == ROWS  # here are only loads
    write_placement_file(tmp_path / "p.json", placement(layer_ids=(0, 1)))
    assert policy.place(replace(problem(), trace=trace)).physical_to_logical_LP.tolist() == ROWS
    (tmp_path / "p.json").write_text(json.dumps({"physical_to_logical_map": ROWS}))  # SGLang's names no layers
    assert policy.place(replace(problem(), trace=trace)).physical_to_logical_LP.tolist() == ROWS


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_layers": 3}, "has 2 layers, the trace 3"),
        ({"num_experts": 5}, "is for 4 experts, here are 5"),
        ({"num_devices": 3}, "is for 2 devices, here are 3"),
    ],
)
def test_policy_file_checks_what_it_is_for(tmp_path: Path, changes: dict[str, int], rule: str) -> None:
    write_placement_file(tmp_path / "p.json", placement())
    with pytest.raises(PlacementError) as error:
        FromFile(path=tmp_path / "p.json").place(problem(**changes))
    assert str(error.value).startswith("placement.path: ")
    assert rule in str(error.value)


# Export, by hand.


def test_sglang(epsim: Cli) -> None:
    said = epsim.ok("export", "p.json", "--to", "sglang", "-o", "s.json")
    assert "note: SGLang's file has no layer ids, and row 0 is layer 3" in said
    assert json.loads(Path("s.json").read_text()) == {"physical_to_logical_map": ROWS}
    said = epsim.ok("export", "p.json", "--to", "sglang", "-o", "all.json", "--num-layers", "6")
    assert "layer ids" not in said
    # Layers 0, 1, 2 and 5 have arange(6) % 4.
    first = [0, 1, 2, 3, 0, 1]
    assert json.loads(Path("all.json").read_text()) == {"physical_to_logical_map": [first, first, first, *ROWS, first]}
    epsim.ok("import", "all.json", "--from", "sglang", "-o", "back.json", "--devices", "2", "--layer-ids", "3-4")
    assert read_placement_file(Path("back.json")).physical_to_logical_LP.tolist() == ROWS
    assert "more than that" in epsim.fails("export", "p.json", "--to", "sglang", "-o", "o.json", "--num-layers", "4")


def test_sglang_pt(epsim: Cli) -> None:
    import torch

    epsim.ok("export", "p.json", "--to", "sglang", "-o", "s.pt")
    content = torch.load("s.pt", weights_only=True)
    assert list(content) == ["physical_to_logical_map"]
    assert (content["physical_to_logical_map"].dtype, content["physical_to_logical_map"].tolist()) == (
        torch.int32,
        ROWS,
    )
    epsim.ok("import", "s.pt", "--from", "sglang", "-o", "back.json", "--devices", "2", "--layer-ids", "3,4")
    back = read_placement_file(Path("back.json"))
    assert (back.layer_ids, back.physical_to_logical_LP.tolist(), back.policy) == ((3, 4), ROWS, "sglang")


def test_tensorrt_llm(epsim: Cli) -> None:
    epsim.ok("export", "p.json", "--to", "tensorrt-llm", "-o", "t.yaml")
    assert yaml.safe_load(Path("t.yaml").read_text()) == {
        "num_slots": 6,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {3: ROWS[0], 4: ROWS[1]},
    }
    assert Path("t.yaml").read_text().count("\n") == 5


def test_vllm_ascend(epsim: Cli) -> None:
    epsim.ok("export", "even.json", "--to", "vllm-ascend", "-o", "v.json")
    assert json.loads(Path("v.json").read_text()) == {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": layer_id,
                "device_count": 2,
                "device_list": [{"device_id": 0, "device_expert": a}, {"device_id": 1, "device_expert": b}],
            }
            for layer_id, a, b in ((3, [0, 1], [2, 3]), (4, [2, 3], [0, 1]))
        ],
    }


def test_exflow(epsim: Cli) -> None:
    said = epsim.ok("export", "even.json", "--to", "exflow", "-o", "e.csv")
    assert "note: ExFlow's file has no layer ids" in said
    with Path("e.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    # Layer 0: experts 0, 1 on device 0; layer 1, ids 4 to 7: experts 2, 3 on device 0.
    assert lines == [["Expert", "Node"], *([str(i), str(node)] for i, node in enumerate([0, 0, 1, 1, 1, 1, 0, 0]))]


def test_exflow_with_uneven_devices(epsim: Cli) -> None:
    # Three experts on node 1 and one on node 0: three slots each, two of node 0 empty.
    Path("e.csv").write_text("Expert,Node\n0,1\n1,0\n2,1\n3,1\n")
    epsim.ok("import", "e.csv", "--from", "exflow", "-o", "back.json", "--num-experts", "4")
    back = read_placement_file(Path("back.json"))
    assert back.physical_to_logical_LP.tolist() == [[1, -1, -1, 0, 2, 3]]
    epsim.ok("export", "back.json", "--to", "exflow", "-o", "again.csv")
    assert Path("again.csv").read_text().split() == Path("e.csv").read_text().split()
    for target, name in (("sglang", "o.json"), ("tensorrt-llm", "o.yaml")):
        assert "layer 0, slot 1 is empty" in epsim.fails("export", "back.json", "--to", target, "-o", name)
    assert "device 1 has 3 experts in layer 0" in epsim.fails(
        "export", "back.json", "--to", "vllm-ascend", "-o", "o.json"
    )


def test_empty_slots_that_vllm_ascend_can_leave_out(epsim: Cli) -> None:
    write_placement_file(Path("gaps.json"), placement([[0, -1, 1, 2, 3, -1], [-1, 2, 3, 0, 1, -1]]))
    assert "note: empty slots" in epsim.ok("export", "gaps.json", "--to", "vllm-ascend", "-o", "v.json")
    epsim.ok("import", "v.json", "--from", "vllm-ascend", "-o", "back.json")
    assert read_placement_file(Path("back.json")).physical_to_logical_LP.tolist() == [[0, 1, 2, 3], [2, 3, 0, 1]]


def test_what_targets_cannot_carry(epsim: Cli) -> None:
    said = epsim.fails("export", "p.json", "--to", "exflow", "-o", "e.csv")
    assert said.startswith("p.json: physical_to_logical_map: layer 3 has 2 slots for expert 0, and ExFlow")
    for target in ("tensorrt-llm", "vllm-ascend", "exflow"):
        said = epsim.fails("export", "even.json", "--to", target, "-o", "o", "--num-layers", "9")
        assert said.startswith("--num-layers 9: ")
    assert epsim.fails("export", "p.json", "--to", "sglang", "-o", "o.txt").startswith("-o o.txt: ends neither")
    assert 'did you mean "sglang"?' in epsim.fails("export", "p.json", "--to", "sglan", "-o", "o.json")
    assert "is read for this" in epsim.fails("export", "p.json", "--to", "sglang", "-o", "p.json")


# Round trips.

ENDINGS = {"sglang": ["json", "pt"], "tensorrt-llm": ["yaml"], "vllm-ascend": ["json"], "exflow": ["csv"]}


@pytest.mark.parametrize(("name", "ending"), [(name, end) for name, ends in ENDINGS.items() for end in ends])
def test_round_trip(name: str, ending: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("round")

    @PROPERTY
    @given(
        num_devices=st.integers(1, 4),
        slots=st.integers(1, 4),
        replicas=st.integers(0, 3),
        layers=st.sets(st.integers(0, 90), min_size=1, max_size=4),
        seed=st.integers(0, 2**32 - 1),
    )
    def through(num_devices: int, slots: int, replicas: int, layers: set[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        num_slots = num_devices * slots
        num_experts = num_slots if name == "exflow" else max(1, num_slots - replicas)
        rows = [rng.permutation(np.arange(num_slots) % num_experts) for _ in layers]
        if name == "exflow":  # has no order of slots on a device
            rows = [np.sort(row.reshape(num_devices, -1), axis=1).ravel() for row in rows]
        before = PlacementFile(
            layer_ids=tuple(sorted(layers)),
            num_experts=num_experts,
            num_devices=num_devices,
            physical_to_logical_LP=np.array(rows, dtype=np.int32),
            policy=name,
            description=f"imported from x.{ending}",
        )
        write_placement_file(folder / "p.json", before)
        export_file(folder / "p.json", name, folder / f"x.{ending}", None)
        options = Options(
            layer_ids=before.layer_ids if name in ("sglang", "exflow") else None,
            num_devices=None if name == "vllm-ascend" else num_devices,
        )
        import_files([folder / f"x.{ending}"], name, folder / "back.json", options)
        assert read_placement_file(folder / "back.json") == before

    through()


def test_model_card_says_layers_and_experts(epsim: Cli) -> None:
    # Moonlight: 27 layers, the first dense, 64 experts.
    row = list(range(64))
    for num_rows in (26, 27):
        Path("s.json").write_text(json.dumps({"physical_to_logical_map": [row] * num_rows}))
        epsim.ok("import", "s.json", "--from", "sglang", "-o", "m.json", "--devices", "8", "--model", "moonlight")
        assert read_placement_file(Path("m.json")).layer_ids == tuple(range(1, 27))
    Path("s.json").write_text(json.dumps({"physical_to_logical_map": [row] * 25}))
    said = epsim.fails("import", "s.json", "--from", "sglang", "-o", "n.json", "--devices", "8", "--model", "moonlight")
    assert "has 25 layers, Moonlight-16B-A3B has 26" in said


# Damaged files of other systems: (format, file, content, further options, what is said).

GOOD_TRT = {
    "num_slots": 4,
    "layer_updates_per_iter": 0,
    "initial_global_assignments": {1: [0, 1, 2, 3], 2: [3, 2, 1, 0]},
}
GOOD_ASCEND = {
    "moe_layer_count": 1,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [{"device_id": 0, "device_expert": [0, 1]}, {"device_id": 1, "device_expert": [2, 3]}],
        }
    ],
}


def sglang(rows: object) -> str:
    return json.dumps({"physical_to_logical_map": rows})


def trt(**changes: Any) -> str:
    fields = {**GOOD_TRT, **changes}
    return yaml.safe_dump({key: value for key, value in fields.items() if value is not DROP})


def ascend(**changes: Any) -> str:
    layer: dict[str, Any] = {**GOOD_ASCEND["layer_list"][0], **changes}  # type: ignore[index]
    return json.dumps({"moe_layer_count": 1, "layer_list": [layer]})


def devices(*experts: Any) -> list[dict[str, Any]]:
    return [{"device_id": d, "device_expert": row} for d, row in enumerate(experts)]


PICKLE = b"\x80\x02cposix\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02R."  # would run `true`
TWO = "--devices 2"
FOUR = "--num-experts 4"
BOTH = f"{TWO} {FOUR}"
DAMAGE: list[tuple[str, str, str | bytes, str, str]] = [
    ("sglang", "x.json", sglang([[0, 1, 2, 3]]), "", "over how many devices its 4 slots lie; write --devices"),
    ("sglang", "x.json", json.dumps({"physical_to_logical_map": EVEN, "x": 1}), TWO, '"x" is not a key of it'),
    ("sglang", "x.json", json.dumps({"logical_count": EVEN}), TWO, "import it with --from sglang-logical-count"),
    ("sglang", "x.json", "{}", TWO, "physical_to_logical_map is missing"),
    ("sglang", "x.json", "[[0, 1]]", TWO, "is not a mapping"),
    ("sglang", "x.json", sglang([[0, 1], [0]]), TWO, "physical_to_logical_map[1]: has 1 entries, others 2"),
    ("sglang", "x.json", sglang([[0, 1], [0, "1"]]), TWO, 'physical_to_logical_map[1][1]: "1" is not a whole number'),
    ("sglang", "x.json", sglang([[0, 1], [0, True]]), TWO, "physical_to_logical_map[1][1]: true is not a whole number"),
    ("sglang", "x.json", sglang([[0, -1], [0, 1]]), TWO, "physical_to_logical_map[0][1]: -1 is not from 0 to 1"),
    ("sglang", "x.json", sglang([[0, 4]]), f"{TWO} --num-experts 4", "map[0][1]: 4 is not from 0 to 3"),
    ("sglang", "x.json", sglang([[0, 2]]), TWO, "layer 0 has no slot for expert 1"),
    ("sglang", "x.json", sglang([[0, 1, 2]]), TWO, "3 slots do not divide over num_devices 2"),
    ("sglang", "x.json", sglang([]), TWO, "physical_to_logical_map: is empty"),
    ("sglang", "x.json", sglang([[0, 1]])[:-3], TWO, "is not JSON (line 1: "),
    ("sglang", "x.json", b"\x80\x02}q\x00.", TWO, "is not a text file in UTF-8"),
    ("sglang", "x.yaml", sglang([[0, 1]]), TWO, "ends neither in .json nor in .pt"),
    ("sglang", "x.pt", PICKLE, TWO, "is no file of torch.save"),
    ("sglang", "x.pt", b"PK\x03\x04 cut off", TWO, "is no file of torch.save"),
    ("sglang", "x.json", sglang(EVEN), f"{TWO} --layer-ids 3-9", "has 2 layers, --layer-ids names 7, up to 9"),
    ("sglang", "x.json", sglang(EVEN), f"{TWO} --layer-ids 4-3", '--layer-ids: "4-3" does not name layers once each'),
    ("sglang", "x.json", sglang(EVEN), f"{TWO} --layer-ids a", '--layer-ids: "a" is not a layer'),
    ("tensorrt-llm", "x.yaml", trt(), "", "does not say over how many devices its 4 slots lie"),
    ("tensorrt-llm", "x.yaml", trt(extra=1), TWO, '"extra" is not a key of it'),
    ("tensorrt-llm", "x.yaml", trt(num_slots=DROP), TWO, "num_slots is missing"),
    ("tensorrt-llm", "x.yaml", trt(num_slots="4"), TWO, 'num_slots: "4" is not a whole number'),
    ("tensorrt-llm", "x.yaml", trt(num_slots=6), TWO, "initial_global_assignments[1]: has 4 slots, num_slots is 6"),
    ("tensorrt-llm", "x.yaml", trt(layer_updates_per_iter=2), TWO, "layer_updates_per_iter: 2 is not 0"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments=[[0]]), TWO, "is not a mapping from layer ids"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={}), TWO, "initial_global_assignments: is empty"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={"a": [0]}), TWO, '"a" is not a whole number'),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={1: [0, 1, 2, 2]}), BOTH, "no slot for expert 3"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={1: [0, 1, 2, 4]}), BOTH, "holds expert 4"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={1: [0, 1, 2, -1]}), TWO, "[1][3]: -1 is not from 0"),
    ("tensorrt-llm", "x.yaml", trt(initial_global_assignments={1: [0, 1, 2, 0.5]}), TWO, "[1][3]: 0.5 is not a whole"),
    ("tensorrt-llm", "x.yaml", trt() + "num_slots: 4\n", TWO, '"num_slots" is there twice'),
    ("tensorrt-llm", "x.yaml", "a: !!python/object/apply:os.system [ls]", TWO, "is not YAML: line 1"),
    ("tensorrt-llm", "x.yaml", b"\xff\xfe\x00", TWO, "is not a text file in UTF-8"),
    ("tensorrt-llm", "x.yaml", trt(), f"{TWO} --layer-ids 5,6", "has layers 1-2, --layer-ids or the model 5-6; leave"),
    ("tensorrt-llm", "x.yaml", trt(), f"{TWO} --model moonlight", "has layers 1-2, --layer-ids or the model 1-26"),
    ("vllm-ascend", "x.json", ascend(device_count=3), "", "layer_list[0].device_count: 3, but device_list has 2"),
    ("vllm-ascend", "x.json", ascend(device_list=devices([0, 1], [2])), "", "has 1 experts, the first device 2"),
    ("vllm-ascend", "x.json", ascend(device_list=devices([0, 1], [2, 2])), FOUR, "no slot for expert 3"),
    ("vllm-ascend", "x.json", ascend(device_list=devices([0, 1], [2, -3])), "", "[0][3]: -3 is not from 0"),
    ("vllm-ascend", "x.json", ascend(device_list=devices([0, 1], 5)), "", "device_expert: 5 is not a list"),
    ("vllm-ascend", "x.json", ascend(device_list=[{"device_id": 1, "device_expert": [0]}] * 2), "", "1 is not 0"),
    ("vllm-ascend", "x.json", ascend(device_list=[{"device_expert": [0]}] * 2), "", "device_id is missing"),
    ("vllm-ascend", "x.json", ascend(device_list={}), "", "device_list: {} is not a list with something in it"),
    ("vllm-ascend", "x.json", ascend(), "--devices 4", "device_count: 2, --devices 4; leave that out"),
    ("vllm-ascend", "x.json", json.dumps({**GOOD_ASCEND, "moe_layer_count": 2}), "", "2, but layer_list has 1"),
    ("vllm-ascend", "x.json", json.dumps({"layer_list": []}), "", "moe_layer_count is missing"),
    ("vllm-ascend", "x.json", "not json", "", "is not JSON (line 1"),
    ("exflow", "x.csv", "Expert,Node\n0,0\n1,1\n", "", "write --num-experts or --layer-ids"),
    ("exflow", "x.csv", "0,0\n1,1\n", FOUR, 'line 1: "0,0" is not the header; write Expert,Node'),
    ("exflow", "x.csv", "Layer,Expert,Node\n", FOUR, 'line 1: "Layer,Expert,Node" is not the header'),
    ("exflow", "x.csv", "Expert,Node\n", FOUR, "has no experts"),
    ("exflow", "x.csv", "", FOUR, "has no experts"),
    ("exflow", "x.csv", "Expert,Node\n0,0\n0,1\n", FOUR, "line 3: 0 is there twice"),
    ("exflow", "x.csv", "Expert,Node\n0,0\n2,1\n", FOUR, "there is no line for 1 of 2"),
    ("exflow", "x.csv", "Expert,Node\n0,0,1\n", FOUR, 'line 2: "0,0,1" has 3 values'),
    ("exflow", "x.csv", "Expert,Node\n0,-1\n", FOUR, '"-1" is not a whole number'),
    ("exflow", "x.csv", "Expert,Node\n0,0.0\n", FOUR, '"0.0" is not a whole number'),
    ("exflow", "x.csv", "Expert,Node\n0,0\n1,1\n2,0\n", "--num-experts 2", "3 lines are not 1 layers of 2 experts"),
    ("exflow", "x.csv", "Expert,Node\n0,0\n1,3\n", f"--num-experts 2 {TWO}", "there is a node 3, --devices 2"),
    ("exflow", "x.csv", b"\x1f\x8b\x08\xff", FOUR, "is not a text file in UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "name", "content", "options", "rule"), DAMAGE)
def test_damaged(epsim: Cli, source: str, name: str, content: str | bytes, options: str, rule: str) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = epsim.fails("import", name, "--from", source, "-o", "out.json", *options.split())
    assert rule in said
    assert said.startswith((f"{name}: ", "--"))
    assert not Path("out.json").exists()


def test_several_files_and_unknown_formats(epsim: Cli) -> None:
    said = epsim.fails("import", "p.json", "even.json", "--from", "sglang", "-o", "o.json")
    assert said == "even.json: a placement is one file; import them one by one"
    assert "is not a format" in epsim.fails("import", "p.json", "--from", "deepspeed", "-o", "o.json")
    assert "cannot be read" in epsim.fails(
        "import", "absent.json", "--from", "sglang", "-o", "o.json", "--devices", "2"
    )
    assert "cannot be read" in epsim.fails("import", "absent.pt", "--from", "sglang", "-o", "o.json", "--devices", "2")


def test_what_is_read_is_not_written_over(epsim: Cli) -> None:
    Path("s.json").write_text(sglang(EVEN))
    Path("card.yaml").write_text((ROOT / "epsim/presets/models/moonlight.yaml").read_text())
    command = ("import", "s.json", "--from", "sglang", "--devices", "2", "--layer-ids", "3-4")
    for option, name in (("--placement", "even.json"), ("--model", "card.yaml")):
        for output in (name, f"./{name}", str(Path(name).resolve())):
            assert f"{name}: is read for this; name another file" in epsim.fails(*command, option, name, "-o", output)
    Path("stats").mkdir()
    Path("stats/meta_info.json").write_text("{}")
    for output in ("stats/meta_info.json", "stats/loads.json"):
        said = epsim.fails("import", "stats/", "--from", "tensorrt-llm-stats", "-o", output)
        assert said == f"-o {output}: lies in stats, which is read for this; name a path outside of it"


def test_without_torch(epsim: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from epsim.formats import torch_file

    monkeypatch.setattr(torch_file, "find_spec", lambda name: None)
    said = epsim.fails("export", "p.json", "--to", "sglang", "-o", "s.pt")
    assert said == "s.pt: a .pt file needs torch; install it with: pip install 'epsim[trace]'"


GIVEN = {
    "layer_ids": (0,),
    "num_experts": 4,
    "num_devices": 2,
    "topk": 1,
    "placement": placement(),
    "vision_token_ids": (0,),
    "iteration": 0,
    "request_tokens": 1,
    "passes_as_requests": True,
    "drop_unrecorded_prefix": True,
}


@pytest.mark.parametrize("name", TAKEN)
def test_an_option_is_taken_or_refused(name: str, tmp_path: Path) -> None:
    assert set(TAKEN) == {*PLACEMENTS, *LOADS, *ROUTINGS}
    for field, value in GIVEN.items():
        with pytest.raises(FormatError) as error:  # the file is not there
            import_files([tmp_path / "absent"], name, tmp_path / "out", Options(**{field: value}))
        assert (f"has no meaning for {name}; leave it out" in str(error.value)) == (field not in TAKEN[name])
        assert str(error.value).startswith("--") == (field not in TAKEN[name])


def test_a_list_of_layers() -> None:
    assert parse_layer_ids("1, 3-4") == (1, 3, 4)


def test_placement_file_in_code_is_checked() -> None:
    with pytest.raises(PlacementError, match="is not a JSON object"):
        parse_placement_file([])


# What JSON readers refuse and take alike. {0} is put behind the opening brace of a file that is good without it.
JSON_FILES = {
    "sglang": ('{{{0}"physical_to_logical_map": [[0, 1]]}}', "--from sglang --devices 2"),
    "vllm-ascend": (
        '{{{0}"moe_layer_count": 1, "layer_list": [{{"layer_id": 0, "device_count": 2, "device_list": ['
        '{{"device_id": 0, "device_expert": [0]}}, {{"device_id": 1, "device_expert": [1]}}]}}]}}',
        "--from vllm-ascend",
    ),
    "loads": ('{{{0}"logical_count": [[1, 2]]}}', "--from sglang-logical-count"),
    "responses": (
        '{{{0}"prompt_token_ids": [5], "choices": [{{"routed_experts": [[[0]]], "token_ids": [6]}}]}}',
        "--from vllm-routed-experts --num-experts 2",
    ),
}
STRICT = {
    "twice": ('"k": [1], "k": [1], ', '"k" is there twice; write it once'),
    "in another key": ('"k": {"a": 1, "b\\n": 1, "b\\n": 2}, ', '"b\\n" is there twice; write it once'),
    "NaN": ('"k": NaN, ', "NaN is not a number of JSON; write a finite one"),
    "Infinity": ('"k": [-Infinity], ', "-Infinity is not a number of JSON; write a finite one"),
}


@pytest.mark.parametrize("case", STRICT)
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_is_read_strictly(epsim: Cli, name: str, case: str) -> None:
    text, options = JSON_FILES[name]
    more, rule = STRICT[case]
    Path("x.json").write_text(text.format(""))
    epsim.ok("import", "x.json", *options.split(), "-o", "out")
    Path("x.json").write_text(text.format(more))
    assert epsim.fails("import", "x.json", *options.split(), "-o", "out") == f"x.json: {rule}"


@pytest.mark.parametrize("case", STRICT)
def test_placement_files_are_read_strictly(epsim: Cli, case: str) -> None:
    more, rule = STRICT[case]
    Path("p.json").write_text(placement().to_json().replace("{", "{" + more, 1))
    assert epsim.fails("export", "p.json", "--to", "exflow", "-o", "x.csv") == f"p.json: {rule}"
    with pytest.raises(PlacementError) as error:
        FromFile(path=Path("p.json")).place(problem())
    assert str(error.value) == f"placement.path: p.json: {rule}"


PIPES = [  # what would wait for ever, and the command that reads it
    ("x.json", "--from sglang --devices 2"),
    ("x.pt", "--from sglang --devices 2"),
    ("x.yaml", "--from tensorrt-llm --devices 2"),
    ("x.json", "--from vllm-ascend"),
    ("x.csv", "--from exflow"),
    ("x.json", "--from sglang-logical-count"),
    ("x.jsonl", "--from vllm-routed-experts --num-experts 4"),
    ("x.npz", "--from vllm-routed-experts --num-experts 4"),
    ("stats/rank0.safetensors", "--from tensorrt-llm-stats"),
]


@pytest.mark.parametrize(("name", "options"), PIPES)
def test_a_pipe_is_not_opened(epsim: Cli, name: str, options: str) -> None:
    Path("stats").mkdir()
    Path("stats/meta_info.json").write_text('{"num_experts": 2, "num_experts_per_token": 1}')
    os.mkfifo(name)
    said = epsim.fails("import", Path(name).parts[0], *options.split(), "-o", "out")
    assert said.startswith(f"{name}: cannot be read: it is not a regular file; write ")


def test_a_pipe_is_no_placement(epsim: Cli) -> None:
    os.mkfifo("pipe.json")
    said = epsim.fails("export", "pipe.json", "--to", "exflow", "-o", "x.csv")
    assert said == "pipe.json: cannot be read: it is not a regular file; write the path of a placement file"
    with pytest.raises(PlacementError, match=r"^placement.path: cannot read pipe.json: it is not a regular file"):
        FromFile(path=Path("pipe.json")).place(problem())
    os.mkfifo("folder")
    for source in ("tensorrt-llm-stats", "flame-moe"):
        said = epsim.fails("import", "folder", "--from", source, "--num-experts", "4", "-o", "out")
        assert said.startswith("folder: is not ")


def test_torch_does_not_warn_beside_the_line(epsim: Cli) -> None:
    Path("x.pt").write_bytes(pickle.dumps({"physical_to_logical_map": EVEN}, protocol=4))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        said = epsim.fails("import", "x.pt", "--from", "sglang", "--devices", "2", "-o", "out")
    assert said.startswith("x.pt: is no file of torch.save")
    assert not warned


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        *(("x.json", text.format(""), options) for text, options in JSON_FILES.values()),
        ("x.jsonl", JSON_FILES["responses"][0].format("") + "\n", JSON_FILES["responses"][1]),
        ("x.yaml", trt(), "--from tensorrt-llm --devices 2"),
        ("x.csv", "Expert,Node\n0,0\n1,1\n", "--from exflow --num-experts 2"),
    ],
)
def test_a_byte_order_mark_is_no_content(epsim: Cli, name: str, text: str, options: str) -> None:
    Path(name).write_text(text)
    epsim.ok("import", name, *options.split(), "-o", "without")
    Path(name).write_bytes(BOM + text.encode())
    epsim.ok("import", name, *options.split(), "-o", "with")
    assert Path("with").read_bytes() == Path("without").read_bytes()


def test_a_byte_order_mark_in_a_placement_file(epsim: Cli) -> None:
    here = problem()
    own = placement(EVEN, layer_ids=tuple(range(here.num_layers)))
    Path("own.json").write_bytes(BOM + own.to_json().encode())
    assert read_placement_file(Path("own.json")) == own
    assert FromFile(path=Path("own.json")).place(here).physical_to_logical_LP.tolist() == EVEN

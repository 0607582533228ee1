"""Loads in files of other systems: SGLang's recorder and input, TensorRT-LLM's statistics; damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.foreign import Cli, write_stat, write_statistics

from epsim.trace import TraceMeta
from epsim.trace.file import TraceWriter
from epsim.trace.routing import RoutingTrace

# Two steps of three layers (the first is dense) and three experts; the second of three rows was not used.
COUNT = np.array([[[0] * 3, [1, 2, 3], [4, 0, 2]], [[0] * 3] * 3, [[0] * 3, [5, 0, 1], [2, 2, 2]]])


@pytest.fixture
def epsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, monkeypatch, capsys)


def loads(name: str = "out.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(name).read_text())
    return content


def test_stat(epsim: Cli) -> None:
    write_stat(Path("s.pt"), COUNT)
    said = epsim.ok("import", "s.pt", "--from", "sglang-stat", "-o", "out.json")
    assert "note: no expert of layers 0 was ever chosen" in said
    found = loads()
    assert found["logical_count"] == COUNT[[0, 2]].tolist()
    assert (found["layer_ids"], found["num_experts"], found["steps"]) == ([0, 1, 2], 3, [0, 2])
    assert (found["system"], found["files"]) == ("sglang-stat", ["s.pt"])
    said = epsim.ok("import", "s.pt", "--from", "sglang-stat", "-o", "moe.json", "--layer-ids", "1-2")
    assert "note" not in said
    assert loads("moe.json")["logical_count"] == COUNT[[0, 2]][:, 1:].tolist()


def test_logical_count_and_what_epsim_wrote(epsim: Cli) -> None:
    Path("l.json").write_text(json.dumps({"logical_count": [[1, 2], [3, 4]], "further": "keys are fine"}))
    epsim.ok("import", "l.json", "--from", "sglang-logical-count", "-o", "out.json", "--layer-ids", "3,5")
    assert (loads()["logical_count"], loads()["layer_ids"]) == ([[1, 2], [3, 4]], [3, 5])
    epsim.ok("import", "out.json", "--from", "sglang-logical-count", "-o", "again.json")
    assert (loads("again.json")["logical_count"], loads("again.json")["layer_ids"]) == ([[1, 2], [3, 4]], [3, 5])
    command = ("import", "out.json", "--from", "sglang-logical-count", "-o", "again.json", "--layer-ids")
    epsim.ok(*command, "5")
    assert (loads("again.json")["logical_count"], loads("again.json")["layer_ids"]) == ([[3, 4]], [5])
    said = epsim.fails(*command, "1-2")
    assert said.startswith("out.json: layer_ids: has layers 3, 5, --layer-ids or the model 1-2; leave")


def test_logical_count_by_step_and_as_pt(epsim: Cli) -> None:
    import torch

    Path("l.json").write_text(json.dumps({"logical_count": COUNT.tolist()}))
    torch.save({"logical_count": torch.from_numpy(COUNT)}, "l.pt")
    for name in ("l.json", "l.pt"):
        epsim.ok("import", name, "--from", "sglang-logical-count", "-o", "out.json")
        assert (loads()["logical_count"], loads()["layer_ids"]) == (COUNT.tolist(), [0, 1, 2])


def test_statistics_are_summed_over_ranks(epsim: Cli) -> None:
    # Iteration 50: layer 3 has [1, 0, 1] + [0, 2, 0], layer 4 [0, 1, 1] + [2, 0, 0]; iteration 51 is as it stands.
    of_rank = [
        {"50_3": [1, 0, 1], "50_4": [0, 1, 1], "51_3": [2, 0, 0], "51_4": [0, 0, 2]},
        {"50_3": [0, 2, 0], "50_4": [2, 0, 0], "51_3": [0, 0, 0], "51_4": [0, 0, 0]},
    ]
    arrays = [{key: np.array(value, dtype=np.int64) for key, value in one.items()} for one in of_rank]
    write_statistics(Path("stats"), arrays, 3, 2)
    (Path("stats") / "cooccurrence_rank0.safetensors").write_bytes(b"further files are left alone")
    epsim.ok("import", "stats", "--from", "tensorrt-llm-stats", "-o", "out.json")
    assert loads()["logical_count"] == [[[1, 2, 1], [2, 1, 1]], [[2, 0, 0], [0, 0, 2]]]
    assert (loads()["layer_ids"], loads()["steps"], loads()["num_ranks"]) == ([3, 4], [50, 51], 2)


def make_trace(path: Path) -> None:
    """Write two tokens of layers 1 and 2: experts {0, 1} and {1, 2}; {2, 0} and {2, 1}."""
    meta = TraceMeta(layer_ids=(1, 2), num_experts=3, topk=2, model="", origin="imported", description="")
    ids = np.array([[[0, 1], [1, 2]], [[2, 0], [2, 1]]], dtype=np.uint8)
    zeros = np.zeros(2, dtype=np.int32)
    codes = zeros.astype(np.uint8)
    with TraceWriter(path, meta) as writer:
        writer.write(
            RoutingTrace(
                meta=meta,
                request_id_T=zeros,
                position_T=np.array([0, 1], dtype=np.int32),
                step_T=zeros,
                phase_T=codes,
                modality_T=codes,
                topk_expert_ids_TLK=ids,
            )
        )


def test_export_of_a_trace(epsim: Cli) -> None:
    make_trace(Path("t.arrow"))
    said = epsim.ok("export", "t.arrow", "--to", "sglang-logical-count", "-o", "out.json")
    assert "note: row 0 is layer 1" in said
    # Layer 1: expert 0 twice, 1 and 2 once; layer 2: expert 1 and 2 twice.
    assert (loads()["logical_count"], loads()["layer_ids"]) == ([[2, 1, 1], [0, 2, 2]], [1, 2])
    said = epsim.ok("export", "t.arrow", "--to", "sglang-logical-count", "-o", "all.json", "--num-layers", "4")
    assert "note" not in said
    assert loads("all.json")["logical_count"] == [[0, 0, 0], [2, 1, 1], [0, 2, 2], [0, 0, 0]]
    arguments = ("export", "t.arrow", "--to", "sglang-logical-count", "-o")
    assert "more than that" in epsim.fails(*arguments, "x.json", "--num-layers", "2")
    assert "does not end in .json" in epsim.fails(*arguments, "x.txt")
    assert "cannot be read" in epsim.fails("export", "no.arrow", "--to", "sglang-logical-count", "-o", "x.json")


# Damaged files.

STAT_DAMAGE: list[tuple[Any, str, str]] = [
    ([1], "", "[1] is not a mapping"),
    ({"rank": 0}, "", "logical_count is missing"),
    ({"records": [], "last_physical_to_logical_map": 0}, "", "import it with --from sglang-per-token"),
    ({"logical_count": "x"}, "", 'logical_count: "x" is not a list'),
    ({"logical_count": COUNT[0]}, "", "logical_count: has 2 axes, not 3; write [step][layer][expert]"),
    ({"logical_count": COUNT.astype(np.float32)}, "", "logical_count: holds float32, not whole numbers"),
    ({"logical_count": COUNT * 0}, "", "logical_count: is zero throughout"),
    ({"logical_count": COUNT - 1}, "", "logical_count[0][0][0]: -1 is not from 0"),
    ({"logical_count": COUNT}, "--num-experts 4", "has 3 experts, --num-experts or the model 4"),
    ({"logical_count": COUNT}, "--layer-ids 0-7", "has 3 layers, --layer-ids names 8"),
]


@pytest.mark.parametrize(("content", "options", "rule"), STAT_DAMAGE, ids=[rule[:30] for _, _, rule in STAT_DAMAGE])
def test_damaged_stat(epsim: Cli, content: Any, options: str, rule: str) -> None:
    import torch

    if isinstance(content, dict):
        content = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    torch.save(content, "s.pt")
    said = epsim.fails("import", "s.pt", "--from", "sglang-stat", "-o", "out.json", *options.split())
    assert rule in said


def test_cut_off_stat(epsim: Cli) -> None:
    write_stat(Path("s.pt"), COUNT)
    whole = Path("s.pt").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x00" * 100, b"PK"):
        Path("s.pt").write_bytes(content)
        assert "is no file of torch.save" in epsim.fails("import", "s.pt", "--from", "sglang-stat", "-o", "out.json")
    Path("s.bin").write_bytes(whole)
    assert "does not end in .pt" in epsim.fails("import", "s.bin", "--from", "sglang-stat", "-o", "out.json")


COUNT_DAMAGE: list[tuple[str, str]] = [
    ("{}", "logical_count is missing"),
    ("[1, 2]", "[1, 2] is not a mapping"),
    ('{"logical_count": 3}', "logical_count: 3 is not a list"),
    ('{"logical_count": []}', "logical_count: is empty"),
    ('{"logical_count": [1, 2]}', "logical_count[0]: 1 is not a list"),
    ('{"logical_count": [[1, 2], [3]]}', "logical_count[1]: has 1 entries, others 2"),
    ('{"logical_count": [[1, 2.5]]}', "logical_count[0][1]: 2.5 is not a whole number"),
    ('{"logical_count": [[1, -2]]}', "logical_count[0][1]: -2 is not from 0"),
    ('{"logical_count": [[[[1]]]]}', "logical_count[0][0][0]: [1] is not a whole number"),
    ('{"logical_count": [[1, 1e999]]}', "logical_count[0][1]: Infinity is not a whole number"),
    ('{"logical_count": [[1, 2]], "layer_ids": [1, 2]}', "layer_ids: [1, 2] are not 1 ascending ids"),
    ('{"physical_to_logical_map": [[1, 2]]}', "it is a placement; import it with --from sglang"),
    ('{"logical_count": [[1, 2', "is not JSON"),
]


@pytest.mark.parametrize(("content", "rule"), COUNT_DAMAGE, ids=[rule[:30] for _, rule in COUNT_DAMAGE])
def test_damaged_logical_count(epsim: Cli, content: str, rule: str) -> None:
    Path("l.json").write_text(content)
    assert rule in epsim.fails("import", "l.json", "--from", "sglang-logical-count", "-o", "out.json")
    Path("l.txt").write_text(content)
    said = epsim.fails("import", "l.txt", "--from", "sglang-logical-count", "-o", "out.json")
    assert "ends neither in .json nor in .pt" in said


def broken_statistics(case: str) -> str:
    """Write a folder with one mistake and return what should be said of it."""
    good = {"1_3": np.array([1, 1, 0]), "1_4": np.array([0, 1, 1])}
    folder = Path("stats")
    bad: dict[str, tuple[list[dict[str, Any]], str]] = {
        "missing key": ([good, {"1_3": good["1_3"]}], "rank1.safetensors: lacks 1_4"),
        "further key": ([good, {**good, "2_3": good["1_3"]}], "rank1.safetensors: has, and other ranks lack, 2_3"),
        "bad key": ([{**good, "layer3": good["1_3"]}], '"layer3" is not {iteration}_{layer}'),
        "shape": ([{"1_3": np.array([1, 1])}], "1_3: has 2 experts, meta_info.json 3"),
        "axes": ([{"1_3": np.array([[1, 1, 0]])}], "1_3: has 2 axes, not 1"),
        "kind": ([{"1_3": np.array([1.0, 1, 0])}], "1_3: holds float64, not whole numbers"),
        "negative": ([{"1_3": np.array([3, -1, 0])}], "1_3[1]: -1 is not from 0"),
        "no tensors": ([{}], "rank0.safetensors: has no tensors"),
    }
    ranks, rule = bad.get(case, ([good, good, good], ""))
    write_statistics(folder, ranks, 3, 2)
    if case == "no meta":
        (folder / "meta_info.json").unlink()
        rule = "meta_info.json: cannot be read"
    elif case == "meta":
        (folder / "meta_info.json").write_text('{"num_experts": "3"}')
        rule = 'meta_info.json: num_experts: "3" is not a whole number from 1'
    elif case == "no top-k":
        (folder / "meta_info.json").write_text('{"num_experts": 3}')
        rule = "num_experts_per_token is missing"
    elif case == "no rank":
        (folder / "rank1.safetensors").unlink()
        rule = "rank1.safetensors is missing of 3"
    elif case == "no ranks":
        for path in folder.glob("*.safetensors"):
            path.unlink()
        rule = "there is no rank0.safetensors"
    elif case == "cut off":
        path = folder / "rank2.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        rule = "rank2.safetensors: is not a safetensors file, or damaged"
    elif case == "garbage":
        (folder / "rank0.safetensors").write_bytes(b"\xff" * 40)
        rule = "rank0.safetensors: is not a safetensors file, or damaged"
    return rule


@pytest.mark.parametrize(
    "case",
    ["missing key", "further key", "bad key", "shape", "axes", "kind", "negative", "no tensors", "no meta", "meta",
     "no top-k", "no rank", "no ranks", "cut off", "garbage"],
)  # fmt: skip
def test_damaged_statistics(epsim: Cli, case: str) -> None:
    rule = broken_statistics(case)
    said = epsim.fails("import", "stats", "--from", "tensorrt-llm-stats", "-o", "out.json")
    assert rule in said
    assert said.startswith("stats")


def test_statistics_are_a_folder(epsim: Cli) -> None:
    Path("file").write_text("")
    assert "is not a folder" in epsim.fails("import", "file", "--from", "tensorrt-llm-stats", "-o", "out.json")
    broken_statistics("")
    said = epsim.fails("import", "stats", "--from", "tensorrt-llm-stats", "-o", "out.json", "--layer-ids", "1-9")
    assert "stats: has layers 3-4, --layer-ids or the model 1-9; leave --layer-ids out" in said
    command = ("import", "stats", "--from", "tensorrt-llm-stats", "-o", "out.json")
    assert "num_experts_per_token: has top-2, --topk or the model 3" in epsim.fails(*command, "--topk", "3")
    assert "num_experts: has 3 experts, --num-experts or the model 64" in epsim.fails(*command, "--model", "moonlight")
    said = epsim.fails(*command, "--model", "moonlight", "--num-experts", "3", "--topk", "2")
    assert "has layers 3-4, --layer-ids or the model 1-26" in said
    said = epsim.fails("import", "stats", "file", "--from", "tensorrt-llm-stats", "-o", "out.json")
    assert "is one folder" in said

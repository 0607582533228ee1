"""Routings in files of other systems become the traces they tell of; damaged and ambiguous files are refused."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.foreign import (
    Cli,
    Told,
    npy_base64,
    sglang_pass,
    sglang_records,
    sglang_response,
    story,
    vllm_response,
    write_flame,
    write_per_token,
)

from epsim.errors import FormatError
from epsim.formats.command import import_files
from epsim.formats.options import Options
from epsim.placement.file import PlacementFile, write_placement_file
from epsim.trace import check_trace
from epsim.trace.file import TraceFile

PROPERTY = settings(max_examples=10, deadline=None, derandomize=True)
# Seven physical experts for six logical ones, another map in each layer; row 0 is a dense layer.
MAP = np.array([[0] * 7, [5, 0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 0, 1]])
SIX = ("--num-experts", "6")


@pytest.fixture
def epsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, monkeypatch, capsys)


def holds(path: Path, told: list[Told], *, layer_ids: tuple[int, ...], tokens: bool = True) -> TraceFile:
    """Assert that a trace holds what was told, and every invariant."""
    trace = TraceFile.open(path)
    check_trace(trace)
    assert (trace.meta.layer_ids, trace.meta.origin, trace.meta.num_experts) == (layer_ids, "imported", 6)
    assert trace.requests.request_id_Q.tolist() == list(range(len(told)))
    for i, one in enumerate(told):
        rows = trace.select([i])
        np.testing.assert_array_equal(rows.topk_expert_ids_TLK, one.experts)
        assert int((rows.phase_T == 0).sum()) == one.num_prompt
        if tokens:
            assert rows.token_id_T is not None
            assert rows.token_id_T.tolist() == one.tokens.tolist()
        else:
            assert rows.token_id_T is None
    return trace


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), form=st.sampled_from(["older", "newer", "base64"]), lines=st.booleans())
def test_vllm(tmp_path_factory: pytest.TempPathFactory, seed: int, form: str, lines: bool) -> None:
    folder, told = tmp_path_factory.mktemp("vllm"), story(seed)
    responses = [vllm_response(one, form) for one in told]
    path = folder / ("r.jsonl" if lines else "r.json")
    path.write_text("\n".join(map(json.dumps, responses)) if lines else json.dumps(responses))
    options = Options(num_experts=6, layer_ids=(4, 7))
    import_files([path], "vllm-routed-experts", folder / "t.arrow", options)
    trace = holds(folder / "t.arrow", told, layer_ids=(4, 7))
    about = json.loads(trace.meta.description)
    assert (about["system"], about["files"], about["version"]) == ("vLLM", [path.name], "vllm-0.21.0")


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_sglang_responses(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder, told = tmp_path_factory.mktemp("sglang"), story(seed)
    (folder / "r.json").write_text(json.dumps([sglang_response(one) for one in told]))
    import_files([folder / "r.json"], "sglang-routed-experts", folder / "t.arrow", Options(num_experts=6, topk=2))
    holds(folder / "t.arrow", told, layer_ids=(0, 1))


def one_way(told: list[Told]) -> bool:
    """Whether each decode pass fits the running requests in one way, by trying all choices of them in order."""
    running, step = told, 0
    while going := [one for one in running if one.num_prompt + step < len(one.tokens)]:
        positions = [one.num_prompt + step for one in going]
        choices = itertools.combinations([one.num_prompt + step for one in running], len(going))
        if list(choices).count(tuple(positions)) > 1:
            return False
        running, step = going, step + 1
    return True


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1))
def test_per_token(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder, told = tmp_path_factory.mktemp("tokens"), story(seed)
    # All of the same length and prompts: positions alone do not tell them apart, the order of the batch does.
    told = [*told, *(Told(one.experts, one.tokens, one.num_prompt) for one in told[:1])]
    told = sorted(told, key=lambda one: -(len(one.tokens) - one.num_prompt)) if seed % 2 else told
    write_per_token(folder / "r.pt", sglang_records(told, MAP), MAP)
    if one_way(told):
        import_files([folder / "r.pt"], "sglang-per-token", folder / "t.arrow", Options())
        holds(folder / "t.arrow", told, layer_ids=(1, 2))
    else:
        with pytest.raises(FormatError, match="may be of more than one request"):
            import_files([folder / "r.pt"], "sglang-per-token", folder / "t.arrow", Options())
        assert not (folder / "t.arrow").exists()


@PROPERTY
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 9))
def test_flame(tmp_path_factory: pytest.TempPathFactory, seed: int, size: int) -> None:
    folder = tmp_path_factory.mktemp("flame")
    told = story(seed, num_requests=4)
    experts = np.concatenate([one.experts for one in told])
    tokens = np.concatenate([one.tokens for one in told])
    scores = np.random.default_rng(seed).random(experts.shape).astype(np.float16)
    write_flame(folder / "f", experts, scores, tokens)
    options = Options(num_experts=6, request_tokens=size)
    import_files([folder / "f"], "flame-moe", folder / "t.arrow", options)
    cuts = [slice(i, i + size) for i in range(0, len(tokens), size)]
    parts = [Told(experts[cut], tokens[cut], len(tokens[cut])) for cut in cuts]
    trace = holds(folder / "t.arrow", parts, layer_ids=(2, 3))
    weights = np.concatenate([batch.gate_weights_TLK for batch in trace.batches()])
    np.testing.assert_array_equal(weights, scores)


# What each format has besides.

ONE = Told(np.array([[[0, 1], [2, 3]], [[1, 2], [3, 4]], [[4, 5], [0, 5]]]), np.array([8, 5, 6]), 2)


def test_vllm_cached_prefix_void_last_row_and_choices(epsim: Cli) -> None:
    experts = ONE.experts.tolist()
    void = [[[-1, -1]] * 2]
    choice = {"routed_experts": [experts[2], [[0, 0], [0, 0]]]}  # of the last token there is nothing
    response = {"prompt_routed_experts": [*void, experts[1]], "choices": [choice, {"routed_experts": []}]}
    Path("r.json").write_text(json.dumps(response))
    epsim.ok("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    told = [Told(ONE.experts[1:], ONE.tokens, 1), Told(ONE.experts[1:2], ONE.tokens, 1)]
    trace = holds(Path("t.arrow"), told, layer_ids=(0, 1), tokens=False)
    assert json.loads(trace.meta.description)["cached_prompt_tokens_left_out"] == 2  # one of each request


def test_vllm_offline_and_arrays(epsim: Cli) -> None:
    outputs = [{"token_ids": [6, 7], "routed_experts": ONE.experts.tolist()}]
    Path("r.json").write_text(json.dumps({"prompt_token_ids": [8, 5], "outputs": outputs}))
    epsim.ok("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    holds(Path("t.arrow"), [ONE], layer_ids=(0, 1))
    np.savez("r.npz", routed_experts=ONE.experts.astype(np.int16), prompt_token_ids=np.array([8, 5]))
    epsim.ok("import", "r.npz", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    holds(Path("t.arrow"), [Told(ONE.experts, np.array([8, 5, -1]), 2)], layer_ids=(0, 1))


def test_lines_end_at_line_feeds_alone(epsim: Cli) -> None:
    texts = ["one\u2028two", "\u0085", "\u2029"]
    responses = [{**vllm_response(ONE, "newer"), "text": text} for text in texts]
    text = "\r\n".join(json.dumps(response, ensure_ascii=False) for response in responses)
    Path("r.jsonl").write_text(text, encoding="utf-8", newline="")
    epsim.ok("import", "r.jsonl", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    holds(Path("t.arrow"), [ONE] * 3, layer_ids=(0, 1))


def test_vision_tokens_are_those_that_are_named(epsim: Cli) -> None:
    Path("r.json").write_text(json.dumps(vllm_response(ONE, "newer")))
    options = ("--vision-token-id", "8", "--vision-token-id", "6")  # 6 is generated, so text
    said = epsim.ok("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX, *options)
    assert "3 tokens (1 of vision)" in said
    assert TraceFile.open("t.arrow").select([0]).modality_T.tolist() == [1, 0, 0]
    Path("r.json").write_text(json.dumps({"prompt_routed_experts": ONE.experts.tolist()}))
    said = epsim.fails("import", "r.json", "--from", "vllm-routed-experts", "-o", "u.arrow", *SIX, *options)
    assert said.startswith("--vision-token-id: there are no token ids in the file")


def test_sglang_responses_have_dense_layers_and_other_places(epsim: Cli) -> None:
    # A card of 27 layers, the first dense: the response has zeros there.
    experts = np.zeros((3, 27, 6), dtype=np.int64)
    experts[:, 1:] = np.arange(6) + np.arange(26)[:, None]
    response = sglang_response(Told(experts, ONE.tokens, 2))
    text = response.pop("meta_info")["routed_experts"]
    response |= {"sglext": {"routed_experts": text}, "usage": {"prompt_tokens": 2, "completion_tokens": 2}}
    Path("r.json").write_text(json.dumps(response))
    epsim.ok("import", "r.json", "--from", "sglang-routed-experts", "-o", "t.arrow", "--model", "moonlight")
    trace = TraceFile.open("t.arrow")
    assert (trace.meta.layer_ids, trace.meta.model) == (tuple(range(1, 27)), "Moonlight-16B-A3B")
    np.testing.assert_array_equal(trace.select([0]).topk_expert_ids_TLK, experts[:, 1:])


def records(*passes: tuple[int, list[tuple[Told, int, int]]], rank: int = 0) -> list[dict[str, Any]]:
    return [sglang_pass(i, mode, parts, MAP, rank=rank) for i, (mode, parts) in enumerate(passes)]


A = Told(np.concatenate([ONE.experts] * 2), np.arange(6), 3)
B = Told(np.concatenate([ONE.experts[::-1]] * 2), np.arange(6) + 10, 2)


def imported(epsim: Cli, passes: list[dict[str, Any]], *options: str, name: str = "t.arrow") -> Path:
    write_per_token(Path("r.pt"), passes, MAP)
    epsim.ok("import", "r.pt", "--from", "sglang-per-token", "-o", name, *options)
    return Path(name)


def cut(told: Told, end: int, num_prompt: int) -> Told:
    return Told(told.experts[:end], told.tokens[:end], num_prompt)


def test_chunked_and_mixed_prefill(epsim: Cli) -> None:
    # A's prompt in two chunks; then B's prompt in a pass in which A decodes; then both decode, B first.
    passes = records(
        (1, [(A, 0, 2)]), (1, [(A, 2, 3)]), (3, [(B, 0, 2), (A, 3, 4)]), (2, [(B, 2, 3), (A, 4, 5)]), (2, [(A, 5, 6)])
    )  # fmt: skip
    holds(imported(epsim, passes), [A, cut(B, 3, 2)], layer_ids=(1, 2))


def test_a_last_chunk_of_one_token_is_prompt(epsim: Cli) -> None:
    # B's prompt comes in chunks of 4 and 1 beside A, which decodes, so both are at position 4: five tokens, then one.
    passes = records(
        (1, [(A, 0, 3)]), (3, [(B, 0, 4), (A, 3, 4)]), (3, [(B, 4, 5), (A, 4, 5)]), (2, [(B, 5, 6), (A, 5, 6)])
    )  # fmt: skip
    holds(imported(epsim, passes), [A, Told(B.experts, B.tokens, 5)], layer_ids=(1, 2))


def test_mixed_passes_one_after_the_other(epsim: Cli) -> None:
    # C's prompt stands before B, which is at its first token after its prompt, and A: a prompt that goes on is first.
    c = Told(A.experts[1:4], A.tokens[:3] + 20, 3)
    passes = records((1, [(A, 0, 3)]), (3, [(B, 0, 3), (A, 3, 4)]), (3, [(c, 0, 3), (B, 3, 4), (A, 4, 5)]))
    holds(imported(epsim, passes), [cut(A, 5, 3), cut(B, 4, 3), c], layer_ids=(1, 2))


def test_mixed_passes_that_fit_in_no_way_or_several(epsim: Cli) -> None:
    twin = Told(B.experts, B.tokens, 3)
    command = ("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    # Both prompts have come to 3: either goes on by a token while the other decodes.
    passes = records((1, [(A, 0, 3), (twin, 0, 3)]), (3, [(A, 3, 4), (twin, 3, 4)]))
    write_per_token(Path("r.pt"), passes, MAP)
    for options in ((), ("--drop-unrecorded-prefix",)):
        said = epsim.fails(*command, *options)
        assert "an extend begins at 3, where 2 requests have come to; which goes on, and which decodes" in said
    # B was not recorded before: it decodes without a beginning, or with --drop-unrecorded-prefix begins here.
    c = Told(B.experts[:2], B.tokens[:2] + 20, 2)
    passes = records((1, [(A, 0, 3)]), (3, [(c, 0, 2), (B, 4, 5), (A, 3, 4)]))
    write_per_token(Path("r.pt"), passes, MAP)
    assert "no running requests have come to the positions of its 2 decoded tokens" in epsim.fails(*command)
    path = imported(epsim, passes, "--drop-unrecorded-prefix")
    holds(path, [cut(A, 4, 3), c, Told(B.experts[4:5], B.tokens[4:5], 1)], layer_ids=(1, 2))


def test_padded_tokens_are_left_out(epsim: Cli) -> None:
    passes = records((1, [(A, 0, 3)]), (2, [(A, 3, 4), (B, 5, 6)]))
    passes[1]["topk_ids_of_layer"][:, 1] = -1  # a row of a CUDA graph that holds nobody
    holds(imported(epsim, passes), [cut(A, 4, 3)], layer_ids=(1, 2))


def test_unrecorded_prefix(epsim: Cli) -> None:
    passes = records((1, [(A, 2, 5)]), (2, [(A, 5, 6)]))
    write_per_token(Path("r.pt"), passes, MAP)
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert "an extend begins at 2, where no request has come to" in said
    kept = Told(A.experts[2:], A.tokens[2:], 3)
    holds(imported(epsim, passes, "--drop-unrecorded-prefix"), [kept], layer_ids=(1, 2))
    path = imported(epsim, passes, "--passes-as-requests")
    holds(path, [Told(A.experts[2:5], A.tokens[2:5], 3), Told(A.experts[5:], A.tokens[5:], 1)], layer_ids=(1, 2))


def test_ranks_and_files(epsim: Cli) -> None:
    write_per_token(Path("0a.pt"), records((1, [(A, 0, 3)])), MAP)
    later = sglang_pass(7, 2, [(A, 3, 4)], MAP)
    write_per_token(Path("0b.pt"), [later, sglang_pass(8, 4, [(A, 0, 1)], MAP)], MAP)  # the second is idle
    write_per_token(Path("1.pt"), records((1, [(B, 0, 2)]), rank=1), MAP)
    command = ("--from", "sglang-per-token", "-o", "t.arrow")
    epsim.ok("import", "1.pt", "0a.pt", "0b.pt", *command)
    holds(Path("t.arrow"), [cut(A, 4, 3), cut(B, 2, 2)], layer_ids=(1, 2))
    assert "forward_pass_id: 0 after 7 on rank 0" in epsim.fails("import", "0b.pt", "0a.pt", *command)
    write_per_token(Path("2.pt"), records((1, [(B, 0, 2)]), rank=2), MAP)
    assert "rank 2 recorded the same tokens as rank 1" in epsim.fails("import", "1.pt", "2.pt", *command)


def test_map_from_a_placement(epsim: Cli) -> None:
    shifted = (MAP[1:] + 1) % 6
    fields: dict[str, Any] = {"layer_ids": (1, 2), "num_experts": 6, "num_devices": 7, "policy": ""}
    write_placement_file(Path("p.json"), PlacementFile(**fields, physical_to_logical_LP=shifted.astype(np.int32)))
    told = Told((ONE.experts + 1) % 6, ONE.tokens, 3)
    passes = records((1, [(ONE, 0, 3)]))
    holds(imported(epsim, passes, "--placement", "p.json"), [told], layer_ids=(1, 2))
    write_per_token(Path("r.pt"), passes, MAP[:, :6])
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "u.arrow", "--placement", "p.json")
    assert said.startswith(("--placement: has 7 slots", "r.pt: records[0]: topk_ids_of_layer"))


def test_ambiguous_requests_are_refused(epsim: Cli) -> None:
    # Two prompts of three tokens, of which one has ended: position 3 fits both.
    twin = Told(B.experts, B.tokens, 3)
    passes = records((1, [(A, 0, 3), (twin, 0, 3)]), (2, [(A, 3, 4)]))
    write_per_token(Path("r.pt"), passes, MAP)
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert "decoded token 0 at 3 may be of more than one request" in said
    passes = records((1, [(A, 0, 3), (twin, 0, 3)]), (1, [(A, 3, 5)]))
    write_per_token(Path("r.pt"), passes, MAP)
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert "an extend begins at 3, where 2 requests have come to" in said
    passes = records((1, [(A, 0, 3)]), (2, [(A, 4, 5)]))
    write_per_token(Path("r.pt"), passes, MAP)
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert "no running requests have come to the positions of its 1 decoded tokens" in said


# Damaged recordings: what is changed, and what is said.

Change = Callable[[dict[str, Any]], None]


def setting(*path: Any) -> Change:
    """Return a function that sets the entry at a path to the last argument."""
    *keys, last, value = path

    def change(content: dict[str, Any]) -> None:
        holder: Any = content
        for key in keys:
            holder = holder[key]
        holder[last] = value

    return change


def dropping(*path: Any) -> Change:
    *keys, last = path

    def change(content: dict[str, Any]) -> None:
        holder: Any = content
        for key in keys:
            holder = holder[key]
        del holder[last]

    return change


def topk(index: Any, value: int) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["records"][0]["topk_ids_of_layer"][index] = value

    return change


FIRST = ("records", 0)
PER_TOKEN_DAMAGE: list[tuple[Change, str]] = [
    (dropping("records"), "records is missing"),
    (setting("records", 3), "records: 3 is not a list"),
    (setting("records", []), "no pass has tokens"),
    (setting(*FIRST, 3), "records[0]: 3 is not a record"),
    (dropping("last_physical_to_logical_map"), "last_physical_to_logical_map is missing"),
    (setting("last_physical_to_logical_map", [[0, 1], [0]]), "last_physical_to_logical_map[1]: has 1 entries"),
    (setting("last_physical_to_logical_map", [[0, 1]]), "has 3 layers, last_physical_to_logical_map 1"),
    (setting("logical_count", 1), "import it with --from sglang-stat"),
    (dropping(*FIRST, "positions"), "records[0]: positions is missing"),
    (setting(*FIRST, "positions", [0, 1]), "records[0]: positions: has 2 tokens, topk_ids_of_layer 3"),
    (setting(*FIRST, "positions", [0, 2, 1]), "positions: 2 after 0 in one request"),
    (setting(*FIRST, "positions", [0, 1, -2]), "positions[2]: -2 is not from 0"),
    (setting(*FIRST, "input_ids", "abc"), 'input_ids: "abc" is not a list'),
    (setting(*FIRST, "extend_seq_lens", None), "extend_seq_lens: null is not a list"),
    (setting(*FIRST, "extend_seq_lens", [2]), "extend_seq_lens: 2 tokens in all, but 3 of 3"),
    (setting(*FIRST, "extend_seq_lens", [3, 0]), "extend_seq_lens[1]: 0 is not from 1"),
    (setting(*FIRST, "forward_mode", 6), "forward_mode: 6 is none of 1 (extend)"),
    (setting(*FIRST, "forward_mode", "1"), 'forward_mode: "1" is not a whole number'),
    (setting(*FIRST, "rank", None), "rank: null is not a whole number"),
    (dropping(*FIRST, "topk_ids_of_layer"), "records[0]: topk_ids_of_layer is missing"),
    (setting(*FIRST, "topk_ids_of_layer", [[1]]), "topk_ids_of_layer[0][0]: 1 is not a list"),
    (topk((1, 0, 1), -1), "[0][0][1]: -1 is not from 0 to 6"),
    (topk((1, 0, 1), 7), "[0][0][1]: 7 is not from 0 to 6"),
    (topk((2, 1), -1), "[1][1][0]: -1 is not from 0 to 6"),
    (topk((slice(None), slice(None), 0), -1), "columns [1] hold ids; they must be the first ones"),
    (topk((slice(None),), -1), "topk_ids_of_layer: is -1 throughout"),
    (topk((1, 0, slice(0, 2)), 3), "experts [2, 2] are not 2 different ones"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), PER_TOKEN_DAMAGE, ids=[rule[:40] for _, rule in PER_TOKEN_DAMAGE])
def test_damaged_per_token(epsim: Cli, change: Change, rule: str) -> None:
    import torch

    content: dict[str, Any] = {
        "records": records((1, [(ONE, 0, 3)])),
        "last_physical_to_logical_map": torch.tensor(MAP),
    }
    change(content)
    torch.save(content, "r.pt")
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert said.startswith("r.pt: ")
    assert rule in said


def test_a_recording_of_passes_is_not_of_tokens(epsim: Cli) -> None:
    import torch

    record = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.zeros(3, 7)}
    torch.save({"records": [record], "last_physical_to_logical_map": torch.tensor(MAP)}, "r.pt")
    said = epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")
    assert "recorded in mode per_pass; record in mode per_token" in said
    Path("r.pt").write_bytes(Path("r.pt").read_bytes()[:200])
    assert "is no file of torch.save" in epsim.fails("import", "r.pt", "--from", "sglang-per-token", "-o", "t.arrow")


def of_choice(value: Any) -> Change:
    return setting("choices", 0, "routed_experts", value)


ROWS = ONE.experts.tolist()
VLLM_DAMAGE: list[tuple[Change, str]] = [
    (of_choice(5), "choices[0]: routed_experts: 5 is not a list"),
    (of_choice([*ROWS[:2], [[0, 1]]]), "routed_experts[2]: has 1 entries, others 2"),
    (of_choice([[[0, 1]], [[0, "2"]]]), 'routed_experts[1][0][1]: "2" is not a whole number'),
    (of_choice([[0, 1]]), "routed_experts[0][0]: 0 is not a list"),
    (of_choice([*ROWS[:2], [[0, 9], [1, 2]]]), "token 2, layer 0: expert 9 is not from 0 to 5"),
    (of_choice([*ROWS[:2], [[0, 1], [2, 2]]]), "token 2, layer 1: experts [2, 2] are not 2 different ones"),
    (of_choice([*ROWS[:2], [[-1, -1], [-1, -1]]]), "token 2: has -1 after the cached prefix"),
    (of_choice([[[-1, -1]] * 2] * 3), "do not reach past a prompt of 2 tokens"),
    (of_choice(ROWS[:1]), "routed_experts: has 1 rows, prompt and generated tokens - 1 are 3"),
    (of_choice("!!"), "routed_experts: is text, but no .npy array as base64"),
    (of_choice("AAAA"), "routed_experts: is text, but no .npy array as base64"),
    (of_choice(npy_base64(ONE.experts.astype(np.float32))), "holds float32, not whole numbers"),
    (of_choice(npy_base64(np.array([None]))), "no .npy array as base64"),
    (of_choice(None), "choices[0]: routed_experts: is missing"),
    (of_choice([]), "choices[0]: routed_experts: is empty"),
    (setting("choices", []), "has no responses with a choice"),
    (setting("choices", 5), "choices: is not a list"),
    (setting("choices", [5]), "choices[0]: 5 is not a choice"),
    (setting("usage", "prompt_tokens", 3), "usage.prompt_tokens: 3 tokens, prompt_token_ids has 2"),
    (setting("prompt_token_ids", ["a"]), 'prompt_token_ids[0]: "a" is not a whole number'),
    (setting("prompt_routed_experts", [[[0]], [[1]]]), "has [layer][expert] [2, 2], prompt_routed_experts [1, 1]"),
    (
        lambda content: content["choices"][0].update(prompt_routed_experts=ROWS[:2]),
        "choices[0]: prompt_routed_experts: stands in a choice; write it in the response, beside the choices",
    ),
    (lambda content: [content.pop(key) for key in ("prompt_token_ids", "usage")] and None, "how long the prompt is"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "rule"), VLLM_DAMAGE, ids=[rule[:40] for _, rule in VLLM_DAMAGE])
def test_damaged_vllm(epsim: Cli, change: Change, rule: str) -> None:
    content = vllm_response(ONE, "newer")
    change(content)
    Path("r.jsonl").write_text("\n" + json.dumps(content) + "\n")
    said = epsim.fails("import", "r.jsonl", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    assert said.startswith("r.jsonl")
    assert rule in said


# ONE's prompt has two tokens and its answer two, of which the last is never routed: the newer form has three rows, the
# older one for the answer, or two.
NEWER = {"routed_experts": ROWS}
OLDER = {"routed_experts": ROWS[2:]}


@pytest.mark.parametrize(
    ("choices", "prompt", "completion_tokens", "rule"),
    [
        ([{**NEWER}], None, 2, ""),
        ([{**NEWER}], None, 9, "has 3 rows, prompt and generated tokens - 1 are 10"),
        ([{**NEWER}, {**NEWER}], None, 4, ""),  # of both together
        ([{**NEWER, "token_ids": [6, 7]}, {**NEWER, "token_ids": [6]}], None, 4, "choices[1]: routed_experts: has 3"),
        ([{**OLDER}], ROWS[:2], 1, ""),
        ([{**OLDER}], ROWS[:2], 2, ""),
        ([{**OLDER}], ROWS[:2], 5, "has 1 rows, generated tokens, perhaps without the last, are 4 or 5"),
        ([{**OLDER, "token_ids": [6, 7, 8, 9, 9]}], ROWS[:2], None, "has 1 rows, generated tokens, perhaps"),
        ([{"routed_experts": []}], ROWS[:2], 1, ""),
        ([{"routed_experts": []}], ROWS[:2], 2, "has 0 rows, generated tokens, perhaps without the last, are 1 or 2"),
    ],
)
def test_vllm_has_a_row_for_each_token(
    epsim: Cli, choices: list[dict[str, Any]], prompt: Any, completion_tokens: int | None, rule: str
) -> None:
    usage = {"prompt_tokens": 2} | ({} if completion_tokens is None else {"completion_tokens": completion_tokens})
    content = {"choices": choices, "usage": usage} | ({} if prompt is None else {"prompt_routed_experts": prompt})
    Path("r.json").write_text(json.dumps(content))
    command = ("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    assert rule in (epsim.fails(*command) if rule else epsim.ok(*command))


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("r.json", b"", "is not JSON"),
        ("r.json", b"[]", "[] is neither a response nor a list"),
        ("r.json", b"[3]", "[0]: 3 is not a response"),
        ("r.json", b"\xff\xfe", "not a text file in UTF-8"),
        ("r.jsonl", b"\n\n", "is empty"),
        ("r.jsonl", b'\n{"a": ', "line 2: is not JSON"),
        ("r.txt", b"{}", "ends in none of .json, .jsonl and .npz"),
        ("r.npz", b"PK\x03\x04", "no .npz file of plain arrays"),
        ("r.npz", b"garbage", "no .npz file of plain arrays"),
        ("r.npz", b"", "no .npz file of plain arrays"),
    ],
)
@pytest.mark.parametrize("source", ["vllm-routed-experts", "sglang-routed-experts"])
def test_files_of_responses_that_are_none(epsim: Cli, source: str, name: str, content: bytes, rule: str) -> None:
    Path(name).write_bytes(content)
    said = epsim.fails("import", name, "--from", source, "-o", "t.arrow", *SIX, "--topk", "2")
    assert said.startswith(name)
    assert rule in said or (source.startswith("sglang") and name == "r.npz")


def test_arrays_with_objects_are_not_opened(epsim: Cli) -> None:
    np.savez("r.npz", routed_experts=np.array([{"a": 1}], dtype=object))
    said = epsim.fails("import", "r.npz", "--from", "vllm-routed-experts", "-o", "t.arrow", *SIX)
    assert "no .npz file of plain arrays" in said


META = ("meta_info",)
SGLANG_DAMAGE: list[tuple[Change, str]] = [
    (setting(*META, "routed_experts", 5), "meta_info.routed_experts: 5 is not text"),
    (setting(*META, "routed_experts", "AAA"), "routed_experts: is not base64"),
    (setting(*META, "routed_experts", "ä!"), "routed_experts: is not base64"),
    (setting(*META, "routed_experts", "AAAA"), "3 bytes are not int32 for 3 tokens"),
    (setting(*META, "routed_experts", ""), "0 bytes are not int32 for 3 tokens"),
    (dropping(*META, "routed_experts"), "routed_experts: is missing; ask for it"),
    (dropping(*META, "prompt_tokens"), "meta_info.prompt_tokens: is missing"),
    (dropping(*META, "completion_tokens"), "meta_info.completion_tokens: is missing"),
    (setting(*META, "prompt_tokens", "2"), 'meta_info.prompt_tokens: "2" is not a whole number'),
    (setting(*META, "prompt_tokens", 0), "bytes are not int32 for 1 tokens"),
    (setting(*META, "completion_tokens", 9), "48 bytes are not int32 for 10 tokens"),
    (setting("prompt_token_ids", [[1]]), "prompt_token_ids[0]: [1] is not a whole number"),
]


@pytest.mark.parametrize(("change", "rule"), SGLANG_DAMAGE, ids=[rule[:40] for _, rule in SGLANG_DAMAGE])
def test_damaged_sglang_responses(epsim: Cli, change: Change, rule: str) -> None:
    content = sglang_response(ONE)
    change(content)
    Path("r.json").write_text(json.dumps(content))
    command = ("import", "r.json", "--from", "sglang-routed-experts", "-o", "t.arrow", *SIX)
    said = epsim.fails(*command, "--topk", "2")
    assert said.startswith("r.json: ")
    assert rule in said


def test_what_must_be_asked(epsim: Cli) -> None:
    Path("r.json").write_text(json.dumps(vllm_response(ONE, "newer")))
    write_placement_file(
        Path("p.json"),
        PlacementFile(
            layer_ids=(0,), num_experts=2, num_devices=1, physical_to_logical_LP=np.array([[0, 1]], np.int32), policy=""
        ),
    )
    for source in ("vllm-routed-experts", "sglang-routed-experts"):
        command = ("import", "r.json", "--from", source, "-o", "t.arrow")
        assert "write --num-experts or --model" in epsim.fails(*command)
        said = epsim.fails(*command, *SIX, "--placement", "p.json")
        assert said.startswith(f"--placement: has no meaning for {source}; leave it out")
    said = epsim.fails("import", "r.json", "--from", "sglang-routed-experts", "-o", "t.arrow", *SIX)
    assert "write --topk or --model" in said
    said = epsim.fails("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", "--model", "olmo")
    assert said.startswith('--model: "olmo" is not a preset')
    command = ("import", "r.json", "--from", "vllm-routed-experts", "-o", "t.arrow", "--model", "olmoe")
    assert epsim.fails(*command).startswith("r.json: choices[0]: has 2 layers, OLMoE-1B-7B-0125 has 16, up to 15")


def test_top_k_is_the_file_s(epsim: Cli) -> None:
    Path("r.json").write_text(json.dumps(vllm_response(ONE, "newer")))
    write_per_token(Path("r.pt"), records((1, [(ONE, 0, 3)])), MAP)
    for name, source, where in (
        ("r.json", "vllm-routed-experts", "r.json: choices[0]"),
        ("r.pt", "sglang-per-token", "r.pt: records[0]: topk_ids_of_layer"),
    ):
        command = ("import", name, "--from", source, "-o", "t.arrow")
        said = epsim.fails(*command, *SIX, "--topk", "3")
        assert said == f"{where}: has top-2, --topk or the model 3; write that number"
        card = ("--model", "moonlight", "--layer-ids", "1-2", "--num-experts", "6")
        assert "has top-2, --topk or the model 6" in epsim.fails(*command, *card)
        epsim.ok(*command, *card, "--topk", "2")
    said = epsim.fails(*command, "--passes-as-requests", "--drop-unrecorded-prefix")
    assert said.startswith("--drop-unrecorded-prefix: has no meaning with --passes-as-requests")


# FLAME-MoE.


def flame(epsim: Cli, *options: str) -> tuple[str, ...]:
    return ("import", "f", "--from", "flame-moe", "-o", "t.arrow", *SIX, *options)


def replace_layer(columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), "f/actives/iter_5473/layer_03/part-0.parquet")


def lists(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


GOOD_SCORES = [[0.5, 0.25]] * 3
GOOD_IDS = [[0, 1], [1, 2], [4, 5]]
SCORES = lists(GOOD_SCORES, pa.float16())
IDS = lists(GOOD_IDS, pa.int16())
FLAME_DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"indices": IDS}, "layer_03/part-0.parquet: the column scores is missing"),
    ({"indices": pa.array([1, 2, 3]), "scores": pa.array([1.0] * 3)}, "indices: is int64, not a list of numbers"),
    ({"indices": lists([[0, 1], [1], [4, 5]], pa.int16()), "scores": SCORES}, "rows have [1, 2]"),
    ({"indices": lists([[0, 1], None, [4, 5]], pa.int16()), "scores": SCORES}, "there are nulls"),
    ({"indices": lists([[0, 1], [1, None], [4, 5]], pa.int16()), "scores": SCORES}, "nulls"),
    ({"indices": lists(GOOD_SCORES, pa.float32()), "scores": SCORES}, "write whole numbers"),
    ({"indices": IDS, "scores": lists(GOOD_IDS, pa.int16())}, "scores: is int16; write float16"),
    ({"indices": IDS, "scores": lists([[0.5, -1.0]] * 3, pa.float16())}, "not finite, or negative"),
    ({"indices": IDS[:2], "scores": SCORES[:2]}, "layer_03/part-0.parquet: has 2 rows, f/samples/part"),
    ({"indices": lists([[0, 1], [1, 2], [4, 6]], pa.int16()), "scores": SCORES}, "expert 6 is not"),
    ({"indices": lists([[0, 1], [1, 1], [4, 5]], pa.int16()), "scores": SCORES}, "experts [1, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "rule"), FLAME_DAMAGE, ids=[rule[:40] for _, rule in FLAME_DAMAGE])
def test_damaged_flame(epsim: Cli, columns: dict[str, Any], rule: str) -> None:
    write_flame(Path("f"), ONE.experts, np.full((3, 2, 2), 0.5), ONE.tokens, num_files=1)
    replace_layer(columns)
    said = epsim.fails(*flame(epsim, "--request-tokens", "2"))
    assert said.startswith("f/")
    assert rule in said


def test_flame_files_are_the_same_everywhere(epsim: Cli) -> None:
    # Samples of one row and of two; the files of layer 3 as many, with as many rows in all.
    layer = Path("f/actives/iter_5473/layer_03")
    command = flame(epsim, "--request-tokens", "2")
    write_flame(Path("f"), ONE.experts, np.full((3, 2, 2), 0.5), ONE.tokens)
    epsim.ok(*command)
    first, second = layer / "part-0.parquet", layer / "part-1.parquet"
    first.rename(layer / "z.parquet")  # comes second
    said = epsim.fails(*command)
    assert said.startswith(f'{layer}: has the files ["part-1.parquet", "z.parquet"], the samples ["part-0.parquet", "p')
    second.rename(first)
    (layer / "z.parquet").rename(second)
    assert epsim.fails(*command).startswith(f"{first}: has 2 rows, f/samples/part-0.parquet 1; copy all of both")
    first.rename(layer.with_suffix(".parquet"))
    second.unlink()
    layer.rmdir()
    assert f"{layer.with_suffix('.parquet')}: is 1 files, the samples are 2" in epsim.fails(*command)


def test_flame_with_a_file_for_each_name(epsim: Cli) -> None:
    write_flame(Path("f"), ONE.experts, np.full((3, 2, 2), 0.5), ONE.tokens, num_files=1)
    for folder in (Path("f/samples"), *Path("f/actives/iter_5473").iterdir()):
        (folder / "part-0.parquet").rename(folder.with_suffix(".parquet"))
        folder.rmdir()
    epsim.ok(*flame(epsim, "--request-tokens", "3"))
    holds(Path("t.arrow"), [Told(ONE.experts, ONE.tokens, 3)], layer_ids=(2, 3))


def test_flame_asks_for_what_it_lacks(epsim: Cli) -> None:
    assert "f: is not a folder" in epsim.fails(*flame(epsim))
    Path("f").mkdir()
    assert "write --request-tokens" in epsim.fails(*flame(epsim))
    options = ("--request-tokens", "2")
    assert "f/actives: is not there" in epsim.fails(*flame(epsim, *options))
    Path("f/actives").mkdir()
    assert "has no iter_N" in epsim.fails(*flame(epsim, *options))
    Path("f/actives/iter_9").mkdir()
    assert "has no layer_NN" in epsim.fails(*flame(epsim, *options))
    write_flame(Path("f"), ONE.experts, np.full((3, 2, 2), 0.5), ONE.tokens)
    assert "has the checkpoints 9, 5473" in epsim.fails(*flame(epsim, *options))
    assert "--iteration 8: f/actives has 9, 5473" in epsim.fails(*flame(epsim, *options, "--iteration", "8"))
    epsim.ok(*flame(epsim, *options, "--iteration", "5473"))
    epsim.ok("import", "f", "--from", "flame-moe", "-o", "e.arrow", *options, "--iteration", "5473")
    assert TraceFile.open("e.arrow").meta.num_experts == 64  # unless something else is said
    said = epsim.fails(*flame(epsim, *options, "--iteration", "5473", "--layer-ids", "7-8"))
    assert said.startswith("f/actives/iter_5473: has layers 2-3, --layer-ids or the model 7-8; leave --layer-ids out")
    said = epsim.fails(*flame(epsim, *options, "--iteration", "5473", "--topk", "3"))
    assert "layer_02/part-0.parquet: indices: has top-2, --topk or the model 3; write that number" in said
    Path("f/samples/part-1.parquet").write_bytes(b"PAR1 cut off")
    Path("t.arrow").unlink()
    said = epsim.fails(*flame(epsim, *options, "--iteration", "5473"))
    assert "f/samples/part-1.parquet: is not a Parquet file, or damaged" in said

"""Files of other systems as those write them, for tests: recordings of SGLang, vLLM, TensorRT-LLM and FLAME-MoE.

`Story` is what a recording tells: requests with their experts. `run_cli` runs the command line in this process.
"""

import base64
import io
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epsim import cli


@dataclass(frozen=True)
class Told:
    """A request: experts [T, L, K] of the tokens that were routed, token ids [T], tokens of the prompt."""

    experts: np.ndarray
    tokens: np.ndarray
    num_prompt: int


def story(seed: int, *, num_layers: int = 2, num_experts: int = 6, topk: int = 2, num_requests: int = 3) -> list[Told]:
    """Return requests with prompts of 1 to 4 tokens and 0 to 3 decoded ones."""
    rng = np.random.default_rng(seed)
    told = []
    for _ in range(num_requests):
        num_prompt, num_decoded = int(rng.integers(1, 5)), int(rng.integers(0, 4))
        size = num_prompt + num_decoded
        experts = np.argsort(rng.random((size, num_layers, num_experts)), axis=2)[:, :, :topk]
        told.append(Told(experts=experts, tokens=rng.integers(0, 9, size), num_prompt=num_prompt))
    return told


def npy_base64(array: np.ndarray) -> str:
    """Return an .npy file as base64, as vLLM's server writes arrays."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def vllm_response(told: Told, form: str) -> dict[str, Any]:
    """Return a response: form "older" (two arrays), "newer" (one), or "base64" (one, of a server)."""
    experts, n = told.experts.astype(np.int16), told.num_prompt
    response: dict[str, Any] = {"prompt_token_ids": told.tokens[:n].tolist(), "system_fingerprint": "vllm-0.21.0"}
    choice: dict[str, Any] = {"index": 0, "token_ids": [*told.tokens[n:].tolist(), 7]}  # the last is not routed
    if form == "older":
        response["prompt_routed_experts"] = experts[:n].tolist()
        choice["routed_experts"] = experts[n:].tolist()
    else:
        choice["routed_experts"] = experts.tolist() if form == "newer" else npy_base64(experts)
    return {**response, "choices": [choice], "usage": {"prompt_tokens": n}}


def sglang_response(told: Told) -> dict[str, Any]:
    """Return a response of SGLang's own API, with the prompt's token ids kept beside it."""
    n = told.num_prompt
    return {
        "prompt_token_ids": told.tokens[:n].tolist(),
        "output_ids": [*told.tokens[n:].tolist(), 7],
        "meta_info": {
            "prompt_tokens": n,
            "completion_tokens": len(told.tokens) - n + 1,
            "routed_experts": base64.b64encode(told.experts.astype("<i4").tobytes()).decode(),
        },
    }


def sglang_pass(
    pass_id: int, mode: int, parts: list[tuple[Told, int, int]], map_LP: np.ndarray, *, rank: int = 0, dense: int = 1
) -> dict[str, Any]:
    """Return a record of mode per_token: the tokens from `start` to `end` of each request, as physical ids.

    map_LP has `dense` rows more at its beginning; ids are 8 wide and -1 where there are none.
    """
    import torch

    tokens = [t for told, start, end in parts for t in told.tokens[start:end].tolist()]
    positions = [p for _, start, end in parts for p in range(start, end)]
    experts = np.concatenate([told.experts[start:end] for told, start, end in parts])
    wide = np.full((len(map_LP), len(tokens), 8), -1, dtype=np.int32)
    for t, layer, k in np.ndindex(*experts.shape):
        slots = np.flatnonzero(map_LP[layer + dense] == experts[t, layer, k])
        wide[layer + dense, t, k] = slots[t % len(slots)]  # any replica
    return {
        "forward_pass_id": pass_id,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": tokens,
        "positions": positions,
        "extend_seq_lens": None if mode == 2 else [end - start for _, start, end in parts],
        "forward_mode": mode,
        "topk_ids_of_layer": torch.from_numpy(wide),
        "misc_objects": [],
    }


def sglang_records(told: list[Told], map_LP: np.ndarray) -> list[dict[str, Any]]:
    """Return the passes of a batch: all prompts in one, then decoding until each has ended, in the batch's order."""
    records = [sglang_pass(10, 1, [(one, 0, one.num_prompt) for one in told], map_LP)]
    step = 0
    while running := [one for one in told if one.num_prompt + step < len(one.tokens)]:
        parts = [(one, one.num_prompt + step, one.num_prompt + step + 1) for one in running]
        records.append(sglang_pass(11 + step, 2, parts, map_LP))
        step += 1
    return records


def write_per_token(path: Path, records: list[dict[str, Any]], map_LP: np.ndarray) -> None:
    """Write a file of the recorder in mode per_token."""
    import torch

    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(map_LP.astype(np.int64))}, path)


def write_stat(path: Path, count_NLE: np.ndarray) -> None:
    """Write a file of the recorder in mode stat."""
    import torch

    count = torch.from_numpy(count_NLE.astype(np.int32))
    torch.save({"rank": 0, "logical_count": count, "average_utilization_rate_over_window": None}, path)


def write_statistics(folder: Path, ranks: list[dict[str, np.ndarray]], num_experts: int, topk: int) -> None:
    """Write a folder of TensorRT-LLM's expert statistics."""
    from safetensors.numpy import save_file

    folder.mkdir()
    meta = {"num_experts": num_experts, "num_experts_per_token": topk}
    (folder / "meta_info.json").write_text(json.dumps(meta))
    for r, tensors in enumerate(ranks):
        save_file(tensors, folder / f"rank{r}.safetensors")


def write_flame(
    folder: Path,
    experts: np.ndarray,
    scores: np.ndarray,
    tokens: np.ndarray,
    *,
    first: int = 2,
    name: str = "iter_5473",
    num_files: int = 2,
) -> None:
    """Write FLAME-MoE's folders: experts and scores [T, L, K], as many Parquet files of samples as of each layer."""
    active, samples = folder / "actives" / name, folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    bounds = np.linspace(0, len(tokens), num_files + 1).astype(int)
    parts = [slice(start, end) for start, end in pairwise(bounds)]
    for i, part in enumerate(tokens[part] for part in parts):
        pq.write_table(pa.table({"token_id": pa.array(part, pa.int32())}), samples / f"part-{i}.parquet")
    for layer in range(experts.shape[1]):
        into = active / f"layer_{first + layer:02d}"
        into.mkdir(parents=True)
        for i, part in enumerate(parts):
            columns = {
                "scores": pa.array(list(scores[part, layer].astype(np.float16)), pa.list_(pa.float16())),
                "indices": pa.array(experts[part, layer].tolist(), pa.list_(pa.int16())),
            }
            pq.write_table(pa.table(columns), into / f"part-{i}.parquet", row_group_size=3)


class Cli:
    """Runs the command line in this process; `ok` and `fails` return what it says on stderr."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.chdir(folder)

    def _run(self, arguments: tuple[str, ...]) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["epsim", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self._capsys.readouterr()
        assert printed.out == ""
        return ended.value.code or 0, printed.err

    def ok(self, *arguments: str) -> str:
        code, said = self._run(arguments)
        assert code == 0, said
        return said

    def fails(self, *arguments: str) -> str:
        """Assert exit code 2, one line, and no file written; return the line."""
        before = {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}
        code, said = self._run(arguments)
        assert code == 2, said
        assert {
            path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()
        }.items() <= before.items()
        assert said.startswith("epsim: ")
        assert len(said.splitlines()) == 1, said
        return said.removeprefix("epsim: ").rstrip("\n")

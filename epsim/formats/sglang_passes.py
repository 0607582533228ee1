"""Forward passes in the files of SGLang's recorder in mode `per_token`: `Recorded`, read by `read_passes`.

Letters: T tokens of a pass, L MoE layers, K top-k, P physical experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epsim.errors import FormatError
from epsim.formats.options import Options, check_experts, check_topk, choose_layers
from epsim.formats.reading import Ints, field, in_range, ints, mapping, whole
from epsim.formats.torch_file import load_torch, tensor
from epsim.scenario.describe import show

EXTEND, DECODE, MIXED, IDLE = 1, 2, 3, 4
_NOUN = "a file of SGLang's recorder in mode per_token"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A forward pass on a rank: tokens that were routed, in the order of the batch.

    input_ids_T, position_T: int64. extend_lens: tokens of each request of an extend, () in decode.
    ids_TLK: logical experts.
    """

    where: str
    pass_id: int
    mode: int
    input_ids_T: Ints
    position_T: Ints
    extend_lens: tuple[int, ...]
    ids_TLK: Ints


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Passes by rank, ascending, without idle ones; and what they share."""

    passes: dict[int, list[Pass]]
    layer_ids: tuple[int, ...]
    num_experts: int
    topk: int


@dataclass(frozen=True, kw_only=True, eq=False)
class _Raw:
    where: str
    rank: int
    fields: dict[str, Any]
    mode: int
    physical_LTX: Ints
    map_LP: Ints


def read_passes(paths: list[Path], options: Options) -> Recorded:
    """Return what the files of one or more ranks hold; several files of a rank follow each other."""
    raws = [raw for path in paths for raw in _records(path)]
    if not raws:
        raise FormatError(f"{paths[0]}: no pass has tokens; nothing was recorded")
    for raw in raws:
        if raw.physical_LTX.shape[0] != len(raws[0].map_LP) or raw.map_LP.shape != raws[0].map_LP.shape:
            raise FormatError(
                f"{raw.where}: topk_ids_of_layer: has {raw.physical_LTX.shape[0]} layers, last_physical_to_logical_map "
                f"{len(raws[0].map_LP)}; import recordings of one server at a time"
            )
    rows, layer_ids = _layers(raws, options)
    topk = _topk(raws, rows)
    check_topk(topk, options, f"{raws[0].where}: topk_ids_of_layer")
    num_experts = int(max(raw.map_LP.max() for raw in raws)) + 1
    check_experts(num_experts, options, f"{paths[0]}: last_physical_to_logical_map")
    passes: dict[int, list[Pass]] = {}
    for raw in raws:
        of_rank = passes.setdefault(raw.rank, [])
        of_rank.append(_pass(raw, rows, layer_ids, topk, options))
        if len(of_rank) > 1 and of_rank[-2].pass_id >= of_rank[-1].pass_id:
            raise FormatError(
                f"{raw.where}: forward_pass_id: {of_rank[-1].pass_id} after {of_rank[-2].pass_id} on rank {raw.rank}; "
                "name the files of a rank in the order of their recording, and each once"
            )
    _refuse_copies(passes)
    return Recorded(passes=dict(sorted(passes.items())), layer_ids=layer_ids, num_experts=num_experts, topk=topk)


def _records(path: Path) -> list[_Raw]:
    fields = mapping(load_torch(path, _NOUN), str(path), "a mapping")
    if "logical_count" in fields:
        raise FormatError(f"{path}: logical_count: it was recorded in mode stat; import it with --from sglang-stat")
    records = field(fields, "records", str(path))
    if not isinstance(records, list):
        raise FormatError(f"{path}: records: {show(records)} is not a list; write {_NOUN}")
    where = f"{path}: last_physical_to_logical_map"
    map_LP = ints(tensor(field(fields, "last_physical_to_logical_map", str(path))), ("layer", "slot"), where)
    in_range(map_LP, 0, 65535, where, "write a logical expert for each physical one")
    raws = [_record(record, map_LP, f"{path}: records[{i}]") for i, record in enumerate(records)]
    return [raw for raw in raws if raw.mode != IDLE and raw.physical_LTX.shape[1]]


def _record(record: object, map_LP: Ints, where: str) -> _Raw:
    fields = mapping(record, where, "a record (a mapping)")
    if "topk_ids_of_layer" not in fields and "global_physical_count" in fields:
        raise FormatError(f"{where}: topk_ids_of_layer is missing: recorded in mode per_pass; record in mode per_token")
    mode = whole(field(fields, "forward_mode", where), f"{where}: forward_mode")
    if mode not in (EXTEND, DECODE, MIXED, IDLE):
        raise FormatError(
            f"{where}: forward_mode: {mode} is none of 1 (extend), 2 (decode), 3 (mixed), 4 (idle); "
            "record without speculative decoding"
        )
    rank = whole(field(fields, "rank", where), f"{where}: rank")
    value = tensor(field(fields, "topk_ids_of_layer", where))
    physical_LTX = ints(value, ("layer", "token", "expert"), f"{where}: topk_ids_of_layer")
    return _Raw(where=where, rank=rank, fields=fields, mode=mode, physical_LTX=physical_LTX, map_LP=map_LP)


def _layers(raws: list[_Raw], options: Options) -> tuple[list[int], tuple[int, ...]]:
    """Return the rows of MoE layers and their ids: row i is layer i, and dense layers are -1 throughout."""
    num_rows = len(raws[0].map_LP)
    if options.known_layer_ids is not None:
        return choose_layers(num_rows, options, f"{raws[0].where}: topk_ids_of_layer")
    routed_L = np.zeros(num_rows, dtype=bool)
    for raw in raws:
        routed_L |= (raw.physical_LTX >= 0).any(axis=(1, 2))
    rows = [int(row) for row in np.flatnonzero(routed_L)]
    if not rows:
        raise FormatError(f"{raws[0].where}: topk_ids_of_layer: is -1 throughout; nothing was recorded")
    return rows, tuple(rows)


def _topk(raws: list[_Raw], rows: list[int]) -> int:
    """Return K: columns that are -1 throughout are not there, and none of them stands before one that is."""
    width = raws[0].physical_LTX.shape[2]
    used_X = np.zeros(width, dtype=bool)
    for raw in raws:
        if raw.physical_LTX.shape[2] != width:
            raise FormatError(
                f"{raw.where}: topk_ids_of_layer: rows have {raw.physical_LTX.shape[2]} ids, others {width}; "
                "import recordings of one server at a time"
            )
        used_X |= (raw.physical_LTX[rows] != -1).any(axis=(0, 1))
    topk = int(used_X.sum())
    if not topk or not used_X[:topk].all():
        raise FormatError(
            f"{raws[0].where}: topk_ids_of_layer: columns {np.flatnonzero(used_X).tolist()} hold ids; they must be "
            "the first ones"
        )
    return topk


def _pass(raw: _Raw, rows: list[int], layer_ids: tuple[int, ...], topk: int, options: Options) -> Pass:
    """Return the pass without rows of padding, with logical experts."""
    where, fields = raw.where, raw.fields
    num_tokens = raw.physical_LTX.shape[1]
    columns: dict[str, Ints] = {}
    for name in ("input_ids", "positions"):
        columns[name] = ints(tensor(field(fields, name, where)), ("token",), f"{where}: {name}")
        if len(columns[name]) != num_tokens:
            raise FormatError(
                f"{where}: {name}: has {len(columns[name])} tokens, topk_ids_of_layer {num_tokens}; write one per token"
            )
    in_range(columns["positions"], 0, 2**31 - 1, f"{where}: positions", "positions count from 0")
    physical_TLK = raw.physical_LTX[rows, :, :topk].transpose(1, 0, 2)
    padding_T = (physical_TLK == -1).all(axis=(1, 2))
    kept_T = ~padding_T
    in_range(
        physical_TLK[kept_T], 0, raw.map_LP.shape[1] - 1, f"{where}: topk_ids_of_layer, by [token][layer][k], ",
        "write a physical expert, or -1 in the whole row of a padded token",
    )  # fmt: skip
    lens = _extend_lens(raw, padding_T)
    map_LP = _map(raw, rows, layer_ids, options)
    logical_TLK = map_LP[np.arange(len(rows))[:, None], physical_TLK[kept_T]]
    return Pass(
        where=where,
        pass_id=whole(field(fields, "forward_pass_id", where), f"{where}: forward_pass_id", high=2**62),
        mode=raw.mode,
        input_ids_T=columns["input_ids"][kept_T],
        position_T=columns["positions"][kept_T],
        extend_lens=lens,
        ids_TLK=logical_TLK,
    )


def _extend_lens(raw: _Raw, padding_T: NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the lengths of the requests of an extend; their tokens come first, then at most padding."""
    if raw.mode == DECODE:
        return ()
    where = f"{raw.where}: extend_seq_lens"
    value = field(raw.fields, "extend_seq_lens", raw.where)
    lens_Q = ints(tensor(value), ("request",), where)
    in_range(lens_Q, 1, 2**31 - 1, where, "a request extends by one token or more")
    total = int(lens_Q.sum())
    if total > len(padding_T) or padding_T[:total].any() or not padding_T[total:].all():
        raise FormatError(
            f"{where}: {total} tokens in all, but {int((~padding_T).sum())} of {len(padding_T)} tokens have experts; "
            "lengths must add up to those, in order"
        )
    return tuple(int(n) for n in lens_Q)


def _map(raw: _Raw, rows: list[int], layer_ids: tuple[int, ...], options: Options) -> Ints:
    """Return [L, P], the logical expert of each physical one: from --placement, else as the file says."""
    placement = options.placement
    if placement is None:
        return raw.map_LP[rows]
    if missing := sorted(set(layer_ids) - set(placement.layer_ids)):
        raise FormatError(
            f"--placement: has no layer {missing[0]}, which was recorded; name the placement of the server"
        )
    if placement.physical_to_logical_LP.shape[1] != raw.map_LP.shape[1]:
        raise FormatError(
            f"--placement: has {placement.physical_to_logical_LP.shape[1]} slots, the server had {raw.map_LP.shape[1]} "
            "physical experts; name the placement of the server"
        )
    index = [placement.layer_ids.index(layer_id) for layer_id in layer_ids]
    return placement.physical_to_logical_LP[index].astype(np.int64)


def _refuse_copies(passes: dict[int, list[Pass]]) -> None:
    """Raise FormatError if two ranks recorded the same tokens, as those of tensor-parallel attention do."""
    seen: dict[tuple[tuple[int, bytes, bytes], ...], int] = {}
    for rank, of_rank in passes.items():
        signature = tuple((p.pass_id, p.input_ids_T.tobytes(), p.position_T.tobytes()) for p in of_rank)
        if signature in seen:
            raise FormatError(
                f"{of_rank[0].where}: rank {rank} recorded the same tokens as rank {seen[signature]}, as ranks of "
                "tensor-parallel attention do; name the file of one of them"
            )
        seen[signature] = rank

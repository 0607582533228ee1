"""FLAME-MoE's public traces: Parquet `actives/iter_N/layer_NN` (scores, indices) and `samples` (token_id), row by row.

iter_N is a checkpoint of the training, and all of them saw the same samples. Rows have no bounds of
requests. A folder of Parquet files, or one such file, may stand for each name; files of a name are those of the others,
row by row, so that no order of shards can pair other rows. Letters: T rows, L MoE layers, K top-k.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from epsim.errors import FormatError
from epsim.formats.options import Options, check_experts, check_layer_ids, check_topk
from epsim.formats.reading import Ints
from epsim.formats.routed_requests import Recording, RoutedRequest, write_requests
from epsim.scenario.describe import show

NAME = "flame-moe"
NUM_EXPERTS = 64
_NOUN = "a folder with actives/iter_N/layer_NN and samples"
_ITERATION = re.compile(r"iter_(\d{1,9})")
_LAYER = re.compile(r"layer_(\d{1,4})(?:\.parquet)?")


def read(paths: list[Path], output: Path, options: Options) -> list[str]:
    """Write the trace of a checkpoint: each `request_tokens` rows are a request, all of it prompt."""
    if len(paths) != 1:
        raise FormatError(f"{paths[1]}: {NAME} is one folder; import them one by one")
    folder = paths[0]
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not a folder; write the path of {_NOUN}")
    if options.request_tokens is None:
        raise FormatError(f"{folder}: its rows have no bounds of requests; write --request-tokens, e.g. 2048")
    iteration, active = _iteration(folder / "actives", options)
    layers = _layers(active)
    layer_ids = tuple(sorted(layers))
    check_layer_ids(layer_ids, options, str(active))
    num_experts = options.known_num_experts or NUM_EXPERTS
    check_experts(num_experts, options, str(active))
    samples = folder / "samples" / active.name if (folder / "samples" / active.name).exists() else folder / "samples"
    sources = [_files(samples), *(_files(layers[layer_id]) for layer_id in layer_ids)]
    _check_rows([samples, *(layers[layer_id] for layer_id in layer_ids)], sources)
    topk = _first_topk(sources[1][0])
    check_topk(topk, options, f"{sources[1][0]}: indices")
    recording = Recording(
        layer_ids=layer_ids,
        num_experts=num_experts,
        topk=topk,
        with_token_ids=True,
        about={"system": "FLAME-MoE", "format": NAME, "files": [folder.name], "version": f"checkpoint iter_{iteration}"}
        | {"requests": f"each {options.request_tokens} rows"},
    )
    return write_requests(output, recording, _requests(sources, topk, options.request_tokens), options)


def _iteration(folder: Path, options: Options) -> tuple[int, Path]:
    """Return the checkpoint to take: the one that --iteration names, or the only one."""
    if not folder.is_dir():
        raise FormatError(f"{folder}: is not there; write the path of {_NOUN}")
    found = {int(match[1]): path for path in folder.iterdir() if (match := _ITERATION.fullmatch(path.name))}
    listed = ", ".join(map(str, sorted(found)))
    if not found:
        raise FormatError(f"{folder}: has no iter_N; write the path of {_NOUN}")
    if options.iteration is None:
        if len(found) > 1:
            raise FormatError(f"{folder}: has the checkpoints {listed}, each a model of its own; write --iteration")
        return next(iter(found.items()))
    if options.iteration not in found:
        raise FormatError(f"--iteration {options.iteration}: {folder} has {listed}; write one of them")
    return options.iteration, found[options.iteration]


def _layers(folder: Path) -> dict[int, Path]:
    layers: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _LAYER.fullmatch(path.name):
            if int(match[1]) in layers:
                raise FormatError(f"{path}: layer {int(match[1])} is there twice; leave one")
            layers[int(match[1])] = path
    if not layers:
        raise FormatError(f"{folder}: has no layer_NN; write the path of {_NOUN}")
    return layers


def _files(path: Path) -> list[Path]:
    """Return the Parquet files that stand for a name, in order."""
    beside = path.with_name(f"{path.name}.parquet")
    single = [file for file in (path, beside) if file.is_file()][:1]
    files = sorted(path.glob("*.parquet")) if path.is_dir() else single
    if not files:
        raise FormatError(f"{path}: has no Parquet file; write the path of {_NOUN}")
    return files


def _check_rows(names: list[Path], sources: list[list[Path]]) -> None:
    """Raise FormatError unless each layer has the files of the samples: by their names, if in a folder, and rows."""
    samples = [_open(file).metadata.num_rows for file in sources[0]]
    if not sum(samples):
        raise FormatError(f"{names[0]}: has 0 rows; copy all of it")
    for name, files in zip(names[1:], sources[1:], strict=True):
        in_folders = name.is_dir() and names[0].is_dir()
        here, there = ([file.name for file in group] if in_folders else len(group) for group in (files, sources[0]))
        if here != there:
            raise FormatError(
                f"{name}: has the files {show(here)}, the samples {show(there)}; rows go file by file, copy all of both"
                if in_folders
                else f"{name}: is {here} files, the samples are {there}; rows go file by file, write as many of both"
            )
        for file, of_samples, size in zip(files, sources[0], samples, strict=True):
            if (found := _open(file).metadata.num_rows) != size:
                raise FormatError(f"{file}: has {found} rows, {of_samples} {size}; copy all of both")


def _first_topk(file: Path) -> int:
    with _parquet_errors(file):
        first = next(_open(file, ["indices"]).iter_batches(batch_size=1, columns=["indices"]), None)
        if first is None:
            raise FormatError(f"{file}: has no rows; leave it out")
        lists = first.column(0)
        if not pa.types.is_list(lists.type) and not pa.types.is_fixed_size_list(lists.type):
            raise FormatError(f"{file}: indices: is {lists.type}, not a list of numbers; write list<int16>")
        return max(1, len(lists[0]) if lists[0].is_valid else 0)


def _requests(sources: list[list[Path]], topk: int, size: int) -> Iterator[RoutedRequest]:
    """Yield a request per `size` rows; memory for one at a time."""
    tokens = _pieces(sources[0], ["token_id"], size)
    layers = [_pieces(files, ["indices", "scores"], size) for files in sources[1:]]
    for i, (where, sample) in enumerate(tokens):
        pieces = [next(layer) for layer in layers]
        token_id_T = _numbers(sample.column("token_id"), "iu", f"{where}: token_id")
        yield RoutedRequest(
            where=f"{pieces[0][0]}: request {i}",
            ids_TLK=np.stack([_wide(p, "indices", "iu", topk, w).astype(np.int64) for w, p in pieces], axis=1),
            num_prompt=len(token_id_T),
            token_id_T=token_id_T.astype(np.int64),
            gate_weights_TLK=np.stack([_weights(p, topk, w) for w, p in pieces], axis=1),
        )


def _pieces(files: list[Path], columns: list[str], size: int) -> Iterator[tuple[str, Any]]:
    """Yield file and table of `size` rows each, the last perhaps shorter."""
    pending: list[Any] = []
    rows = 0
    for file in files:
        with _parquet_errors(file):
            for batch in _open(file, columns).iter_batches(batch_size=size, columns=columns):
                pending.append(batch)
                rows += batch.num_rows
                while rows >= size:
                    table = pa.Table.from_batches(pending).combine_chunks()
                    yield str(file), table.slice(0, size)
                    pending, rows = table.slice(size).to_batches(), rows - size
    if rows:
        yield str(files[-1]), pa.Table.from_batches(pending).combine_chunks()


def _open(file: Path, columns: list[str] | None = None) -> Any:
    with _parquet_errors(file):
        opened = pq.ParquetFile(file)
        if missing := [name for name in columns or () if name not in opened.schema_arrow.names]:
            raise FormatError(f"{file}: the column {missing[0]} is missing; write {_NOUN}")
        return opened


def _wide(table: Any, name: str, kinds: str, topk: int, where: str) -> NDArray[Any]:
    """Return [T, K] of a column of lists."""
    place = f"{where}: {name}"
    column = table.column(name).combine_chunks()
    if not pa.types.is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
        raise FormatError(f"{place}: is {column.type}, not a list of numbers; write list<int16> and list<float16>")
    if column.null_count:
        raise FormatError(f"{place}: there are nulls; write {topk} numbers in each row")
    sizes = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
    if sizes.tolist() != [topk]:
        raise FormatError(f"{place}: rows have {sizes.tolist()} numbers; write {topk} in each")
    return _numbers(column.flatten(), kinds, place).reshape(-1, topk)


def _weights(table: Any, topk: int, where: str) -> NDArray[np.float16]:
    scores_TK = _wide(table, "scores", "f", topk, where).astype(np.float16)
    if not (np.isfinite(scores_TK) & (scores_TK >= 0)).all():
        raise FormatError(f"{where}: scores: there are some that are not finite, or negative; write the router's own")
    return scores_TK


def _numbers(column: Any, kinds: str, where: str) -> Ints | NDArray[Any]:
    if column.null_count:
        raise FormatError(f"{where}: there are nulls; write a number in each row")
    array: NDArray[Any] = (
        column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    )
    if array.dtype.kind not in kinds:
        raise FormatError(f"{where}: is {column.type}; write {'whole numbers' if 'i' in kinds else 'float16'}")
    return array


@contextmanager
def _parquet_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{file}: is not a Parquet file, or damaged; copy it again") from error

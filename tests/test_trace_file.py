"""Traces on disk: round trips, zero copies, damaged and foreign files, Parquet, memory."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from epsim.errors import OutputError, TraceError
from epsim.trace import RoutingTrace, TraceMeta, TraceShape, check_trace, concatenate
from epsim.trace.file import TraceFile, TraceWriter, copy_trace, export_parquet, sample_trace
from epsim.trace.synthetic import SyntheticWorkload, uniform

SHAPE = TraceShape(layer_ids=(1, 2, 5), num_experts=8, topk=2)
WORKLOAD = SyntheticWorkload(num_requests=5, num_vision_tokens=4, num_text_tokens=3, num_decode_tokens=2)


def full_trace() -> RoutingTrace:
    """45 rows with every column there can be, ordered as captured: all prefill rows, then step by step."""
    trace = concatenate(list(uniform(SHAPE, WORKLOAD, seed=1)))
    rng = np.random.default_rng(2)
    trace = dataclasses.replace(
        trace,
        gate_weights_TLK=rng.random((45, 3, 2)).astype(np.float16),
        token_id_T=rng.integers(0, 1000, 45).astype(np.int32),
        modality_scores={"attention": rng.random((45, 3)).astype(np.float16)},
    )
    return trace.take(np.lexsort((trace.position_T, trace.request_id_T, trace.step_T)))


def assert_same(found: RoutingTrace, expected: RoutingTrace) -> None:
    assert found.meta == expected.meta
    assert list(found.columns()) == list(expected.columns())
    for name, array in expected.columns().items():
        assert found.columns()[name].dtype == array.dtype
        np.testing.assert_array_equal(found.columns()[name], array)
    assert list(found.modality_scores) == list(expected.modality_scores)
    for name, array in expected.modality_scores.items():
        np.testing.assert_array_equal(found.modality_scores[name], array)


def write(path: Path, trace: RoutingTrace, **options: object) -> Path:
    with TraceWriter(path, trace.meta, **options) as writer:  # type: ignore[arg-type]
        writer.write(trace)
    return path


def write_pieces(path: Path, pieces: list[RoutingTrace], **options: object) -> None:
    with TraceWriter(path, pieces[0].meta, **options) as writer:  # type: ignore[arg-type]
        for piece in pieces:
            writer.write(piece)


def write_and_fail(path: Path, trace: RoutingTrace) -> None:
    with TraceWriter(path, trace.meta, batch_rows=4) as writer:
        writer.write(trace)
        raise RuntimeError("stop")


def write_table(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def read_all(path: Path) -> RoutingTrace:
    trace = TraceFile.open(path)
    whole = concatenate(list(trace.batches()))
    trace.select(trace.requests.request_id_Q)
    return whole


def error_of(path: Path) -> str | None:
    try:
        read_all(path)
    except TraceError as error:
        return str(error)
    return None


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("batch_rows", [1, 7, 65536])
def test_round_trip(tmp_path: Path, compression: str | None, batch_rows: int) -> None:
    trace = full_trace()
    path = write(tmp_path / "a.arrow", trace, compression=compression, batch_rows=batch_rows)
    file = TraceFile.open(path)
    check_trace(file)
    assert_same(concatenate(list(file.batches())), trace)
    assert_same(file.select([3, 0, 4]), trace.select([3, 0, 4]))
    assert file.select([]).num_tokens == 0
    assert file.num_tokens == trace.num_tokens == 45
    assert file.requests.num_vision_tokens_Q.tolist() == [4] * 5
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]


def test_without_optional_columns_and_with_more_than_256_experts(tmp_path: Path) -> None:
    shape = TraceShape(layer_ids=(0,), num_experts=300, topk=8)
    trace = concatenate(list(uniform(shape, WORKLOAD, seed=1)))
    assert_same(read_all(write(tmp_path / "a.arrow", trace)), trace)
    assert TraceFile.open(tmp_path / "a.arrow").columns[-1] == "expert_ids"


def test_arrays_of_an_uncompressed_file_lie_in_the_mapping(tmp_path: Path) -> None:
    file = TraceFile.open(write(tmp_path / "a.arrow", full_trace()))
    mapping = np.frombuffer(file._buffer, dtype=np.uint8)
    batch = next(file.batches())
    for array in (*batch.columns().values(), *batch.modality_scores.values()):
        offset = array.ctypes.data - mapping.ctypes.data
        assert 0 <= offset <= mapping.nbytes - array.nbytes
        assert array.nbytes == 0 or np.shares_memory(array, mapping)


def test_same_rows_give_the_same_bytes_however_they_are_cut(tmp_path: Path) -> None:
    trace = full_trace()
    whole = write(tmp_path / "a.arrow", trace, batch_rows=10).read_bytes()
    rows = [trace.take(slice(row, row + 1)) for row in range(trace.num_tokens)]
    write_pieces(tmp_path / "b.arrow", rows, batch_rows=10)
    assert (tmp_path / "b.arrow").read_bytes() == whole


def test_copy_compresses_and_back(tmp_path: Path) -> None:
    trace = concatenate(list(uniform(SHAPE, dataclasses.replace(WORKLOAD, num_requests=200), seed=1)))
    write(tmp_path / "a.arrow", trace)
    copy_trace(TraceFile.open(tmp_path / "a.arrow"), tmp_path / "b.arrow", "zstd")
    copy_trace(TraceFile.open(tmp_path / "b.arrow"), tmp_path / "c.arrow")
    assert (tmp_path / "b.arrow").stat().st_size < (tmp_path / "a.arrow").stat().st_size
    assert (tmp_path / "c.arrow").read_bytes() == (tmp_path / "a.arrow").read_bytes()


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    trace = full_trace()
    path = write(tmp_path / "a.arrow", trace)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail(path, trace)
    assert path.read_bytes() == before
    with pytest.raises(TraceError, match="there are no tokens to write"), TraceWriter(path, trace.meta):
        pass
    with pytest.raises(TraceError, match="differ in columns"):
        write_pieces(path, [trace, dataclasses.replace(trace, token_id_T=None)])
    other = dataclasses.replace(trace, meta=dataclasses.replace(trace.meta, model="other"))
    with pytest.raises(TraceError, match=r"the piece has the metadata .*, not the file's"):
        write_pieces(path, [trace, other])
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]


def test_bad_destinations_are_one_line(tmp_path: Path) -> None:
    trace = full_trace()
    for path in (tmp_path, tmp_path / "missing" / "a.arrow"):
        with pytest.raises(OutputError, match=r"directory") as caught:
            write(path, trace)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        with pytest.raises(OutputError, match=r"directory"):
            export_parquet(trace, path)
    with pytest.raises(TraceError, match="batch_rows: 0 must be 1 or more"):
        write(tmp_path / "a.arrow", trace, batch_rows=0)
    with pytest.raises(TraceError, match='compression: "lz4" must be zstd or none'):
        write(tmp_path / "a.arrow", trace, compression="lz4")


def test_missing_empty_and_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name, message in (
        ("nowhere", "No such file"),
        ("empty", "the file is empty"),
        ("", "Is a directory"),
    ):
        with pytest.raises(TraceError, match=message) as caught:
            TraceFile.open(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path))


def test_foreign_files(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2]})
    path = tmp_path / "foreign"
    pq.write_table(table, path)
    with pytest.raises(TraceError, match="it is a Parquet file"):
        TraceFile.open(path)
    path.write_text("request_id,position\n1,2\n")
    with pytest.raises(TraceError, match="it is not an Arrow IPC file"):
        TraceFile.open(path)
    write_table(path, table)
    with pytest.raises(TraceError, match='it is an Arrow file without "epsim" metadata'):
        TraceFile.open(path)


def test_files_with_other_columns_or_metadata(tmp_path: Path) -> None:
    trace = full_trace()
    good = pa.ipc.open_file(write(tmp_path / "a.arrow", trace)).read_all()
    assert_same(read_all(write_table(tmp_path / "b.arrow", good)), trace)  # no checksums: still a trace

    def refused(table: pa.Table, message: str) -> None:
        with pytest.raises(TraceError, match=message) as caught:
            read_all(write_table(tmp_path / "b.arrow", table))
        assert "\n" not in str(caught.value)

    refused(good.drop_columns(["step"]), "the column step is missing")
    refused(good.append_column("extra", good["step"]), "the column extra is not one of a trace")
    refused(good.append_column("step", good["step"]), "the column step comes twice")
    wrong = good.set_column(0, "request_id", good["request_id"].cast(pa.int64()))
    refused(wrong, "the column request_id has type int64 but must have int32")
    refused(good.slice(0, 0), "it holds no tokens")
    nulls = pa.array([None] * 45, pa.int32())
    refused(good.set_column(0, "request_id", nulls), "column request_id: there are nulls")
    for text, message in (
        (
            trace.meta.to_json().replace('"format_version": 1', '"format_version": 7'),
            "format_version 7 is newer",
        ),
        (trace.meta.to_json().replace('"topk": 2', '"topk": 3'), "the column expert_ids has type"),
        (trace.meta.to_json().replace('"num_experts": 8', '"num_experts": 4'), "column expert_ids: 7 must be below 4"),
        ("nonsense", "its metadata is not a JSON object"),
    ):
        refused(good.replace_schema_metadata({"epsim": text}), message)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_truncated_anywhere(tmp_path: Path, compression: str | None) -> None:
    whole = write(tmp_path / "a.arrow", full_trace(), compression=compression).read_bytes()
    for size in (
        1,
        3,
        6,
        7,
        8,
        11,
        12,
        100,
        len(whole) // 2,
        len(whole) - 100,
        len(whole) - 6,
        len(whole) - 1,
    ):
        (tmp_path / "b.arrow").write_bytes(whole[:size])
        with pytest.raises(TraceError, match=r"not an Arrow IPC file|its end is missing|damaged") as caught:
            TraceFile.open(tmp_path / "b.arrow")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path, compression: str | None) -> None:
    trace = full_trace()
    whole = write(tmp_path / "a.arrow", trace, compression=compression, batch_rows=20).read_bytes()
    found = 0
    for place in range(0, len(whole), 23):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "b.arrow").write_bytes(damaged)
        error = error_of(tmp_path / "b.arrow")
        if error is None:  # padding, the copy of the schema at the start, a letter of the metadata
            assert_same(dataclasses.replace(read_all(tmp_path / "b.arrow"), meta=trace.meta), trace)
        else:
            assert "\n" not in error
            found += 1
    assert found > 20


def test_a_file_that_lost_a_record_batch_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", full_trace(), batch_rows=15)
    reader = pa.ipc.open_file(path)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, reader.schema) as writer:
        for i in range(2):
            batch, metadata = reader.get_batch_with_custom_metadata(i)
            writer.write_batch(batch, custom_metadata=metadata)
    with pytest.raises(TraceError, match="its end is missing after 30 tokens"):
        next(TraceFile.open(tmp_path / "b.arrow").batches())


def test_a_flipped_bit_in_the_ids_is_found_by_the_checksum(tmp_path: Path) -> None:
    trace = full_trace()
    whole = write(tmp_path / "a.arrow", trace).read_bytes()
    place = whole.index(trace.topk_expert_ids_TLK.tobytes())
    damaged = bytearray(whole)
    damaged[place + 50] ^= 1
    (tmp_path / "b.arrow").write_bytes(damaged)
    with pytest.raises(TraceError, match="record batch 0, column expert_ids: the CRC-32 is wrong"):
        TraceFile.open(tmp_path / "b.arrow").select([0])


def test_plain_pyarrow_reads_a_trace(tmp_path: Path) -> None:
    trace = full_trace()
    table = pa.ipc.open_file(write(tmp_path / "a.arrow", trace)).read_all()
    assert table["phase"].to_pylist() == trace.phase_T.tolist()
    assert table.schema.field("phase").metadata == {b"meaning": b"0 = prefill, 1 = decode"}
    assert table["expert_ids"][9].as_py() == trace.topk_expert_ids_TLK[9].reshape(-1).tolist()
    assert TraceMeta.from_json(table.schema.metadata[b"epsim"]) == trace.meta
    table.validate(full=True)


def test_parquet_export(tmp_path: Path) -> None:
    trace = full_trace()
    export_parquet(TraceFile.open(write(tmp_path / "a.arrow", trace)), tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    # 45 tokens in 3 layers. Rows 15 to 17 are the sixth token of request 0: text, as 4 tokens are vision.
    assert table.num_rows == 135
    rows = table.slice(15, 3).to_pylist()
    assert [row["layer_id"] for row in rows] == [1, 2, 5]
    assert {(row["request_id"], row["position"], row["phase"], row["modality"]) for row in rows} == {
        (0, 5, "prefill", "text")
    }
    assert [row["expert_ids"] for row in rows] == trace.topk_expert_ids_TLK[5].tolist()
    assert trace.gate_weights_TLK is not None
    assert [row["gate_weights"] for row in rows] == trace.gate_weights_TLK[5].astype(float).tolist()
    # 5 requests of 4 vision, 3 text, 2 decode tokens, times 3 layers.
    kinds = table.group_by(["phase", "modality"]).aggregate([("step", "count")]).to_pylist()
    assert {(row["phase"], row["modality"]): row["step_count"] for row in kinds} == {
        ("prefill", "vision"): 60,
        ("prefill", "text"): 45,
        ("decode", "text"): 30,
    }


def test_parquet_export_leaves_nothing_when_the_source_fails(tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", full_trace(), batch_rows=20)
    damaged = bytearray(path.read_bytes())
    place = damaged.rindex(full_trace().topk_expert_ids_TLK[40:].tobytes())
    damaged[place] ^= 1
    (tmp_path / "b.arrow").write_bytes(damaged)
    with pytest.raises(TraceError, match="record batch 2"):
        export_parquet(TraceFile.open(tmp_path / "b.arrow"), tmp_path / "b.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.arrow", "b.arrow"]


@pytest.mark.parametrize(("column", "value"), [("modality_T", 200), ("phase_T", 2)])
def test_codes_out_of_range_never_get_to_compiled_code(column: str, value: int, tmp_path: Path) -> None:
    # They index arrays there, unchecked: reading must refuse them, whoever reads.
    trace = full_trace()
    codes = getattr(trace, column).copy()
    codes[7] = value
    with TraceWriter(tmp_path / "t.arrow", trace.meta) as writer:
        writer.write(dataclasses.replace(trace, **{column: codes}))
    rule = rf"t\.arrow: record batch 0, column {column.removesuffix('_T')}: {value} must be below 2"
    for read in (lambda t: list(t.batches()), lambda t: t.select([0]), check_trace):
        with pytest.raises(TraceError, match=rule):
            read(TraceFile.open(tmp_path / "t.arrow"))


def test_a_sample_keeps_whole_requests_evenly_spaced(tmp_path: Path) -> None:
    workload = SyntheticWorkload(num_requests=9, num_vision_tokens=3, num_text_tokens=2, num_decode_tokens=1)
    trace = concatenate(list(uniform(SHAPE, workload, seed=0)))
    assert sample_trace(trace, tmp_path / "s.arrow", 3, "zstd") == 3
    sample = TraceFile.open(tmp_path / "s.arrow")
    check_trace(sample)
    assert sample.requests.request_id_Q.tolist() == [0, 4, 8]  # of 0 to 8
    np.testing.assert_array_equal(sample.select([4]).topk_expert_ids_TLK, trace.select([4]).topk_expert_ids_TLK)
    assert sample_trace(trace, tmp_path / "all.arrow", 100) == 9
    with pytest.raises(TraceError, match="--requests 0: must be 1 or more"):
        sample_trace(trace, tmp_path / "none.arrow", 0)

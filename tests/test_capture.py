"""Captures of small random models of every backbone: the picks, the rows, the file, and what happens on the way."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reference.small_models import BACKBONE_NAMES, TOKENS_PER_IMAGE, small_batch, small_model

from epsim.capture.capture import capture_batches
from epsim.capture.forward import run_batch
from epsim.capture.model import MoeModel
from epsim.capture.models.source import ModelSource
from epsim.capture.options import CaptureOptions, RequestSource
from epsim.capture.prompts.batches import Batch
from epsim.capture.provenance import make_meta
from epsim.capture.stream import DiskFullError, PassRecord, TraceStream
from epsim.errors import CapacityError, EpsimError, InputError
from epsim.trace import Modality, Phase, RoutingTrace, TraceMeta, check_trace
from epsim.trace.file import TraceFile, TraceWriter

LENGTHS = (29, 22)
MAX_NEW_TOKENS = (4, 6)


def make_batch(seed: int = 0, *, vlm: bool = True, lengths: tuple[int, ...] = LENGTHS, first_id: int = 0) -> Batch:
    tensors = small_batch(seed, lengths, vlm)
    return Batch(
        request_ids_B=np.arange(first_id, first_id + len(lengths), dtype=np.int32),
        token_ids_BS=tensors["token_ids_BS"],
        is_token_BS=tensors["is_token_BS"],
        is_text_BS=tensors["is_text_BS"],
        pixel_values=tensors["pixel_values"] if vlm else None,
        num_prompt_tokens_B=torch.tensor(lengths),
        max_new_tokens_B=torch.tensor(MAX_NEW_TOKENS[: len(lengths)]),
    )


def one_of(batch: Batch, row: int) -> Batch:
    """Return a batch of one request, without padding."""
    keep = batch.is_token_BS[row]
    return Batch(
        request_ids_B=batch.request_ids_B[row : row + 1],
        token_ids_BS=batch.token_ids_BS[row : row + 1, keep],
        is_token_BS=batch.is_token_BS[row : row + 1, keep],
        is_text_BS=batch.is_text_BS[row : row + 1, keep],
        pixel_values=None if batch.pixel_values is None else batch.pixel_values[row : row + 1],
        num_prompt_tokens_B=batch.num_prompt_tokens_B[row : row + 1],
        max_new_tokens_B=batch.max_new_tokens_B[row : row + 1],
    )


def meta_of(model: MoeModel) -> TraceMeta:
    return TraceMeta.of(model.shape, model=model.name, origin="captured", description="a test", mock=True)


def capture(model: MoeModel, batches: list[Batch], path: Path, **options: Any) -> TraceFile:
    capture_batches(model, batches, path, meta_of(model), **options)
    trace = TraceFile.open(path)
    check_trace(trace)
    return trace


class _Gates:
    """Keeps the logits of every router, in the order of execution: per layer a list of [B·S, E]."""

    def __init__(self, model: MoeModel) -> None:
        self.logits_by_layer: dict[int, list[np.ndarray]] = {i: [] for i in model.layer_ids}
        for layer_id in model.layer_ids:
            model.layers[layer_id].mlp.gate.register_forward_hook(self._hook(layer_id))

    def _hook(self, layer_id: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            self.logits_by_layer[layer_id].append(output[0].double().cpu().numpy())

        return keep


def recompute(backbone: str, logits: np.ndarray, bias: np.ndarray | None, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return picks [N, K], by descending choice, and gate weights [N, K] from router logits [N, E], in float64.

    OLMoE and DeepSeekMoE: softmax, not normalised; Qwen3-MoE and Mixtral: normalised within the top-k; Moonlight:
    sigmoid, chosen with the correction bias, weighted without it, normalised, times 2.446.
    """
    if backbone == "moonlight":
        scores = 1 / (1 + np.exp(-logits))
        choice = scores + bias
    else:
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        choice = scores
    picks = np.argsort(-choice, axis=1, kind="stable")[:, :topk]
    weights = np.take_along_axis(scores, picks, 1)
    if backbone in ("qwen3-moe", "mixtral", "moonlight"):
        weights /= weights.sum(1, keepdims=True)
    return picks, weights * (2.446 if backbone == "moonlight" else 1.0)


@pytest.mark.parametrize("vlm", [True, False], ids=["vlm", "text"])
@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_picks_and_weights_are_those_of_the_router_logits(backbone: str, vlm: bool, tmp_path: Path) -> None:
    model = small_model(backbone, vlm=vlm)
    gates = _Gates(model)
    batch = make_batch(vlm=vlm)
    trace = capture(model, [batch], tmp_path / "t.arrow")
    rows = next(iter(trace.batches()))
    is_token = [batch.is_token_BS.numpy().ravel()]
    # Both requests decode 3 steps, then only the second, which wants 6 tokens: steps 4 and 5.
    is_token += [np.array([True, True])] * 3 + [np.array([False, True])] * 2
    for index, layer_id in enumerate(model.layer_ids):
        logits = np.concatenate([a[m] for a, m in zip(gates.logits_by_layer[layer_id], is_token, strict=True)])
        bias = getattr(model.layers[layer_id].mlp.gate, "e_score_correction_bias", None)
        picks, weights = recompute(
            backbone, logits, None if bias is None else bias.double().cpu().numpy(), trace.meta.topk
        )
        order = np.argsort(rows.topk_expert_ids_TLK[:, index], axis=1)
        reference = np.argsort(picks, axis=1)
        found = np.take_along_axis(rows.topk_expert_ids_TLK[:, index], order, 1)
        np.testing.assert_array_equal(found, np.take_along_axis(picks, reference, 1))
        np.testing.assert_allclose(
            np.take_along_axis(rows.gate_weights_TLK[:, index].astype(float), order, 1),
            np.take_along_axis(weights, reference, 1),
            rtol=1e-3,
        )


def test_rows_say_phase_step_position_and_modality(tmp_path: Path) -> None:
    model = small_model("olmoe")
    trace = capture(model, [make_batch()], tmp_path / "t.arrow")
    table = trace.requests
    assert table.num_prefill_tokens_Q.tolist() == [29, 22]
    assert table.num_vision_tokens_Q.tolist() == [TOKENS_PER_IMAGE] * 2
    assert table.num_decode_tokens_Q.tolist() == [3, 5]  # 4 and 6 output tokens, of which the last is not routed
    rows = trace.select([1])
    assert rows.position_T.tolist() == list(range(27))
    assert rows.step_T.tolist() == [0] * 22 + [1, 2, 3, 4, 5]
    assert (rows.phase_T == [Phase.PREFILL] * 22 + [Phase.DECODE] * 5).all()
    vision = rows.modality_T == Modality.VISION
    assert vision.nonzero()[0].tolist() == list(range(3, 19))
    assert (rows.token_id_T[vision] == -1).all()
    assert (rows.token_id_T[:3] == make_batch().token_ids_BS[1, 7:10].numpy()).all()
    assert (rows.token_id_T[22:] >= 0).all()


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_chunks_and_batch_sizes_do_not_change_a_request(backbone: str, tmp_path: Path) -> None:
    model, batch = small_model(backbone), make_batch()
    whole = capture(model, [batch], tmp_path / "whole.arrow")
    chunked = capture(
        model, [batch], tmp_path / "chunked.arrow", chunk_size=4
    )  # the first is padding alone for one request
    single = capture(model, [one_of(batch, 0), one_of(batch, 1)], tmp_path / "single.arrow")
    for other in (chunked, single):
        assert_same_rows(whole.select([0, 1]), other.select([0, 1]))


def assert_same_rows(one: RoutingTrace, other: RoutingTrace) -> None:
    for name, column in one.columns().items():
        if name == "gate_weights_TLK":
            np.testing.assert_allclose(column.astype(float), other.columns()[name].astype(float), rtol=2e-3)
        else:
            np.testing.assert_array_equal(column, other.columns()[name], err_msg=name)


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    model, batch = small_model("qwen3-moe"), make_batch()
    trace = capture(model, [batch], tmp_path / "t.arrow")
    generated = model.module.generate(
        input_ids=batch.token_ids_BS.to(model.device),
        attention_mask=batch.is_token_BS.long().to(model.device),
        pixel_values=batch.pixel_values.to(model.device),
        max_new_tokens=6,
        do_sample=False,
        suppress_tokens=[model.image_token_id],
        pad_token_id=0,
    )
    assert trace.select([1]).token_id_T[22:].tolist() == generated[1, 29:34].tolist()


def test_a_request_ends_with_its_end_of_sequence(tmp_path: Path) -> None:
    model, batch = small_model("olmoe"), make_batch()
    ids = capture(model, [batch], tmp_path / "t.arrow").select([1]).token_id_T[22:]
    trace = capture(model, [batch], tmp_path / "eos.arrow", eos_token_ids={int(ids[2])})
    first = int(np.flatnonzero(ids == ids[2])[0])
    assert trace.select([1]).token_id_T[22:].tolist() == ids[:first].tolist()


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.arrow", "b.arrow"):
        capture(small_model("moonlight"), [make_batch(), make_batch(1, first_id=2)], tmp_path / name, chunk_size=5)
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def stop_after(batches: list[Batch], error: BaseException) -> Iterator[Batch]:
    yield from batches
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("bad image")], ids=["ctrl-c", "image"])
def test_what_was_done_before_a_stop_is_kept(error: BaseException, tmp_path: Path) -> None:
    model, path = small_model("olmoe"), tmp_path / "t.arrow"
    outcome = capture_batches(model, stop_after([make_batch()], error), path, meta_of(model))
    assert outcome.stopped_by is error
    assert (outcome.num_requests, outcome.num_tokens) == (2, 29 + 22 + 3 + 5)
    check_trace(TraceFile.open(path))
    assert "trace writer" not in {thread.name for thread in threading.enumerate()}


def test_a_stop_in_the_middle_of_a_prefill_drops_its_prompts(tmp_path: Path) -> None:
    model, path = small_model("olmoe"), tmp_path / "t.arrow"
    tokens_run = 0

    def advance(requests: int, tokens: int) -> None:
        nonlocal tokens_run
        tokens_run += tokens
        if tokens_run > 29 + 22 + 3 + 5:  # the first batch, and one chunk of the second
            raise KeyboardInterrupt

    batches = [make_batch(), make_batch(1, first_id=2)]
    outcome = capture_batches(model, batches, path, meta_of(model), chunk_size=8, advance=advance)
    assert isinstance(outcome.stopped_by, KeyboardInterrupt)
    trace = TraceFile.open(path)
    check_trace(trace)
    assert trace.requests.request_id_Q.tolist() == [0, 1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[...] DefaultCPUAllocator: can't allocate")]
)
def test_a_batch_that_does_not_fit_into_memory_keeps_those_before_it(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small_model("olmoe"), tmp_path / "t.arrow"
    embed = MoeModel.embed

    def fail_on_three(self: MoeModel, token_ids_BS: torch.Tensor, pixel_values: Any) -> torch.Tensor:
        if len(token_ids_BS) == 3:
            raise error
        return embed(self, token_ids_BS, pixel_values)

    monkeypatch.setattr(MoeModel, "embed", fail_on_three)
    monkeypatch.setattr("test_capture.MAX_NEW_TOKENS", (4, 6, 2))
    batches = [make_batch(), make_batch(1, lengths=(29, 22, 20), first_id=2), make_batch(2, first_id=5)]
    outcome = capture_batches(model, batches, path, meta_of(model))
    assert isinstance(outcome.stopped_by, CapacityError)
    assert "cpu: out of memory; write a smaller --batch-size" in str(outcome.stopped_by)
    assert outcome.num_requests == 2
    check_trace(TraceFile.open(path))


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    model, counted = small_model("olmoe"), []
    capture(model, [make_batch()], tmp_path / "t.arrow", chunk_size=8, advance=lambda *counts: counted.append(counts))
    # The second prompt has 22 tokens of 29 columns: one column of the first chunk.
    assert counted == [(0, n) for n in (9, 16, 16, 10, 2, 2, 2, 1, 1)] + [(2, 0)]


def test_nothing_done_leaves_nothing(tmp_path: Path) -> None:
    model, path = small_model("olmoe"), tmp_path / "t.arrow"
    with pytest.raises(KeyboardInterrupt):
        capture_batches(model, stop_after([], KeyboardInterrupt()), path, meta_of(model))
    with pytest.raises(InputError, match="no requests"):
        capture_batches(model, [], path, meta_of(model))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small_model("olmoe"), tmp_path / "t.arrow"
    # Beside the reserve of 4 MB there is room for two batches of 59 rows of 18 + 2 * 3 * 3 = 36 bytes, not for three.
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 4_000_000 + 5000}))
    batches = [make_batch(seed, first_id=2 * seed) for seed in range(4)]
    outcome = capture_batches(model, batches, path, meta_of(model))
    assert isinstance(outcome.stopped_by, EpsimError)
    assert "make room" in str(outcome.stopped_by)
    trace = TraceFile.open(path)
    check_trace(trace)
    assert 0 < trace.num_tokens == outcome.num_tokens < 4 * 59


def test_nothing_is_written_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that found no room must not be followed by its decode steps, for which there is."""
    free = iter([10**12, 0, *[10**12] * 9])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": next(free)}))
    model = small_model("olmoe")
    with TraceWriter(tmp_path / "t.arrow", meta_of(model)) as writer, suppress(DiskFullError), TraceStream(writer) as s:
        for request_id in (0, 1):
            s.put(pass_record(model, request_id, Phase.PREFILL))
        while s._failure is None:
            time.sleep(0.01)
        for _ in range(2):
            with pytest.raises(DiskFullError):
                s.put(pass_record(model, 1, Phase.DECODE))
        s._queue.put(s._send(pass_record(model, 1, Phase.DECODE), s._free_slots.get()))  # as one that was on its way
    trace = TraceFile.open(tmp_path / "t.arrow")
    check_trace(trace)
    assert trace.requests.request_id_Q.tolist() == [0]


def test_an_interrupt_at_any_moment_loses_no_wake_up(tmp_path: Path) -> None:
    """An interrupt while a pass is handed over must not leave the writer asleep, and the end waiting for it."""

    def raise_in_main(number: int, frame: object) -> None:
        raise TimeoutError if number == signal.SIGALRM else KeyboardInterrupt

    model = small_model("olmoe")
    records = [pass_record(model, 0, Phase.PREFILL), pass_record(model, 0, Phase.DECODE)]
    handlers = {number: signal.signal(number, raise_in_main) for number in (signal.SIGALRM, signal.SIGVTALRM)}
    delay = np.random.default_rng(0)
    signal.alarm(60)  # a writer that sleeps on
    try:
        for _ in range(150):
            stream = None
            with TraceWriter(tmp_path / "t.arrow", meta_of(model)) as writer, suppress(KeyboardInterrupt):
                stream = TraceStream(writer)
                with stream:
                    stream.put(records[0])
                    signal.setitimer(signal.ITIMER_VIRTUAL, delay.uniform(1e-4, 4e-3))
                    while True:
                        stream.put(records[1])
            assert stream is not None
            assert stream._has_ended
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_an_interrupt_while_it_ends_is_raised_when_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the file under a thread that still writes can block for ever."""
    written, write = [], TraceStream._write

    def write_slowly(stream: TraceStream, item: Any) -> None:
        time.sleep(0.2)  # the main thread waits for the end by now
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        write(stream, item)
        written.append(item)

    def raise_in_main(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    model = small_model("olmoe")
    monkeypatch.setattr(TraceStream, "_write", write_slowly)
    before = signal.signal(signal.SIGUSR1, raise_in_main)
    try:
        with (
            TraceWriter(tmp_path / "t.arrow", meta_of(model)) as writer,
            pytest.raises(KeyboardInterrupt),
            TraceStream(writer) as stream,
        ):
            stream.put(pass_record(model, 0, Phase.PREFILL))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(written) == 1
    check_trace(TraceFile.open(tmp_path / "t.arrow"))


def pass_record(model: MoeModel, request_id: int, phase: Phase) -> PassRecord:
    """Return a pass of one request with one token."""
    shape = model.shape
    size = (shape.num_layers, 1, 1, shape.topk)
    decode = int(phase is Phase.DECODE)
    return PassRecord(
        request_ids_B=np.array([request_id], np.int32),
        phase=phase,
        step=decode,
        ends_prefill=not decode,
        arrays={
            "is_token": torch.ones(1, 1, dtype=torch.bool),
            "is_text": torch.ones(1, 1, dtype=torch.bool),
            "token_ids": torch.ones(1, 1, dtype=torch.int64),
            "positions": torch.full((1, 1), decode),
            "picks": torch.arange(shape.topk).expand(size).to(torch.uint8),
            "weights": torch.ones(size, dtype=torch.float16),
        },
    )


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small_model("olmoe")
    capture(model, [make_batch()], tmp_path / "t.arrow")
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_prefill_alone() -> None:
    model = small_model("olmoe")
    passes = list(run_batch(model, make_batch().to(model.device), decode=False, chunk_size=10))
    assert [tokens.token_ids_BS.shape[1] for tokens in passes] == [10, 10, 9]
    assert [tokens.ends_prefill for tokens in passes] == [False, False, True]


@pytest.mark.parametrize(
    ("random_weights", "requests", "scores", "seed"),
    [
        (False, {"path": "p.jsonl"}, ("attention",), None),
        (False, {"path": "p.jsonl"}, ("gmm2",), 3),
        (False, {"mock": True}, (), 3),
        (True, {"path": "p.jsonl"}, (), 3),
    ],
)
def test_a_trace_has_a_seed_if_something_was_drawn(
    random_weights: bool, requests: dict[str, Any], scores: tuple[str, ...], seed: int | None
) -> None:
    how = {"device": "cpu", "dtype": "float32", "torch": "2", "transformers": "5"}
    model = replace(small_model("olmoe"), random_weights=random_weights, source=how)
    options = CaptureOptions(
        model=ModelSource(checkpoint="a/b", seed=3), requests=RequestSource(**requests), scores=scores
    )
    processor: Any = SimpleNamespace(origin={}, eos_token_ids=frozenset({2}))
    workload: Any = SimpleNamespace(words="some", provenance={})
    meta = make_meta(options, model, processor, workload, mock_statistics=False)
    assert meta.seed == seed
    assert meta.mock == (random_weights or "mock" in requests)

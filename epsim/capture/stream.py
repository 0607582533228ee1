"""From the device to the trace file without making the model wait: `TraceStream`.

On CUDA a pass's arrays are copied by a stream of their own into pinned buffers, while the model goes on; a thread waits
for the copy, leaves padding out and writes. At most `depth` passes are on their way: then the model does wait.
Shapes: B requests, S columns of a pass, T tokens, L MoE layers, K top-k.
"""

import queue
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from epsim.errors import OutputError
from epsim.trace.meta import Modality, Phase, TraceMeta
from epsim.trace.routing import RoutingTrace
from epsim.trace.writer import TraceWriter
from epsim.units import format_size

DISK_RESERVE_BYTES = 4_000_000  # for the end of the file, and for others


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass leaves in the trace.

    Attributes:
        request_ids_B: int32 [B], on the host.
        phase, step: of all its tokens.
        ends_prefill: the whole prompts of the batch are there with this pass.
        arrays: on the model's device: "is_token", "is_text", "token_ids", "positions" [B, S]; "picks" and "weights"
            [L, B, S, K]; "score_<estimator>" [B, S, L]. They must not be written to afterwards.
    """

    request_ids_B: NDArray[np.int32]
    phase: Phase
    step: int
    ends_prefill: bool
    arrays: Mapping[str, Tensor]


class DiskFullError(OutputError):
    """There is no room for the next pass; what was put before it is kept."""


class TraceStream:
    """Writes passes to an open `TraceWriter` from a thread of its own; a context manager.

    The chunks of a prefill are kept back until the last is there, so that no prompt is cut short: when the block ends,
    for whatever reason, what is kept back is dropped and all else is written, also under another Ctrl-C. What failed in
    the thread is raised by every `put` after it, and nothing that comes later is written.
    """

    def __init__(self, writer: TraceWriter, *, depth: int = 4) -> None:
        self.num_tokens = 0  # handed to the writer
        self.num_requests = 0  # whose prefill was handed to the writer
        self._writer = writer
        # Not `queue.Queue`: an interrupt in the middle of its `put` can lose the wake-up of the next one.
        self._queue: queue.SimpleQueue[_OnItsWay | None] = queue.SimpleQueue()
        self._free_slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(depth):
            self._free_slots.put(slot)
        self._buffers = _PinnedBuffers(depth)
        self._copy_stream: torch.cuda.Stream | None = None
        self._held: list[RoutingTrace] = []
        self._failure: BaseException | None = None
        self._has_ended = False
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="trace writer", daemon=True)

    def __enter__(self) -> "TraceStream":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        interrupt = self._finish()
        if kind is None:
            self._raise_failure()
            if interrupt is not None:
                raise interrupt

    def put(self, record: PassRecord) -> None:
        """Send a pass on its way; waits while `depth` passes are.

        Raises DiskFullError if there was no room for an earlier one, OutputError if it could not be written.
        """
        self._raise_failure()
        self._queue.put(self._send(record, self._free_slots.get()))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _finish(self) -> KeyboardInterrupt | None:
        """Wait until the thread has written all, for it must not go on when the file is closed; return a Ctrl-C."""
        interrupt = None
        # Not `Thread.join`: before Python 3.13 a Ctrl-C in it can make a thread that goes on count as ended.
        while not self._has_ended:
            try:
                self._queue.put(None)
                with suppress(queue.Empty):
                    self._ended.get(timeout=0.1)
            except KeyboardInterrupt as error:
                interrupt = error
        return interrupt

    def _send(self, record: PassRecord, slot: int) -> "_OnItsWay":
        device = record.arrays["picks"].device
        if device.type != "cuda":
            return _OnItsWay(record, dict(record.arrays), None, slot)
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copy_stream):
            on_host = self._buffers.on_host(slot, record.arrays)
            for name, tensor in record.arrays.items():
                on_host[name].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copy_stream)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._copy_stream)
        return _OnItsWay(record, on_host, copied, slot)

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._write(item)
            except BaseException as error:  # raised by `put` in the thread of the model
                self._failure = error
            finally:
                self._free_slots.put(item.slot)
        self._has_ended = True
        self._ended.put(None)

    def _write(self, item: "_OnItsWay") -> None:
        if item.copied is not None:
            item.copied.synchronize()
        record = item.record
        self._held.append(routing_trace(self._writer.meta, record, item.on_host))
        if record.phase is Phase.PREFILL and not record.ends_prefill:
            return
        parts, self._held = [part for part in self._held if part.num_tokens], []
        self._require_room(parts)
        for part in parts:
            self._writer.write(part)
            self.num_tokens += part.num_tokens
        if record.phase is Phase.PREFILL:
            self.num_requests += len(record.request_ids_B)

    def _require_room(self, parts: list[RoutingTrace]) -> None:
        """Raise DiskFullError unless these, and what the writer still holds, fit on the disk."""
        free = shutil.disk_usage(self._writer.path.resolve().parent).free
        needed = self._writer.num_pending_bytes + sum(part.num_bytes for part in parts) + DISK_RESERVE_BYTES
        if free < needed:
            reserve = format_size(DISK_RESERVE_BYTES)
            raise DiskFullError(
                f"{self._writer.path}: needs {format_size(needed)} on its disk, {reserve} of it in reserve, "
                f"where {format_size(free)} are free; make room, or name another place with -o"
            )


@dataclass(frozen=True)
class _OnItsWay:
    record: PassRecord
    on_host: Mapping[str, Tensor]
    copied: Any  # torch.cuda.Event, or None if on_host was never on a device
    slot: int


class _PinnedBuffers:
    """Page-locked memory for the arrays of a few passes; grows to the largest pass and is used again and again."""

    def __init__(self, num_slots: int) -> None:
        self._slots: list[dict[str, Tensor]] = [{} for _ in range(num_slots)]

    def on_host(self, slot: int, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a host tensor for each of the arrays; those of the slot's last pass are overwritten."""
        buffers = self._slots[slot]
        for name, tensor in arrays.items():
            if name not in buffers or buffers[name].numel() < tensor.numel():
                buffers[name] = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)
        return {name: buffers[name][: tensor.numel()].view(tensor.shape) for name, tensor in arrays.items()}


def routing_trace(meta: TraceMeta, record: PassRecord, arrays: Mapping[str, Tensor]) -> RoutingTrace:
    """Return the rows of a pass without padding, by request and then position; copies of the arrays."""
    is_token_BS = arrays["is_token"].numpy()
    num_tokens = int(is_token_BS.sum())
    modality_T = np.where(arrays["is_text"].numpy()[is_token_BS], Modality.TEXT, Modality.VISION).astype(np.uint8)
    token_id_T = arrays["token_ids"].numpy()[is_token_BS].astype(np.int32)
    token_id_T[modality_T == Modality.VISION] = -1
    request_ids_BS = np.broadcast_to(record.request_ids_B[:, None], is_token_BS.shape)
    return RoutingTrace(
        meta=meta,
        request_id_T=request_ids_BS[is_token_BS].astype(np.int32),
        position_T=arrays["positions"].numpy()[is_token_BS].astype(np.int32),
        step_T=np.full(num_tokens, record.step, np.int32),
        phase_T=np.full(num_tokens, record.phase, np.uint8),
        modality_T=modality_T,
        token_id_T=token_id_T,
        topk_expert_ids_TLK=_rows(arrays["picks"], is_token_BS, meta.expert_id_dtype),
        gate_weights_TLK=_rows(arrays["weights"], is_token_BS, np.dtype(np.float16)),
        modality_scores={
            name.removeprefix("score_"): tensor.numpy()[is_token_BS].astype(np.float16)
            for name, tensor in arrays.items()
            if name.startswith("score_")
        },
    )


def _rows(tensor_LBSK: Tensor, is_token_BS: NDArray[np.bool_], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return [T, L, K] of [L, B, S, K]."""
    rows_LTK = tensor_LBSK.numpy()[:, is_token_BS]
    return np.ascontiguousarray(rows_LTK.transpose(1, 0, 2), dtype=dtype)

"""From a model and batches of requests to a trace file: `capture_batches`, whose result is a `CaptureOutcome`."""

from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from epsim.capture.forward import PassTokens, run_batch
from epsim.capture.model import MoeModel
from epsim.capture.models.device import memory_errors
from epsim.capture.prompts.batches import Batch
from epsim.capture.recorder import RouterRecorder
from epsim.capture.scores.estimators import ScoreEstimator
from epsim.capture.stream import PassRecord, TraceStream
from epsim.errors import EpsimError, InputError
from epsim.trace.meta import TraceMeta
from epsim.trace.writer import Compression, TraceWriter

Advance = Callable[[int, int], None]  # requests and tokens that have been run since the last call


@dataclass(frozen=True, kw_only=True)
class CaptureOutcome:
    """What a capture left: rows and requests in the file, and what ended it early, if something did."""

    num_tokens: int
    num_requests: int
    stopped_by: KeyboardInterrupt | EpsimError | None


def capture_batches(
    model: MoeModel,
    batches: Iterable[Batch],
    path: Path,
    meta: TraceMeta,
    *,
    estimators: Sequence[ScoreEstimator] = (),
    chunk_size: int | None = None,
    eos_token_ids: Set[int] = frozenset(),
    compression: Compression = None,
    advance: Advance = lambda requests, tokens: None,
) -> CaptureOutcome:
    """Run the batches and write the routing of every token, and its scores, to `path`.

    Ctrl-C, a full disk, an image that cannot be read or a batch that does not fit into the device's memory end it
    early: what was done by then is written and valid. A prompt is in the file whole or not at all, its decode steps as
    far as they came. If nothing was done, no file is written, and the error is raised.
    """
    stopped_by: KeyboardInterrupt | EpsimError | None = None
    with TraceWriter(path, meta, compression=compression) as writer:
        stream = TraceStream(writer)
        try:
            with memory_errors(model.device), stream, Recording(model, estimators) as recording:
                for batch in batches:
                    recording.run(batch, stream, chunk_size, eos_token_ids, advance)
        except (KeyboardInterrupt, EpsimError) as error:
            stopped_by = error
        if not stream.num_tokens:
            raise stopped_by or InputError(f"{path}: there are no requests to run; nothing is written")
    return CaptureOutcome(num_tokens=stream.num_tokens, num_requests=stream.num_requests, stopped_by=stopped_by)


class Recording:
    """A model with everything attached that is recorded of it; a context manager."""

    def __init__(self, model: MoeModel, estimators: Sequence[ScoreEstimator]) -> None:
        self._model = model
        self._estimators = estimators
        self._stack = ExitStack()

    def __enter__(self) -> "Recording":
        with ExitStack() as stack:
            for estimator in self._estimators:
                estimator.attach(self._model)
                stack.callback(estimator.detach)
            self._recorder = RouterRecorder(self._model)
            stack.callback(self._recorder.detach)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(
        self, batch: Batch, stream: TraceStream, chunk_size: int | None, eos_token_ids: Set[int], advance: Advance
    ) -> None:
        on_device = batch.to(self._model.device)
        passes = run_batch(
            self._model,
            on_device,
            watchers=(self._recorder, *self._estimators),
            chunk_size=chunk_size,
            eos_token_ids=eos_token_ids,
        )
        for tokens in passes:
            stream.put(self._record(batch, tokens))
            advance(0, tokens.num_tokens)
        advance(len(batch.request_ids_B), 0)

    def _record(self, batch: Batch, tokens: PassTokens) -> PassRecord:
        picks_LBSK, weights_LBSK = self._recorder.picks()
        forward_pass = tokens.forward_pass
        arrays: dict[str, Tensor] = {
            "is_token": forward_pass.is_token_BS,
            "is_text": forward_pass.is_text_BS,
            "token_ids": tokens.token_ids_BS,
            "positions": tokens.positions_BS,
            "picks": picks_LBSK,
            "weights": weights_LBSK,
        }
        arrays |= {f"score_{each.name}": each.scores_BSL().half() for each in self._estimators}
        return PassRecord(
            request_ids_B=batch.request_ids_B,
            phase=forward_pass.phase,
            step=forward_pass.step,
            ends_prefill=tokens.ends_prefill,
            arrays=arrays,
        )

"""`Engine`: one rank of an expert-parallel inference engine that replays a batch of a trace, again and again.

A step ends with a barrier, as a serving loop makes its next batch there. Letters: L MoE layers, R ranks, Q requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.batch import Deployment, step_plans, step_tokens
from epsim.measure.exchange import StepExchange
from epsim.measure.kv import KvTransfer
from epsim.measure.layout import StepLayout
from epsim.measure.mailbox import Buffers, Streams
from epsim.measure.program import Stopwatch, run_step
from epsim.measure.transport import Transport, now_s
from epsim.measure.wire import Codec
from epsim.measure.work import Work
from epsim.scenario.spec import TransmissionSpec
from epsim.sim import StepPlan


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a rank saw of one run of a batch.

    step_s: seconds of each step, barrier included. kv_s: what decode then waited for KV caches. parts_s_SPL: seconds by
    step, part (`epsim.measure.program.PARTS`) and layer. sent_bytes_R: bytes sent to each rank.
    """

    step_s: tuple[float, ...]
    kv_s: float
    parts_s_SPL: npt.NDArray[np.float64]
    sent_bytes_R: npt.NDArray[np.int64]


class Engine:
    """One rank, ready to run one batch of requests."""

    def __init__(
        self,
        deployment: Deployment,
        transmission: TransmissionSpec,
        request_ids: npt.NDArray[np.integer[Any]],
        max_output_tokens: int | None,
        *,
        transport: Transport,
        work: Work,
        overlap_kv: bool,
    ) -> None:
        tokens = list(step_tokens(deployment, request_ids, max_output_tokens))
        self.tokens, self.mode = tokens, transmission.mode
        self._transport, self.work, self._overlap_shared = transport, work, transmission.overlap_shared
        self.plans: Sequence[StepPlan] = list(step_plans(deployment, request_ids, max_output_tokens))
        hidden_size = deployment.model.hidden_size
        self.dispatch_codec = Codec(hidden_size=hidden_size, dtype=transmission.dispatch_dtype)
        self.combine_codec = Codec(hidden_size=hidden_size, dtype=transmission.combine_dtype)
        # With two ranks a node is a rank, and arrivals come from one side: nobody passes on, nobody has to watch.
        several = transport.num_ranks > 2
        self._streams = Streams() if several else None
        buffers = Buffers(transport)
        layouts = [
            StepLayout(
                tokens=step,
                dedup=transmission.dedup,
                placement=deployment.layout.placement,
                chunk_T=deployment.counter.chunk_of_token_T(step.home_T),
                num_chunks=self.plans[0].dispatch_bytes_LCRR.shape[1] if self.mode != "two_batch" else 2,
            )
            for step in tokens
        ]
        work.prepare(layouts, self.plans)
        self.exchanges = [
            StepExchange(
                layout,
                transport=transport,
                work=work,
                buffers=buffers,
                dispatch_codec=self.dispatch_codec,
                combine_codec=self.combine_codec,
                by_micro_batch=self.mode == "two_batch",
                streams=self._streams,
                gateway_RN=self.plans[0].gateway_RN if several else None,
            )
            for layout in layouts
        ]
        if self._streams is not None:
            self._streams.tell_all = self._fail
        homes = deployment.layout.homes.assign(len(request_ids))
        self._kv = KvTransfer(
            transport, work, buffers, deployment.model, homes, tokens, overlapped=overlap_kv,
            num_layers=deployment.layout.placement.num_layers,
        )  # fmt: skip

    def run(self) -> RunRecord:
        """Run all steps of the batch once."""
        num_layers = self.exchanges[0].num_layers
        step_s, kv_s, parts = [], 0.0, []
        sent_before_R = self._transport.sent_bytes_R.copy()
        self.work.begin(0)
        self.exchanges[0].post_receives(0)
        self._kv.post_receives()
        self._transport.barrier()
        start_s = now_s()
        for step, exchange in enumerate(self.exchanges):
            watch = Stopwatch(num_layers)
            after_front = self._kv.send_layer if step == 0 else _nothing
            run_step(
                self.mode, exchange, self.work, watch, overlap_shared=self._overlap_shared, after_front=after_front
            )
            if step + 1 < len(self.exchanges):
                self.work.begin(step + 1)
                self.exchanges[step + 1].post_receives(0)
            self._transport.barrier()
            watch.lap("barrier", num_layers)
            end_s = now_s()
            step_s.append(end_s - start_s)
            parts.append(watch.seconds_PL)
            start_s = end_s
            if step == 0 and self._kv.moves:
                self._kv.send_rest()
                self._kv.wait()
                self._transport.barrier()
                start_s = now_s()
                kv_s = start_s - end_s
        return RunRecord(
            step_s=tuple(step_s),
            kv_s=kv_s,
            parts_s_SPL=np.stack(parts),
            sent_bytes_R=self._transport.sent_bytes_R - sent_before_R,
        )

    def _fail(self, error: BaseException) -> None:
        for exchange in self.exchanges:
            exchange.fail(error)

    def close(self) -> None:
        if self._streams is not None:
            self._streams.close()


def _nothing(layer: int) -> None:
    """Only a prefill moves KV caches."""

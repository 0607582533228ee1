"""A device that is not there: `WaitingWork` waits as long as the plan of the simulator says that its parts take.

Messages are real and as long as they should be; what they hold is not computed. `Waiter` is how it waits.
"""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch

from epsim.measure.layout import Leg, Part, StepLayout
from epsim.measure.transport import now_s
from epsim.measure.work import Arrival
from epsim.sim import StepPlan

Way = Literal["sleep", "spin"]
_PR_SET_TIMERSLACK = 29
_SPIN_S = 300e-6  # how long before the deadline "spin" stops sleeping
_NOTHING = Part(vectors_V=np.zeros(0, np.int64), vector_N=np.zeros(0, np.int64), pairs_N=np.zeros(0, np.int64))


class Waiter:
    """Waits until a time: `sleep` alone, or sleep and then `spin` through the rest."""

    def __init__(self, way: Way) -> None:
        self.way = way
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # Linux adds 50 us to sleeps otherwise

    def until(self, deadline_s: float) -> None:
        """Return at the deadline or, when it has passed, at once."""
        left_s = deadline_s - now_s()
        if self.way == "sleep":
            if left_s > 0:
                time.sleep(left_s)
            return
        if left_s > _SPIN_S:
            time.sleep(left_s - _SPIN_S)
        while now_s() < deadline_s:
            pass

    def errors_s(self, waits_s: float, repeats: int) -> list[float]:
        """Return by how much waits of a length were overrun."""
        errors = []
        for _ in range(repeats):
            deadline_s = now_s() + waits_s
            self.until(deadline_s)
            errors.append(now_s() - deadline_s)
        return errors


@dataclass(frozen=True, kw_only=True)
class _Waits:
    """Seconds that a rank waits in a step, by micro-batch and layer, as plain lists, which are quick to look up."""

    front_BL: list[list[float]]
    shared_BL: list[list[float]]
    experts_BL: list[list[float]]
    local_L: list[float]
    remote_LCR: list[list[list[float]]]
    head_s: float

    @classmethod
    def of(cls, plan: StepPlan, rank: int) -> Self:
        batches = plan.batches
        together = [
            batch.experts_s_LR
            + batch.served_s_LCRR.sum(axis=(1, 2))
            + (0 if batch.overlap_shared else batch.shared_s_LR)
            for batch in batches
        ]
        local_LR = plan.copy_s_LR + plan.local_s_LR + plan.shared_s_LR
        return cls(
            front_BL=[batch.front_s_LR[:, rank].tolist() for batch in batches],
            shared_BL=[batch.shared_s_LR[:, rank].tolist() for batch in batches],
            experts_BL=[times_LR[:, rank].tolist() for times_LR in together],
            local_L=local_LR[:, rank].tolist(),
            remote_LCR=(plan.remote_s_LCRR + plan.served_s_LCRR)[:, :, :, rank].tolist(),
            head_s=float(plan.tail_s_R[rank]),
        )


class WaitingWork:
    """The `Work` of an emulated device."""

    def __init__(self, rank: int, waiter: Waiter) -> None:
        self._rank, self._waiter = rank, waiter

    def prepare(self, layouts: Sequence[StepLayout], plans: Sequence[StepPlan]) -> None:
        self._waits = [_Waits.of(plan, self._rank) for plan in plans]

    def begin(self, step: int) -> None:
        self._now = self._waits[step]

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            self._waiter.until(now_s() + seconds)

    def front(self, layer: int, batch: int) -> None:
        self._wait(self._now.front_BL[batch][layer])

    def shared(self, layer: int, batch: int) -> None:
        self._wait(self._now.shared_BL[batch][layer])

    def experts(self, layer: int, batch: int, arrivals: list[Arrival]) -> None:
        self._wait(self._now.experts_BL[batch][layer])

    def local(self, layer: int) -> None:
        self._wait(self._now.local_L[layer])

    def remote(self, arrival: Arrival) -> None:
        self._wait(self._now.remote_LCR[arrival.layer][arrival.chunk][arrival.home])

    def head(self) -> None:
        self._wait(self._now.head_s)

    def pack(self, layer: int, chunk: int, leg: Leg, out: torch.Tensor) -> None: ...

    def result(self, arrival: Arrival, out: torch.Tensor) -> None: ...

    def accept(self, layer: int, chunk: int, leg: Leg, data: torch.Tensor) -> None: ...

    def finish_layer(self, layer: int, batch: int) -> None: ...

    def split(
        self, data: torch.Tensor, num_vectors: int, destination: int, out: torch.Tensor | None
    ) -> tuple[Part, Any]:
        return _NOTHING, None

    def gather(self, total: torch.Tensor | None, part: Part, arrived: Any, num_vectors: int) -> torch.Tensor | None:
        return None

    def gathered(self, total: torch.Tensor | None, out: torch.Tensor) -> None: ...

    def cached(self, layer: int, requests: list[int], out: torch.Tensor) -> None: ...

    def load(self, layer: int, requests: list[int], data: torch.Tensor) -> None: ...

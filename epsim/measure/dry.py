"""The engine run dry, as a micro-benchmark: `dry_runs` (what for: `epsim.measured.dry_run`)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from epsim.measure.emulate import Waiter, WaitingWork
from epsim.measure.engine import Engine
from epsim.measure.transport import Transport, now_s
from epsim.measure.work import Arrival
from epsim.measured.dry_run import pause_s
from epsim.run import assemble
from epsim.scenario import check_scenario

_RUNS = 12


class _PacedWork(WaitingWork):
    """Every part is one pause."""

    def __init__(self, transport: Transport, pause: Callable[[float], None]) -> None:
        super().__init__(transport.rank, Waiter("sleep"))
        self._pause, self._pause_s = pause, pause_s(transport.num_ranks)

    def _rest(self) -> None:
        self._pause(now_s() + self._pause_s)

    def front(self, layer: int, batch: int) -> None:
        self._rest()

    def shared(self, layer: int, batch: int) -> None: ...

    def experts(self, layer: int, batch: int, arrivals: list[Arrival]) -> None:
        self._rest()

    def local(self, layer: int) -> None:
        self._rest()

    def remote(self, arrival: Arrival) -> None:
        self._rest()

    def head(self) -> None:
        self._rest()


def dry_runs(scenarios: dict[str, Any], transport: Transport, pause: Callable[[float], None]) -> dict[str, float]:
    """Return, for each mode, the mean decode step in s: the median over runs, of the slowest rank."""
    found = {}
    for mode, raw in scenarios.items():
        spec = check_scenario(raw)
        deployment = assemble(spec)
        engine = Engine(
            deployment,
            spec.transmission,
            deployment.trace.requests.request_id_Q[: spec.workload.batch_sizes[0]],
            None,
            transport=transport,
            work=_PacedWork(transport, pause),
            overlap_kv=True,
        )
        steps = [np.mean(engine.run().step_s[1:]) for _ in range(_RUNS + 1)][1:]
        engine.close()
        found[mode] = float(np.median(np.max(transport.gather(steps), axis=0)))
    return found

"""`Workers`: functions of (predictor, task) on several processes, which get the predictor once each."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self, TypeVar

from epsim.calibrate.problem import Predicts

Task = TypeVar("Task")
Result = TypeVar("Result")

MOST_PROCESSES = 16  # more wait for each other: a fit has few searches at a time
_predictor: Predicts | None = None  # of a worker process


def default_processes() -> int:
    """Return one process for each core, up to the most that are of use."""
    return min(os.cpu_count() or 1, MOST_PROCESSES)


class Workers:
    """A context with num_processes processes; with one, everything runs in this process.

    The processes are spawned: a script that uses them needs `if __name__ == "__main__":`, as always with spawn.

    advance: is called after each task. Results come in the order of the tasks, whatever the number of processes.
    """

    def __init__(self, predictor: Predicts, num_processes: int = 1, advance: Callable[[], None] = lambda: None) -> None:
        self.predictor = predictor
        self.num_processes = num_processes
        self._advance = advance
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.num_processes > 1:  # spawned, not forked: the same on every platform, and safe beside threads
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.num_processes, mp_context=context, initializer=_keep, initargs=(self.predictor,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Predicts, Task], Result], tasks: Iterable[Task]) -> list[Result]:
        """Return function(predictor, task) of each task; the function must be one of a module, not a closure."""
        if self._pool is None:
            return [self._counted(function(self.predictor, task)) for task in tasks]
        futures: list[Future[Result]] = [self._pool.submit(_call, function, task) for task in tasks]
        return [self._counted(future.result()) for future in futures]

    def _counted(self, result: Result) -> Result:
        self._advance()
        return result


def _keep(predictor: Predicts) -> None:
    global _predictor
    _predictor = predictor
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Predicts, Any], Any], task: Any) -> Any:
    assert _predictor is not None
    return function(_predictor, task)

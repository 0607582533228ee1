"""Commands that run as child processes, a few at once, some after others: `Task`, `run_tasks`.

Children do not get Ctrl-C from the terminal: they are told to stop once, and waited for.
"""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from epsim.atomic import write_errors

POLL_S = 0.2
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A child process.

    Attributes:
        label: what it does, for people; different for each task.
        arguments: of the program.
        log: file that takes what it prints.
        needs: label of the task that must end well before this one starts, None if there is none.
        leaves: a file that is of no use unless the task ends well: it is removed before, and after a failure.
    """

    label: str
    arguments: tuple[str, ...]
    log: Path
    needs: str | None = None
    leaves: Path | None = None


def run_tasks(
    tasks: Sequence[Task], *, program: Sequence[str], jobs: int, say: Callable[[str], None], poll_s: float = POLL_S
) -> list[str]:
    """Run all tasks, `jobs` at once, in their order as far as needs allow; `say` a line as each ends.

    Returns a line for each that failed or, for want of another, was not run. Raises OutputError where what
    a task prints cannot be written. KeyboardInterrupt passes through once all children have ended; at a second one they
    are killed.
    """
    pool = _Pool(tasks, program, say)
    try:
        while pool.waiting or pool.running:
            pool.start(jobs)
            time.sleep(poll_s)
            pool.collect()
    except BaseException:
        pool.stop()
        raise
    return pool.failures


@dataclass(frozen=True, kw_only=True)
class _Child:
    process: subprocess.Popen[bytes]
    began_s: float


class _Pool:
    def __init__(self, tasks: Sequence[Task], program: Sequence[str], say: Callable[[str], None]) -> None:
        self.waiting, self.running = list(tasks), dict[Task, _Child]()
        self.failures: list[str] = []
        self._program, self._say, self._num_tasks = program, say, len(tasks)
        self._open = {task.label for task in tasks}  # neither ended well nor failed
        self._failed: set[str] = set()

    def start(self, jobs: int) -> None:
        """Start what can be started."""
        for task in list(self.waiting):
            if task.needs in self._failed:
                self.waiting.remove(task)
                self._fail(task, f"not run, for this failed: {task.needs}")
            elif task.needs not in self._open and len(self.running) < jobs:
                self.waiting.remove(task)
                self._remove_left(task)
                self.running[task] = _Child(process=_started(task, self._program), began_s=time.monotonic())

    def collect(self) -> None:
        """Take note of what has ended."""
        for task, child in list(self.running.items()):
            code = child.process.poll()
            if code is None:
                continue
            del self.running[task]
            if code:
                self._remove_left(task)
                self._fail(task, f"failed: {last_line(task.log) or f'exit code {code}'} (all of it: {task.log})")
                continue
            self._open.remove(task.label)
            minutes = (time.monotonic() - child.began_s) / 60
            self._say(f"{self._count()} {task.label}: {minutes:.1f} min")

    def stop(self) -> None:
        """Tell all children to stop, and wait for them."""
        for child in self.running.values():
            child.process.terminate()
        try:
            for child in self.running.values():
                child.process.wait()
        except KeyboardInterrupt:
            for child in self.running.values():
                child.process.kill()
                child.process.wait()
        for task, child in self.running.items():
            if child.process.returncode:
                self._remove_left(task)

    def _fail(self, task: Task, why: str) -> None:
        self._open.remove(task.label)
        self._failed.add(task.label)
        self.failures.append(f"{task.label}: {why}")
        self._say(f"{self._count()} {self.failures[-1]}")

    def _count(self) -> str:
        return f"[{self._num_tasks - len(self._open)}/{self._num_tasks}]"

    def _remove_left(self, task: Task) -> None:
        if task.leaves is not None:
            with write_errors(task.leaves):
                task.leaves.unlink(missing_ok=True)


def _started(task: Task, program: Sequence[str]) -> subprocess.Popen[bytes]:
    with write_errors(task.log):
        task.log.parent.mkdir(parents=True, exist_ok=True)
        log = task.log.open("wb")
    with log:
        return subprocess.Popen(
            [*program, *task.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )


def last_line(path: Path) -> str:
    """Return the last line of a text that is not blank, "" if there is none."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")

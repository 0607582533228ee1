"""Ranks as processes, from start to end: `launch` runs one job on a network and hands on what rank 0 says.

On hosts made of network namespaces where this machine allows them, else on plain loopback, unshaped. Whatever happens,
no process, namespace or file is left.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from epsim.cluster import Cluster
from epsim.errors import EpsimError
from epsim.measure.namespaces import NamespacesUnavailable, open_namespaces
from epsim.measure.topology import INTERFACE, topology_of

Start = Callable[[int, list[str], dict[str, Any]], "subprocess.Popen[bytes]"]
_PORT = 29500
_POLL_S = 0.2
PEER_LOST = 3  # exit code of a rank that lost another: it is not the one that died
_OWN_FAULTS = ("SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE")  # of which a process's last words may tell
_LAST_WORDS_S = 2.0  # how long the others may take to end by themselves before it is said who did first


class RankDied(EpsimError):
    """A rank's process ended before its job."""


def launch(cluster: Cluster, job: dict[str, Any], say: Callable[[dict[str, Any]], None], *, shaped: bool) -> None:
    """Run a job with a rank for each device; say is called with every line of rank 0.

    shaped: on namespaces (NamespacesUnavailable if there can be none); else on loopback. Raises RankDied, naming it.
    """
    with contextlib.ExitStack() as stack:
        if shaped:
            start, master, interface = _on_namespaces(stack, cluster)
        else:
            start, master, interface = _on_loopback()
        argv = [sys.executable, "-m", "epsim.measure.rank", "--master", master, "--interface", interface]
        text = json.dumps({**job, "num_ranks": cluster.num_devices})
        ranks = stack.enter_context(_processes(start, argv, text, cluster.num_devices, job["threads"]))
        _follow(ranks, say)


def namespaces_reason() -> str | None:
    """Return why this machine can make no network namespaces; None if it can."""
    try:
        with open_namespaces():
            return None
    except NamespacesUnavailable as error:
        return str(error)


def _on_namespaces(stack: contextlib.ExitStack, cluster: Cluster) -> tuple[Start, str, str]:
    topology = topology_of(cluster)
    inside = stack.enter_context(open_namespaces())
    topology.lay_out(inside)

    def start(rank: int, argv: list[str], options: dict[str, Any]) -> "subprocess.Popen[bytes]":
        return inside.start(argv, f"rank{rank}", **options)

    return start, f"{topology.address(0)}:{_PORT}", INTERFACE


def _on_loopback() -> tuple[Start, str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(rank: int, argv: list[str], options: dict[str, Any]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(argv, start_new_session=True, **options)

    return start, f"127.0.0.1:{port}", "lo"


@dataclass(frozen=True)
class _Rank:
    """A rank's process, and the file of what it says on stderr."""

    process: "subprocess.Popen[bytes]"
    said: IO[bytes]

    @property
    def last_words(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


@contextlib.contextmanager
def _processes(start: Start, argv: list[str], job: str, num_ranks: int, threads: int) -> Iterator[list["_Rank"]]:
    """Yield the ranks, whose processes are ended with the block. What they read and say is in files without a name."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    ranks: list[_Rank] = []
    try:
        for number in range(num_ranks):
            out = subprocess.PIPE if number == 0 else subprocess.DEVNULL
            said = tempfile.TemporaryFile()  # noqa: SIM115
            with tempfile.TemporaryFile() as content:
                content.write(job.encode())
                content.seek(0)
                options = {"stdin": content, "stdout": out, "stderr": said, "env": environment}
                ranks.append(_Rank(start(number, [*argv, "--rank", str(number)], options), said))
        yield ranks
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in ranks:
            rank.process.wait()
            rank.said.close()
            if rank.process.stdout is not None:
                rank.process.stdout.close()


def _follow(ranks: list[_Rank], say: Callable[[dict[str, Any]], None]) -> None:
    """Hand on what rank 0 says until all ranks have ended well."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stdout = ranks[0].process.stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        ended = [rank.process.poll() is not None for rank in ranks]
        if any(rank.process.returncode for rank in ranks):
            raise _who_died(ranks)
        with contextlib.suppress(queue.Empty):
            while True:
                say(json.loads(lines.get(timeout=_POLL_S)))
        if all(ended):
            reader.join()
            while not lines.empty():
                say(json.loads(lines.get()))
            return


def _who_died(ranks: list[_Rank]) -> RankDied:
    """Return the error of the rank that ended by itself, not because another had."""
    deadline = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
        time.sleep(_POLL_S / 4)
    causes = {}
    for number, rank in enumerate(ranks):
        if rank.process.returncode not in (0, None, PEER_LOST):
            causes[number] = _cause(rank.process.returncode, rank.last_words)
    if not causes:
        return RankDied("a rank lost its connection to another; run it again")
    number = min(causes, key=lambda r: (not causes[r].startswith("killed"), r))
    return RankDied(f"rank {number} died: {causes[number]}")


def _cause(code: int, words: str) -> str:
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            name = signal.Signals(number).name
            return f"killed by {name}" + (f": {words}" if words and name in _OWN_FAULTS else "")
    said = words or f"exit code {code}"
    return said.split(": ", 1)[1] if said.startswith("rank ") and ": " in said else said

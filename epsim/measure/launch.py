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
from pathlib import Path
from typing import Any

from epsim.cluster import Cluster
from epsim.errors import EpsimError
from epsim.measure.namespaces import NamespacesUnavailable, open_namespaces
from epsim.measure.topology import INTERFACE, topology_of

Start = Callable[[int, list[str], dict[str, Any]], "subprocess.Popen[bytes]"]
_PORT = 29500
_POLL_S = 0.2
_LAST_WORDS_S = 2.0  # how long the others may take to end by themselves before it is said who did first


class RankDied(EpsimError):
    """A rank's process ended before its job."""


def launch(cluster: Cluster, job: dict[str, Any], say: Callable[[dict[str, Any]], None], *, shaped: bool) -> None:
    """Run a job with a rank for each device; say is called with every line of rank 0.

    shaped: on namespaces (NamespacesUnavailable if there can be none); else on loopback. Raises RankDied, naming it.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="epsim-")))
        if shaped:
            start, master, interface = _on_namespaces(stack, cluster)
        else:
            start, master, interface = _on_loopback()
        path = folder / "job.json"
        path.write_text(json.dumps({**job, "num_ranks": cluster.num_devices}), encoding="utf-8")
        argv = [sys.executable, "-m", "epsim.measure.rank", str(path), "--master", master, "--interface", interface]
        ranks = stack.enter_context(_processes(start, argv, cluster.num_devices, folder, job["threads"]))
        _follow(ranks, folder, say)


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


@contextlib.contextmanager
def _processes(
    start: Start, argv: list[str], num_ranks: int, folder: Path, threads: int
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Yield the processes of the ranks, which are ended with the block."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_ranks):
            with (folder / f"rank{rank}.err").open("wb") as stderr:
                out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": stderr, "env": environment}
                ranks.append(start(rank, [*argv, "--rank", str(rank)], options))
        yield ranks
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in ranks:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _follow(ranks: list["subprocess.Popen[bytes]"], folder: Path, say: Callable[[dict[str, Any]], None]) -> None:
    """Hand on what rank 0 says until all ranks have ended well."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stdout = ranks[0].stdout
    assert stdout is not None

    def read() -> None:
        for line in stdout:
            lines.put(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while True:
        ended = [process.poll() is not None for process in ranks]
        if any(process.returncode for process in ranks):
            raise _who_died(ranks, folder)
        with contextlib.suppress(queue.Empty):
            while True:
                say(json.loads(lines.get(timeout=_POLL_S)))
        if all(ended):
            reader.join()
            while not lines.empty():
                say(json.loads(lines.get()))
            return


def _who_died(ranks: list["subprocess.Popen[bytes]"], folder: Path) -> RankDied:
    """Return the error of the rank that ended by itself, not because another had."""
    deadline = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(_POLL_S / 4)
    causes = {}
    for rank, process in enumerate(ranks):
        words = (folder / f"rank{rank}.err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if process.returncode and not (words and "is gone" in words[-1]):
            causes[rank] = _cause(process.returncode, words)
    if not causes:
        return RankDied("a rank lost its connection to another; run it again")
    rank = min(causes, key=lambda r: (not causes[r].startswith("killed"), r))
    return RankDied(f"rank {rank} died: {causes[rank]}")


def _cause(code: int, words: list[str]) -> str:
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}"
    said = words[-1].removeprefix("epsim: ") if words else f"exit code {code}"
    return said.split(": ", 1)[1] if said.startswith("rank ") and ": " in said else said

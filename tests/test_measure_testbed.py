"""The testbed leaves nothing behind: no namespace, process or file, after success, failure, Ctrl-C, a killed rank."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

from epsim.cluster import Cluster, build_cluster
from epsim.errors import ClusterError, EpsimError
from epsim.measure.namespaces import open_namespaces
from epsim.measure.topology import INTERFACE, shape_of, topology_of
from epsim.scenario import load_scenario

pytest.importorskip("torch")
from epsim.measure.launch import RankDied, launch, namespaces_reason

ROOT = Path(__file__).parent.parent
TWO_RANKS, TWO_NODES = ROOT / "scenarios/testbed/two-ranks.yaml", ROOT / "scenarios/testbed/two-nodes.yaml"
REASON = namespaces_reason()
pytestmark = pytest.mark.alone
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TRACE = "trace={kind: uniform, vision_tokens: 64, text_tokens: 9, output_tokens: 300}"


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else goes on on the machine puts nothing into it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def cluster_of(path: Path, *changes: str) -> Cluster:
    return build_cluster(load_scenario(path, changes).cluster.model_dump())


def rank_pids() -> dict[int, str]:
    """Return the processes on this machine that are ranks, or hold namespaces."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if "epsim.measure.rank" in command or "mkdir /run/netns" in command:
                    found[int(entry.name)] = command
    return found


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    processes, files = rank_pids(), set(os.listdir(tempfile.gettempdir()))
    yield
    deadline = time.monotonic() + 5
    while set(rank_pids()) - set(processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(rank_pids()) <= set(processes), rank_pids()
    assert set(os.listdir(tempfile.gettempdir())) <= files


def job(path: Path, *changes: str) -> dict[str, Any]:
    cell = {"id": 0, "scenario": load_scenario(path, [TRACE, *changes]).model_dump(mode="json", by_alias=True)}
    return {
        "kind": "run", "threads": 1, "device": "cpu", "backend": "gloo", "runs": 1, "emulated": True, "way": "sleep",
        "cells": [cell],
    }  # fmt: skip


def kill_rank_1_when_it_runs(number: signal.Signals) -> threading.Thread:
    """Kill the process itself, not the commands that brought it into its namespace, and none that was there before."""
    before = set(rank_pids())

    def kill() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            pids = [
                pid
                for pid, command in rank_pids().items()
                if pid not in before
                and command.rstrip().endswith("--rank 1")
                and not command.startswith(("nsenter", "unshare"))
            ]
            if pids:
                time.sleep(4)  # into its run
                os.kill(pids[0], number)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


@pytest.mark.parametrize("shaped", [False, pytest.param(True, marks=needs_namespaces)])
def test_a_rank_that_is_killed_is_named_and_the_others_end(shaped: bool) -> None:
    cluster = cluster_of(TWO_RANKS)
    with nothing_is_left():
        killer = kill_rank_1_when_it_runs(signal.SIGKILL)
        with pytest.raises(RankDied, match=r"^rank 1 died: killed by SIGKILL$"):
            launch(cluster, job(TWO_RANKS, "workload.batch_sizes=[64]"), lambda line: None, shaped=shaped)
        killer.join()


def test_a_rank_that_fails_is_named_with_its_reason() -> None:
    broken = job(TWO_RANKS)
    broken["cells"][0]["scenario"]["trace"] = {"kind": "file", "path": "no-such.arrow"}
    with nothing_is_left(), pytest.raises(RankDied, match=r"^rank 0 died: .*no-such\.arrow.*cannot be read"):
        launch(cluster_of(TWO_RANKS), broken, lambda line: None, shaped=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_command_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "epsim", "measure", "run", str(TWO_RANKS), "-o", str(tmp_path / "runs"), "--emulate",
        "--set", TRACE, "--set", "workload.batch_sizes=[64]",
    ]  # fmt: skip
    before = set(rank_pids())
    with nothing_is_left():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 60
        while not set(rank_pids()) - before and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert not (tmp_path / "runs" / "measured.json").exists()
    if number != signal.SIGKILL:
        assert said.strip().splitlines()[-1].startswith("epsim: interrupted")
        assert process.returncode == 130


@needs_namespaces
def test_hosts_are_joined_as_the_cluster_says() -> None:
    """Four hosts on two bridges: shaped to port and uplink, and reachable."""
    small = "cluster.devices[0].each={i: 2, j: 2}", "cluster.links[port].each={i: 2, j: 2}"
    topology = topology_of(cluster_of(TWO_NODES, *small))
    assert topology.hosts == ("node0.gpu0", "node0.gpu1", "node1.gpu0", "node1.gpu1")
    assert sorted(topology.bridges) == ["node0", "node1"]
    with nothing_is_left(), open_namespaces() as inside:
        topology.lay_out(inside)
        shaped = inside.run(["tc", "qdisc", "show", "dev", INTERFACE], "rank3")
        assert "tbf" in shaped
        assert "rate 2Gbit" in shaped
        assert inside.run(["tc", "qdisc", "show"]).count("rate 500Mbit") == 2  # the uplink, both ways
        listen = "import socket\ns = socket.create_server(('0.0.0.0', 5000))\nprint(s.accept()[0].recv(5).decode())"
        server = inside.start([sys.executable, "-c", listen], "rank3", stdout=subprocess.PIPE)
        send = (
            "import socket, time\nfor _ in range(100):\n try: c = socket.create_connection(('%s', 5000)); break\n"
            " except OSError: time.sleep(0.1)\nc.sendall(b'hello')"
        )
        inside.run([sys.executable, "-c", send % topology.address(3)], "rank0")
        assert server.communicate(timeout=20)[0] == b"hello\n"
        with pytest.raises(EpsimError, match="no-such-device"):
            inside.run(["ip", "link", "show", "no-such-device"])


def test_shapes_of_rates() -> None:
    """8 KiB packets at 100 Mbit/s, growing with the root of the rate, in powers of two; burst 1.25 packets.

    1 Gbit/s: 8192 * sqrt(10) = 25905, nearest power of two 32768.
    """
    assert (shape_of(12.5e6).packet_bytes, shape_of(12.5e6).burst_bytes) == (8192, 10240)
    assert (shape_of(125e6).packet_bytes, shape_of(125e6).burst_bytes) == (32768, 40960)
    assert shape_of(1e5).packet_bytes == 4096
    assert shape_of(1e11).packet_bytes == 65536


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("scenarios/orin-2x-olmoe.yaml", [], "has host staging, which a testbed does not imitate"),
        ("scenarios/h100-2x8-qwen3.yaml", [], "form a tree"),
        ("scenarios/testbed/two-ranks.yaml", ["cluster.links[cable].duplex=false"], "no route"),
    ],
)
def test_clusters_that_cannot_be_built(path: str, changes: list[str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        topology_of(cluster_of(ROOT / path, *changes))


def test_a_topology_is_the_tree_of_the_cluster() -> None:
    topology = topology_of(cluster_of(TWO_NODES))
    assert nx.is_tree(nx.Graph([cable.ends for cable in topology.cables]))
    assert {rate for cable in topology.cables for rate in cable.bytes_per_s} == {2e9 / 8, 500e6 / 8}

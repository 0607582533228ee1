"""Messages between ranks over torch.distributed: `Transport`, `Kind`.

gloo sends a message only when its receive is posted, and holds a lock per connection while it does. So messages to
higher and to lower ranks have connections of their own (two process groups), and engines post receives a layer ahead.
NCCL has a communicator for each ordered pair, on which messages keep the order in which both ends post them.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from epsim.errors import EpsimError
from epsim.process_end import note_rank

Backend = Literal["gloo", "nccl"]
MOST_CHUNKS = 64  # of a layer's tokens for one destination
_TIMEOUT = timedelta(minutes=10)
_SETTLE_S = 2.0


class Kind(IntEnum):
    """What a message is. Those of one kind and label between two ranks keep their order."""

    DISPATCH = 0
    COMBINE = 1
    NODE_DISPATCH = 2
    FORWARD = 3
    GATHER = 4
    NODE_COMBINE = 5
    KV = 6


class PeerLost(EpsimError):
    """Another rank has gone away."""


@dataclass(frozen=True)
class Posted:
    """A receive or send that has been posted; `peer` is its other end."""

    work: Any
    peer: int

    def wait(self) -> None:
        """Return when the message is there (or has left); PeerLost, naming the peer, if it never will be."""
        try:
            self.work.wait()
        except RuntimeError as error:
            raise _gone([self.peer], error) from error


class Transport:
    """Point-to-point messages and a barrier among the ranks of a run."""

    def __init__(self, rank: int, num_ranks: int, master: str, backend: Backend, interface: str | None) -> None:
        """Join the others; master: "host:port" of rank 0, interface: the network interface that gloo binds to."""
        self.rank, self.num_ranks, self.backend = rank, num_ranks, backend
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        note_rank()
        try:
            _interruptibly(lambda: self._join(master))
        except (RuntimeError, dist.DistError) as error:
            said = str(error).splitlines()[0]
            raise EpsimError(
                f"rank {rank} cannot join the others at {master}: {said}; check --master, --interface"
            ) from error
        self.address = _own_address(master)
        self.wire = torch.device("cuda" if backend == "nccl" else "cpu")
        self.sent_bytes_R = np.zeros(num_ranks, dtype=np.int64)

    def _join(self, master: str) -> None:
        """Make the process groups, for which all ranks have to come; in a thread, whose CUDA device is its own."""
        if self.backend == "nccl":
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        dist.init_process_group(
            self.backend, init_method=f"tcp://{master}", rank=self.rank, world_size=self.num_ranks, timeout=_TIMEOUT
        )
        self._control = dist.group.WORLD if self.backend == "gloo" else dist.new_group(backend="gloo")
        self._group_of = self._groups()

    def _groups(self) -> dict[tuple[int, int], Any]:
        """Return the process group of each ordered pair (source, destination)."""
        pairs = [(s, d) for s in range(self.num_ranks) for d in range(self.num_ranks) if s != d]
        if self.backend == "nccl":
            return {pair: dist.new_group(sorted(pair)) for pair in pairs}
        up, down = dist.new_group(), dist.new_group()
        return {(s, d): up if s < d else down for s, d in pairs}

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """Return uint8 memory that messages can be sent from and received into, touched once."""
        pinned = self.wire.type == "cpu" and torch.cuda.is_available()
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.wire, pin_memory=pinned)

    def send(self, peer: int, kind: Kind, data: torch.Tensor, label: int = 0) -> Posted:
        """Post the send of a uint8 vector, which must stay as it is until it has left."""
        self.sent_bytes_R[peer] += len(data)
        return self._post(dist.isend, (self.rank, peer), peer, kind, data, label)

    def receive(self, peer: int, kind: Kind, data: torch.Tensor, label: int = 0) -> Posted:
        """Post the receive of as many bytes as `data` has."""
        return self._post(dist.irecv, (peer, self.rank), peer, kind, data, label)

    def _post(self, post: Any, pair: tuple[int, int], peer: int, kind: Kind, data: torch.Tensor, label: int) -> Posted:
        try:
            work = post(data, peer, group=self._group_of[pair], tag=int(kind) * self.num_ranks * MOST_CHUNKS + label)
        except RuntimeError as error:
            raise _gone([peer], error) from error
        return Posted(work, peer)

    def barrier(self) -> None:
        """Return when all ranks have come here."""
        try:
            dist.barrier(group=self._control)
        except RuntimeError as error:
            raise _gone(self._lost_peers(), error) from error

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank has put in, in rank order, on every rank (pickled: only among our own processes)."""
        values: list[Any] = [None] * self.num_ranks
        try:
            dist.all_gather_object(values, value, group=self._control)
        except RuntimeError as error:
            raise _gone(self._lost_peers(), error) from error
        return values

    def _lost_peers(self) -> list[int]:
        """Return the ranks to which nothing can be sent any more: gloo does not say whom a collective waited for.

        To those that are there something is posted, so this transport is of no use any more. [] if it cannot be known.
        """
        others = [peer for peer in range(self.num_ranks) if peer != self.rank]
        if len(others) == 1:
            return others
        if self.backend == "nccl":
            return []
        deadline_s = now_s() + _SETTLE_S
        lost: list[int] = []
        while not lost and now_s() < deadline_s:
            time.sleep(_SETTLE_S / 10)  # a busy machine is late to know that connections are closed
            lost = [peer for peer in others if not self._is_there(peer)]
        return lost

    def _is_there(self, peer: int) -> bool:
        try:
            self.send(peer, Kind.KV, self.buffer(1))
        except PeerLost:
            return False
        return True


def _interruptibly(call: Callable[[], Any]) -> None:
    """Call in a thread: what waits for other ranks does not listen to Ctrl-C, and this does."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]


def _gone(peers: list[int], error: RuntimeError) -> PeerLost:
    if len(peers) > 1:
        who = f"ranks {', '.join(map(str, peers))} are"
    else:
        who = f"rank {peers[0]} is" if peers else "another rank is"
    return PeerLost(f"{who} gone: {str(error).splitlines()[0]}")


def _own_address(master: str) -> str:
    """Return the address of this host on the way to the master; nothing is sent."""
    host, port = master.rsplit(":", 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])


def wait_all(posted: Sequence[Posted]) -> None:
    """Wait for all of these."""
    for one in posted:
        one.wait()


def now_s() -> float:
    """Return the monotonic clock in seconds."""
    return time.perf_counter()

"""Ranks that lose another say which: real processes over loopback, one of which goes away."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")
from epsim.measure.transport import Kind, PeerLost, Transport
from epsim.process_end import leave

NUM_RANKS, DEAD = 3, 1
WAITS = ("barrier", "gather", "receive")
pytestmark = pytest.mark.alone


def wait_for_the_dead(transport: Transport, how: str) -> None:
    """Never returns well."""
    if how == "barrier":
        transport.barrier()
    elif how == "gather":
        transport.gather(transport.rank)
    else:
        transport.receive(DEAD, Kind.DISPATCH, transport.buffer(8)).wait()


def main(rank: int, port: int, how: str) -> None:
    """What each process does: the dead one leaves when all have met; the others, once they know, stay for a while."""
    transport = Transport(rank, NUM_RANKS, f"127.0.0.1:{port}", "gloo", "lo")
    transport.barrier()
    if rank == DEAD:
        time.sleep(0.5)
        leave(7)
    try:
        wait_for_the_dead(transport, how)
    except PeerLost as error:
        print(error, flush=True)
    time.sleep(1.0)
    leave(0)


@pytest.mark.parametrize("how", WAITS)
def test_who_is_lost_is_named(how: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "FATAL",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with contextlib.ExitStack() as stack:
        ranks = []
        for number in range(NUM_RANKS):
            command = [sys.executable, __file__, str(number), str(port), how]
            rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            ranks.append(stack.enter_context(rank))
            stack.callback(rank.kill)
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 7, 0], said
    survivors = [words for rank, words in enumerate(said) if rank != DEAD]
    assert any(words.startswith(f"rank {DEAD} is gone: ") for words in survivors), said
    for words in survivors:  # one that waited for the other survivor has lost both
        assert words.startswith((f"rank {DEAD} is gone: ", f"ranks {DEAD}, ", f"ranks 0, {DEAD} are")), said


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

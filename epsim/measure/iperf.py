"""iperf3 between two ranks, where it is installed: a second opinion on the goodput of one TCP stream."""

import json
import shutil
import subprocess
import time

from epsim.measure.transport import Transport

_SECONDS = 2
_PORT = 29555


def iperf3_bytes_per_s(transport: Transport, a: int, b: int) -> float | None:
    """Return what iperf3 receives from a on b, on every rank; None where either lacks it or it fails."""
    path = shutil.which("iperf3")
    if not all(transport.gather(path is not None)):
        return None
    address_b = transport.gather(transport.address)[b]
    server = None
    if transport.rank == b:
        server = subprocess.Popen(
            [str(path), "-s", "-1", "-B", address_b, "-p", str(_PORT)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(0.3)
    transport.barrier()
    found = _client(str(path), address_b) if transport.rank == a else None
    shared: float | None = transport.gather(found)[a]
    if server is not None:
        server.kill()
        server.wait()
    return shared


def _client(path: str, address: str) -> float | None:
    command = [path, "-c", address, "-p", str(_PORT), "-t", str(_SECONDS), "-J"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * _SECONDS, check=True)
        result: dict[str, float] = json.loads(done.stdout)["end"]["sum_received"]
        return result["bits_per_second"] / 8
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None

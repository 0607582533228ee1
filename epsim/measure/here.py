"""One rank of a real cluster in this process: `JobsHere`; the others run the same command with their own number."""

from collections.abc import Callable
from typing import Any

from epsim.cluster import Cluster
from epsim.errors import InputError
from epsim.measure.rank import run_rank
from epsim.measure.transport import Transport


class JobsHere:
    """Does jobs as one rank; all ranks do the same ones in the same order."""

    def __init__(self, rank: int, master: str, interface: str | None) -> None:
        self._rank, self._master, self._interface = rank, master, interface
        self._transport: Transport | None = None

    def __call__(self, cluster: Cluster, job: dict[str, Any], hear: Callable[[dict[str, Any]], None]) -> None:
        """Do a job together with the others; on rank 0, hear what came out."""
        if self._rank >= cluster.num_devices:
            raise InputError(
                f"--rank: {self._rank} is not below {cluster.num_devices}, the devices of the cluster; write 0 to "
                f"{cluster.num_devices - 1}"
            )
        if self._transport is None:
            self._transport = Transport(self._rank, cluster.num_devices, self._master, job["backend"], self._interface)
        run_rank(job, self._transport, hear)

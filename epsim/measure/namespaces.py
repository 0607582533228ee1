"""Network namespaces that vanish with this process: `Namespaces`, hosts of a testbed on one Linux machine.

A holder process lives in user, mount, network and process namespaces of its own (no root needed) and waits for the end
of its standard input. When this process ends, however it ends, that pipe closes, the holder ends, and the kernel
ends every process and removes every interface inside.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from epsim.errors import EpsimError

_SETUP = "mount -t tmpfs none /run && mkdir /run/netns && echo ready && exec cat"
_TOOLS = ("unshare", "nsenter", "ip", "tc")
# Idle connections keep their window, and no connection learns from an earlier one.
_SYSCTLS = {
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_congestion_control": "reno",
}


class NamespacesUnavailable(EpsimError):
    """This machine does not let us make network namespaces."""


@dataclass
class Namespaces:
    """The inside of a holder process; make one with `open_namespaces`."""

    holder: subprocess.Popen[bytes]
    pid: int
    with_user: bool

    def command(self, argv: Sequence[str], host: str | None = None) -> list[str]:
        """Return the command that runs argv inside: on a host (a network namespace), or in the fabric between them."""
        entered = ["nsenter", "-t", str(self.pid), f"--wd={os.getcwd()}", "-m", "-n", "-p"]
        if self.with_user:
            entered += ["-U", "--preserve-credentials"]
        on_host = [] if host is None else ["nsenter", f"--net=/run/netns/{host}", "--"]
        return [*entered, "--", *on_host, *argv]

    def run(self, argv: Sequence[str], host: str | None = None) -> str:
        """Run a short command inside and return what it prints; EpsimError with its complaint if it fails."""
        done = subprocess.run(self.command(argv, host), capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise EpsimError(f"testbed: `{' '.join(argv)}` failed: {' '.join(done.stderr.split()) or done.returncode}")
        return done.stdout

    def start(self, argv: Sequence[str], host: str | None, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process inside, out of reach of the terminal's Ctrl-C, which is for the driver."""
        return subprocess.Popen(self.command(argv, host), start_new_session=True, **options)

    def add_host(self, name: str) -> None:
        """Make a network namespace with the settings of TCP that measurements need."""
        self.run(["ip", "netns", "add", name])
        self.run(["ip", "link", "set", "lo", "up"], name)
        for key, value in _SYSCTLS.items():
            self.run(["sh", "-c", f"echo {value} > /proc/sys/{key}"], name)


@contextlib.contextmanager
def open_namespaces() -> Iterator[Namespaces]:
    """Yield namespaces that are gone after the block; NamespacesUnavailable, with the reason, if there can be none."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        reason = f"{', '.join(missing)} not found" if missing else f"{sys.platform} has none"
        raise NamespacesUnavailable(f"no network namespaces: {reason}; install iproute2 and util-linux")
    found = _hold(with_user=True) or (_hold(with_user=False) if os.geteuid() == 0 else None)
    if found is None:
        raise NamespacesUnavailable("no network namespaces: unshare is refused here; allow user namespaces, or be root")
    try:
        yield found
    finally:
        _end(found.holder)


def _hold(*, with_user: bool) -> Namespaces | None:
    """Return the namespaces of a new holder, or None where the kernel refuses them."""
    flags = ["-n", "-m", "-p", "-f", "--kill-child", "--mount-proc", *(["-U", "-r"] if with_user else [])]
    holder = subprocess.Popen(
        ["unshare", *flags, "sh", "-c", _SETUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stdout: IO[bytes] | None = holder.stdout
    if stdout is None or stdout.readline() != b"ready\n":
        _end(holder)
        return None
    try:
        with open(f"/proc/{holder.pid}/task/{holder.pid}/children", encoding="ascii") as children:
            inside = int(children.read().split()[0])
    except (OSError, IndexError, ValueError):  # a kernel that does not tell
        _end(holder)
        return None
    return Namespaces(holder=holder, pid=inside, with_user=with_user)


def _end(holder: subprocess.Popen[bytes]) -> None:
    """End the holder and with it everything inside."""
    for pipe in (holder.stdin, holder.stdout):
        if pipe is not None:
            pipe.close()
    try:
        holder.wait(timeout=5)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()

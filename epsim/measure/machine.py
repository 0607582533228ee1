"""The machine that measures: `machine_facts`, and `CpuTime`, of which follows how much others took meanwhile."""

import datetime
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epsim import __version__

_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what a measurement was made on and with, as plain values."""
    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "epsim": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_name() -> str:
    """Return the name of the processor as Linux knows it; elsewhere what python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@dataclass(frozen=True, kw_only=True)
class CpuTime:
    """Seconds so far: of all processes on the machine, stolen by its hypervisor, and of this process."""

    all_s: float
    stolen_s: float
    own_s: float

    @classmethod
    def now(cls) -> "CpuTime":
        """Return the counters; zeros where /proc/stat is not there."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        own_s = own.ru_utime + own.ru_stime
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        except OSError:
            return cls(all_s=0.0, stolen_s=0.0, own_s=own_s)
        user, nice, system, *_ = ticks = [int(field) / _TICKS_PER_S for field in fields]
        return cls(all_s=user + nice + system, stolen_s=ticks[7] if len(ticks) > 7 else 0.0, own_s=own_s)


def foreign_cpu_frac(before: CpuTime, after: CpuTime, own_s: float, wall_s: float) -> float:
    """Return the share of the machine's processor time that went to others than the ranks, steal included.

    own_s: what all ranks used between the two.
    """
    foreign_s = (after.all_s - before.all_s) - own_s + (after.stolen_s - before.stolen_s)
    return max(0.0, foreign_s) / max(wall_s * (os.cpu_count() or 1), 1e-9)

"""The file that `epsim measure network` writes: overrides for scenarios, and below them what was measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsim import __version__
from epsim.atomic import whole_file
from epsim.cluster import Cluster, build_cluster
from epsim.measured.network_profile import LinkFit, NetworkProfile
from epsim.scenario import ScenarioSpec
from epsim.scenario.yaml_text import dump_yaml


@dataclass(frozen=True, kw_only=True)
class NetworkFile:
    """A profile with the scenario that it is of. emulated: between ranks that wait, not compute."""

    profile: NetworkProfile
    spec: ScenarioSpec
    machine: dict[str, Any]
    emulated: bool

    @property
    def _cluster(self) -> Cluster:
        return build_cluster(self.spec.cluster.model_dump())

    def write(self, path: Path) -> None:
        """Write the file, whole."""
        head = (
            f"# Network of {self.spec.name}, measured between {'waiting' if self.emulated else 'computing'} ranks by "
            f"epsim measure network (epsim {__version__}).\n# Into a scenario with: --set @{path.name}\n"
        )
        content = {
            "overrides": self.profile.overrides(self.spec, self._cluster),
            "machine": self.machine,
            "measured": self.profile.as_dict(),
        }
        with whole_file(path) as part:
            part.write_text(head + dump_yaml(content), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        """Return what people read: fits and cells by pair of ranks."""
        fits: list[LinkFit] = self.profile.fits(self._cluster)
        names = [device.name for device in self._cluster.devices]
        return {
            "shaped": self.profile.shapes is not None,
            "machine": self.machine,
            "barrier_s": self.profile.raw["barrier"]["s"],
            "send_overhead_s": self.profile.send_overhead_s,
            "post_receive_s": self.profile.post_receive_s,
            "receive_overhead_s": self.profile.receive_overheads_s(self.spec, self._cluster),
            "background_bytes_per_s": self.profile.background_bytes_per_s,
            "iperf3_bytes_per_s": self.profile.raw.get("iperf3_bytes_per_s"),
            "pairs": [
                {
                    "name": " - ".join(names[rank] for rank in pair["pair"]),
                    "fit": vars(fit),
                    "goodput_bytes_per_s": pair["goodput_bytes_per_s"],
                    "cells": pair["cells"],
                }
                for pair, fit in zip(self.profile.raw["pairs"], fits, strict=True)
            ],
        }


def network_file(
    profile: dict[str, Any], spec: ScenarioSpec, machine: dict[str, Any], *, emulated: bool
) -> NetworkFile:
    """Return the file of a measured profile (a mapping, as the ranks report it)."""
    return NetworkFile(profile=NetworkProfile(**profile), spec=spec, machine=machine, emulated=emulated)

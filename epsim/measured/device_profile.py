"""Measured devices in scenarios: `with_device_profile`."""

from pathlib import Path

from epsim.measured.network_profile import with_overrides
from epsim.scenario import ScenarioSpec


def with_device_profile(spec: ScenarioSpec, path: Path) -> ScenarioSpec:
    """Return the scenario with a measured profile for each type of device."""
    profiles = {f"cluster.device_types.{name}.profile": str(path) for name in spec.cluster.device_types}
    return with_overrides(spec, profiles, origin="device profile")

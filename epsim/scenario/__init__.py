"""Scenarios: the YAML that people write (`ScenarioSpec`) and how it is loaded (`load_scenario`)."""

from epsim.scenario.load import (
    apply_override,
    apply_overrides,
    check_scenario,
    load_cluster,
    load_model,
    load_raw,
    load_scenario,
    scenario_schema,
)
from epsim.scenario.override import split_override
from epsim.scenario.spec import ScenarioSpec

__all__ = [
    "ScenarioSpec",
    "apply_override",
    "apply_overrides",
    "check_scenario",
    "load_cluster",
    "load_model",
    "load_raw",
    "load_scenario",
    "scenario_schema",
    "split_override",
]

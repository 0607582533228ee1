"""The simulator: `StepPlanner` or `ReplicaPlanner` makes a `StepPlan`, an engine makes a `StepResult` of it.

Engines (`simulate_step`): "event" (compiled), "simpy" (the same, readable and slow), "analytic" (closed form).
"""

from typing import Literal

from epsim.cluster import Cluster
from epsim.sim.analytic import check_closed_form, network_of, simulate_analytic, simulate_layers
from epsim.sim.engine import Execution, simulate_events
from epsim.sim.planner import StepPlanner, Transmission
from epsim.sim.replica_planner import ReplicaPlanner
from epsim.sim.step import PARTS, StepPlan, StepResult

Fidelity = Literal["event", "simpy", "analytic"]


def simulate_step(plan: StepPlan, cluster: Cluster, fidelity: Fidelity) -> tuple[StepResult, Execution | None]:
    """Simulate one step; the closed form has no execution to show."""
    if fidelity == "analytic":
        return simulate_analytic(plan, cluster), None
    if fidelity == "simpy":
        from epsim.sim import simpy_engine  # here: no other run needs SimPy

        return simulate_events(plan, cluster, simpy_engine.run_graph)
    return simulate_events(plan, cluster)


__all__ = [
    "PARTS",
    "Execution",
    "Fidelity",
    "ReplicaPlanner",
    "StepPlan",
    "StepPlanner",
    "StepResult",
    "Transmission",
    "check_closed_form",
    "network_of",
    "simulate_layers",
    "simulate_step",
]

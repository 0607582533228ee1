"""`Predictor`: what the simulator says of measured rows, for other values of cluster fields, again and again.

All that follows from routing, placement and homes is computed once; an evaluation builds clusters and planners and
simulates the steps. It gives what `epsim simulate` gives with these values set, to rounding.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epsim.batch import StepInput, run_steps, step_inputs
from epsim.calibrate.measured import Floats, MeasuredError, MeasuredRow
from epsim.calibrate.parameters import ParameterError
from epsim.cluster import build_cluster
from epsim.errors import EpsimError, ScenarioError
from epsim.model import ModelCard
from epsim.run import assemble, build_planner, check_memory
from epsim.scenario import ScenarioSpec, apply_override, check_scenario
from epsim.scenario.fields import ClusterField, cluster_keys

Batch = tuple[npt.NDArray[np.integer], list[StepInput]]  # request ids, steps


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Rows that differ in the batch size alone: one deployment. batches: by row, requests and steps of each batch."""

    spec: ScenarioSpec
    model: ModelCard
    cluster: Mapping[str, Any]
    batches: dict[int, list[Batch]]


class Predictor:
    """Predicts the means that rows measure.

    raw: a scenario as `load_raw` gives it; each row's settings are applied to it, and its workload.batch_sizes are all
    batch sizes of the rows with the same settings. Raises what `simulate` raises, with the row's settings in front.
    """

    def __init__(self, raw: dict[str, Any], rows: Sequence[MeasuredRow]) -> None:
        self.rows = tuple(rows)
        members: list[list[int]] = []
        for i, row in enumerate(self.rows):
            equal = next((group for group in members if self.rows[group[0]].settings == row.settings), None)
            if equal is None:
                members.append([i])
            else:
                equal.append(i)
        self._groups = [_group(raw, self.rows, group) for group in members]
        self._fields: dict[str, ClusterField] = {}

    @property
    def device_types(self) -> list[str]:
        """The names of the device types, of all rows."""
        return list(dict.fromkeys(name for group in self._groups for name in group.cluster["device_types"]))

    def specified(self, field: str) -> float | None:
        """Return the SI value of a cluster field in the (first row's) scenario; None where it is left out."""
        return self._field(field).read(self._groups[0].cluster)

    def predict(self, values: Mapping[str, float]) -> Floats:
        """Return mean TTFT and TPOT in s of every row, float64 [rows, 2]; TPOT is NaN without decode steps.

        values: SI, by field; fields not named keep the scenario's value. They are not checked against their range.
        """
        predicted = np.full((len(self.rows), 2), np.nan)
        for group in self._groups:
            cluster = build_cluster(self._changed(group.cluster, values))
            planner = build_planner(group.spec, group.model, cluster)
            for row, batches in group.batches.items():
                requests = [
                    request
                    for request_ids, inputs in batches
                    for request in run_steps(
                        inputs,
                        planner=planner,
                        cluster=cluster,
                        fidelity=group.spec.simulation.fidelity,
                        request_ids=request_ids,
                    ).requests
                ]
                tpot_s = [request.tpot_s for request in requests if request.tpot_s is not None]
                predicted[row, 0] = np.mean([request.ttft_s for request in requests])
                if tpot_s:
                    predicted[row, 1] = np.mean(tpot_s)
        return predicted

    def rounded(self, field: str, value: float) -> float:
        """Return a value with no more digits than a file should show."""
        return self._field(field).rounded(value)

    def changed(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Return the dump of the (first row's) cluster with other values, in SI units."""
        return self._changed(self._groups[0].cluster, values)

    def check(self, fields: Sequence[str]) -> None:
        """Raise an InputError where a field cannot be fitted.

        A row sets it or what it is in, it is named twice, or the cluster lacks what it is in.
        """
        for group in self._groups:
            places: dict[tuple[str | int, ...], str] = {}
            for name in fields:
                keys = self._field(name).keys(group.cluster)
                if keys in places:
                    raise ParameterError(f"{name}: is the same field as {places[keys]}; fit it once")
                places[keys] = name
            for path, _ in self.rows[next(iter(group.batches))].settings:
                _refuse_set(path, places, group.cluster)
            self._changed(group.cluster, {name: self._field(name).read(group.cluster) or 1.0 for name in fields})

    def _field(self, name: str) -> ClusterField:
        return self._fields.setdefault(name, ClusterField(path=name))

    def _changed(self, cluster: Mapping[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        changed: dict[str, Any] = copy.deepcopy(dict(cluster))
        for name, value in values.items():
            self._field(name).write(changed, value)
        for name, device_type in changed["device_types"].items():
            if device_type["staging"] and device_type["staging"]["bandwidth"] is None:
                raise ParameterError(
                    f"cluster.device_types.{name}.staging.bandwidth: is missing; fit it too, or give the scenario one"
                )
        return changed


def _refuse_set(path: str, places: Mapping[tuple[str | int, ...], str], cluster: Mapping[str, Any]) -> None:
    """Raise ParameterError where a column sets a fitted field or a section that it is in; places: names by keys."""
    if path.partition("[")[0].partition(".")[0] != "cluster":
        return
    try:
        keys = cluster_keys(path, cluster)
    except ScenarioError:
        return  # set by a name that the same row changes: nothing that can be fitted
    for place, name in places.items():
        if place[: len(keys)] == keys:
            raise ParameterError(f"{name}: the measurements set it in the column {path}; fit it or set it")


def _group(raw: dict[str, Any], rows: Sequence[MeasuredRow], members: Sequence[int]) -> _Group:
    settings = rows[members[0]].settings
    own = copy.deepcopy(raw)
    for path, value in settings:
        apply_override(own, path, value, origin="column")
    sizes = sorted({rows[i].batch_size for i in members})
    apply_override(own, "workload.batch_sizes", sizes)
    try:
        spec = check_scenario(own)
        deployment = assemble(spec)
        for size in sizes:
            check_memory(deployment, spec, size)
    except EpsimError as error:
        where = ", ".join(f"{path}={value}" for path, value in settings)
        raise (type(error)(f"with {where}: {error}") if where else error) from error
    request_ids, count = deployment.trace.requests.request_id_Q, spec.workload.num_batches
    batches: dict[int, list[Batch]] = {}
    for i in members:
        size = rows[i].batch_size
        ids = [request_ids[batch * size : (batch + 1) * size] for batch in range(count)]
        batches[i] = [
            (own_ids, list(step_inputs(deployment, own_ids, spec.workload.max_output_tokens))) for own_ids in ids
        ]
        if rows[i].tpot_s is not None and all(len(steps) < 2 for _, steps in batches[i]):
            raise MeasuredError(
                f"{rows[i].label}: a TPOT was measured, but the scenario makes one token; "
                "raise workload.max_output_tokens or trace.output_tokens"
            )
    return _Group(spec=spec, model=deployment.model, cluster=spec.cluster.model_dump(), batches=batches)
